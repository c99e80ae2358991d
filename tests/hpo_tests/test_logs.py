"""Log files in folders that others may have prepared."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from hpo.errors import UsageError
from hpo.logs import LARGEST_BYTES, open_log


def append(path: Path, content: bytes) -> None:
    with open(open_log(path), "ab") as log:
        log.write(content)


def test_a_log_goes_on_where_it_ended(tmp_path: Path) -> None:
    log = tmp_path / "1" / "worker-0.log"
    append(log, b"first\n")
    append(log, b"second\n")
    assert log.read_text() == "first\nsecond\n"


def test_a_log_that_has_grown_large_is_put_aside_once(tmp_path: Path) -> None:
    log = tmp_path / "worker-0.log"
    for content in (b"older", b"old", b"new"):
        append(log, content)
        os.truncate(log, LARGEST_BYTES + 1)
    append(log, b"newest")
    assert log.read_text() == "newest"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["worker-0.log", "worker-0.log.1"]
    assert (tmp_path / "worker-0.log.1").read_bytes().startswith(b"new\0")


@pytest.mark.parametrize("linked", ["1", "1/worker-0.log"])
def test_a_log_is_not_written_through_a_symbolic_link(linked: str, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    home = tmp_path / "home"
    (home / linked).parent.mkdir(parents=True)
    (home / linked).symlink_to(elsewhere, target_is_directory=True)
    if linked == "1":
        elsewhere.mkdir()
    else:
        elsewhere.write_text("theirs")
    with pytest.raises(UsageError):
        open_log(home / "1" / "worker-0.log")
    if linked == "1":
        assert list(elsewhere.iterdir()) == []
    else:
        assert elsewhere.read_text() == "theirs"


def test_a_log_that_can_t_be_written_is_said_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("a file where a folder is to be")
    with pytest.raises(UsageError, match=r"can't write the log .*: (File exists|Not a directory)"):
        open_log(tmp_path / "logs" / "worker-0.log")


@pytest.mark.parametrize("plant", [os.link, lambda _, path: os.mkfifo(path)])
def test_a_log_is_not_written_into_what_others_put_in_its_place(
    plant: Callable[[Path, Path], None], tmp_path: Path
) -> None:
    (tmp_path / "1").mkdir()
    (tmp_path / "victim").write_text("unharmed")
    plant(tmp_path / "victim", tmp_path / "1" / "worker-0.log")
    with pytest.raises(UsageError, match=r"worker-0.log is no file of ours: remove it"):
        open_log(tmp_path / "1" / "worker-0.log")
    assert (tmp_path / "victim").read_text() == "unharmed"


def test_a_log_is_its_owners_alone(tmp_path: Path) -> None:
    append(tmp_path / "1" / "worker-0.log", b"first\n")
    assert (tmp_path / "1").stat().st_mode & 0o077 == 0
    assert (tmp_path / "1" / "worker-0.log").stat().st_mode & 0o077 == 0


def test_a_log_below_another_users_home_is_that_users(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    if os.geteuid() == 0:
        os.chown(home, 54_321, 54_321)
    append(home / "logs" / "1" / "worker-0.log", b"first\n")
    made = list(home.rglob("*"))
    assert len(made) == 3
    assert {path.stat().st_uid for path in made} == {home.stat().st_uid}
