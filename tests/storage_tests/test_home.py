"""Where files are kept, also for users whom the machine doesn't know."""

import os
from pathlib import Path

import pytest

from storage.errors import StorageError
from storage.home import home


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that is left to a user without a home, not there yet."""
    monkeypatch.setattr(os, "geteuid", lambda: 54_321)
    for name in ("HPO_HOME", "XDG_DATA_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/")  # as Docker sets it
    return Path("/var/tmp/hpo-54321")


def test_hpo_home_is_the_folder_wherever_a_process_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HPO_HOME", "below")
    assert home() == tmp_path / "below"


def test_a_home_of_nobody_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HPO_HOME", "~nobody-of-this-name/x")
    with pytest.raises(StorageError, match="HPO_HOME names no folder") as refused:
        home()
    assert "\n" not in str(refused.value)


def test_a_working_folder_that_is_gone_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    monkeypatch.setenv("HPO_HOME", "below")
    with pytest.raises(StorageError, match="HPO_HOME names no folder, 'below'"):
        home()


def test_a_user_without_a_home_has_a_folder_and_only_if_it_is_ones_own(homeless: Path) -> None:
    try:
        # made by us, who are not that user
        with pytest.raises(StorageError, match=f"{homeless} is not ours: set HPO_HOME"):
            home()
    finally:
        homeless.rmdir()


def test_a_user_without_a_home_can_name_one(
    homeless: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HPO_HOME", str(tmp_path))
    assert home() == tmp_path
    monkeypatch.delenv("HPO_HOME")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert home() == tmp_path / "hpo"
    assert not homeless.exists()
