import importlib
import os
import pkgutil

import pytest

import hpo
import storage
import trainer
from hpo import errors
from hpo.errors import ExitCode, NoTrialError, StudyFailsError, UsageError, exit_code, one_line
from storage.errors import DatabaseUnreachable, StorageError, StudyNotFound
from trainer.config import (
    CheckpointError,
    ConfigError,
    DataError,
    DeviceBusy,
    OutOfMemory,
    TrainingDiverged,
)


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
        (TrainingDiverged("x"), 1),
        (OutOfMemory("x"), 1),
        (CheckpointError("x"), 1),
        (OSError(28, "No space left on device"), 1),
    ],
)
def test_each_error_a_user_can_cause_has_its_exit_code(error: Exception, code: int) -> None:
    assert exit_code(error) == ExitCode(code)


@pytest.mark.parametrize(
    ("error", "is_of_the_machine"),
    [
        (OSError(28, "No space left on device"), True),
        (ModuleNotFoundError("No module named 'timm'"), True),
        (MemoryError(), True),
        (DataError("x"), True),
        (DeviceBusy("x"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("x"), False),
        (ConfigError("x"), False),
    ],
)
def test_an_error_of_the_machine_is_told_from_one_of_the_training(
    error: Exception, is_of_the_machine: bool
) -> None:
    assert errors.is_of_the_machine(error) is is_of_the_machine


def test_a_bug_has_none() -> None:
    assert exit_code(KeyError("x")) is None


def test_every_error_class_of_the_packages_has_an_exit_code_or_never_leaves_its_package() -> None:
    """A new one is put into hpo.errors, or here with what catches it."""
    caught = {
        "trainer.handover.Stopped",  # its thread
        "trainer.export.verify.ExportRefused",  # trainer.export.files: the format is left out
        "trainer.data.prepared._Other",  # trainer.data.prepared
        "storage.errors.LeaseLost",  # hpo.worker, hpo.pretrain
        "hpo.worker.GivenBack",  # hpo.worker
        "hpo.worker.Leave",  # hpo.worker
        "hpo.worker.TrialTaken",  # hpo.worker
    }
    found = set()
    for package in (hpo, storage, trainer):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if module.name in ("hpo.__main__", "hpo.executors.preloaded"):  # these do something
                continue
            for each in vars(importlib.import_module(module.name)).values():
                is_error = isinstance(each, type) and issubclass(each, Exception)
                if is_error and each.__module__ == module.name and not _has_code(each):
                    found.add(f"{module.name}.{each.__name__}")
    assert found == caught


def _has_code(kind: type[Exception]) -> bool:
    return exit_code(kind.__new__(kind)) is not None


def test_an_error_of_the_machine_names_the_file() -> None:
    with pytest.raises(OSError, match="Errno 2") as raised:
        os.open("/no/such\nfile", os.O_RDONLY)
    assert one_line(raised.value) == "/no/such file: No such file or directory"
