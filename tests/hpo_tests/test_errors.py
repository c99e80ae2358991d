import pytest

from hpo.errors import ExitCode, NoTrialError, StudyFailsError, UsageError, exit_code
from storage.errors import DatabaseUnreachable, StorageError, StudyNotFound
from trainer.config import ConfigError, DataError


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UsageError("x"), 2),
        (ConfigError("x"), 2),
        (StudyNotFound("x"), 2),
        (StorageError("x"), 3),
        (DatabaseUnreachable("x"), 3),
        (NoTrialError("x"), 4),
        (DataError("x"), 5),
        (StudyFailsError("x"), 6),
    ],
)
def test_each_error_a_user_can_cause_has_its_exit_code(error: Exception, code: int) -> None:
    assert exit_code(error) == ExitCode(code)


def test_a_bug_has_none() -> None:
    assert exit_code(KeyError("x")) is None
