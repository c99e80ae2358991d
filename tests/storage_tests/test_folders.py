"""Folders and files where another user has rights."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from storage.errors import StorageError
from storage.folders import PrivateFolder, make_folder, name_of, private_folder


@contextlib.contextmanager
def as_another_user(folder: Path) -> Iterator[None]:
    """Of a folder of that user's, where there may be one."""
    if os.geteuid() != 0:
        yield
        return
    os.chown(folder, 54_321, 54_321)
    for path in folder.parents:
        path.chmod(path.stat().st_mode | 0o011)
    os.seteuid(54_321)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[PrivateFolder]:
    opened = private_folder(tmp_path / "folder")
    yield opened
    opened.close()


def test_a_file_that_another_user_left_is_told_with_the_way_out(folder: PrivateFolder) -> None:
    file = folder.path / "server.log"
    file.touch(mode=0o600)
    if os.geteuid() != 0:
        file.chmod(0o000)
    told = f"server.log belongs to {name_of(file.stat().st_uid)}: remove it"
    with as_another_user(folder.path), pytest.raises(StorageError, match=told):
        folder.file("server.log")


def test_what_is_written_is_there_whole_and_the_owners(folder: PrivateFolder) -> None:
    if os.geteuid() == 0:
        os.chown(folder.path, 54_321, 54_321)
    for content in (b"first", b"second"):
        folder.write("value", content)
        found, file = folder.read("value")
        assert found == content
        assert (file.st_uid, file.st_mode & 0o777) == (folder.path.stat().st_uid, 0o600)
    assert [path.name for path in folder.path.iterdir()] == ["value"]


def test_what_is_no_file_is_not_read(folder: PrivateFolder, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("theirs")
    (folder.path / "link").symlink_to(tmp_path / "secret")
    os.mkfifo(folder.path / "fifo")
    for name in ("link", "fifo"):
        with pytest.raises(OSError, match=r"No such file|Too many levels"):
            folder.read(name)
        assert folder.size(name) == -1


def test_a_folder_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        make_folder(tmp_path / "file" / "below")


def test_two_descriptors_of_a_path_that_was_swapped_are_not_mixed_up(
    folder: PrivateFolder, tmp_path: Path
) -> None:
    folder.path.rename(tmp_path / "moved")
    (tmp_path / "elsewhere").mkdir()
    folder.path.symlink_to(tmp_path / "elsewhere")
    os.close(folder.file("users.lock"))
    assert (tmp_path / "moved" / "users.lock").exists()
    assert not list((tmp_path / "elsewhere").iterdir())
