import os
import resource
from pathlib import Path

import pytest

from storage.checkpoints import TrialCheckpoints, read_file, write_file
from storage.errors import LeaseLost


def attempt(root: Path, token: int, *, trial: int = 3) -> TrialCheckpoints:
    return TrialCheckpoints(root, study_key=7, trial_number=trial, token=token)


def begun(root: Path, token: int) -> TrialCheckpoints:
    checkpoints = attempt(root, token)
    checkpoints.take_over()
    return checkpoints


def newest_file(root: Path) -> Path:
    return max(root.rglob("*.ckpt"), key=lambda path: int(path.stem))


def test_a_new_trial_has_no_checkpoint(tmp_path: Path) -> None:
    assert attempt(tmp_path, 1).take_over() is None


def test_the_next_attempt_gets_the_newest_one(tmp_path: Path) -> None:
    first = begun(tmp_path, 1)
    for step in (1, 4, 8, 12):
        first.save(step, b"at %d" % step)
    assert attempt(tmp_path, 2).take_over() == b"at 12"


def test_below_another_users_folder_that_user_can_go_on(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        os.chown(tmp_path, 54_321, 54_321)
    begun(tmp_path, 1).save(1, b"at 1")
    folders = [path for path in tmp_path.rglob("*") if path.is_dir()]
    assert len(folders) == 3
    assert {path.stat().st_uid for path in folders} == {tmp_path.stat().st_uid}


def test_two_are_kept_of_many(tmp_path: Path) -> None:
    first = begun(tmp_path, 1)
    for step in range(20):
        first.save(step, bytes(1000))
    assert sorted(int(path.stem) for path in tmp_path.rglob("*.ckpt")) == [18, 19]


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"something else"),
        lambda path: path.write_bytes(path.read_bytes()[:60] + b"?" + path.read_bytes()[61:]),
        lambda path: path.unlink(),
        lambda path: (path.unlink(), path.symlink_to("/etc/hostname")),
    ],
    ids=["truncated", "empty", "foreign", "flipped", "missing", "linked"],
)
def test_a_bad_checkpoint_is_passed_over_for_the_one_before(tmp_path: Path, damage) -> None:  # type: ignore[no-untyped-def]
    first = begun(tmp_path, 1)
    first.save(4, b"four" * 50)
    first.save(8, b"eight" * 50)
    damage(newest_file(tmp_path))
    assert attempt(tmp_path, 2).take_over() == b"four" * 50


def test_a_hundred_corrupted_checkpoints_are_never_loaded(tmp_path: Path) -> None:
    first = begun(tmp_path, 1)
    payload = bytes(range(256)) * 4
    first.save(4, payload)
    path = newest_file(tmp_path)
    whole = path.read_bytes()
    for position in range(0, len(whole), max(1, len(whole) // 100)):
        flipped = bytearray(whole)
        flipped[position] ^= 0x10
        path.write_bytes(bytes(flipped))
        assert attempt(tmp_path, 1)._valid_files() == []
    path.write_bytes(whole)
    assert attempt(tmp_path, 1)._valid_files() == [(4, payload)]


def test_what_the_old_attempt_writes_after_the_take_over_is_never_read(tmp_path: Path) -> None:
    old = begun(tmp_path, 1)
    old.save(4, b"four")
    begun(tmp_path, 2)
    with pytest.raises(LeaseLost):
        old.save(8, b"late")
    assert attempt(tmp_path, 3).take_over() == b"four"


def test_an_attempt_that_wakes_up_late_neither_takes_nor_removes_anything(tmp_path: Path) -> None:
    begun(tmp_path, 1).save(4, b"four")
    begun(tmp_path, 3).save(8, b"eight")
    with pytest.raises(LeaseLost):
        attempt(tmp_path, 2).take_over()
    assert attempt(tmp_path, 4).take_over() == b"eight"


def test_a_killed_take_over_is_done_again(tmp_path: Path) -> None:
    begun(tmp_path, 1).save(4, b"four")
    half = tmp_path / "7" / "3" / ".2"
    half.mkdir()
    (half / "4.ckpt").write_bytes(b"half")
    assert attempt(tmp_path, 2).take_over() == b"four"
    assert attempt(tmp_path, 3).take_over() == b"four"


def test_a_partial_file_of_a_killed_writer_is_no_checkpoint(tmp_path: Path) -> None:
    begun(tmp_path, 1).save(4, b"four")
    (tmp_path / "7" / "3" / "1" / ".8.ckpt.partial").write_bytes(b"hpo checkpoint 1\nhalf")
    assert attempt(tmp_path, 2).take_over() == b"four"


def test_trials_and_studies_do_not_share_checkpoints(tmp_path: Path) -> None:
    begun(tmp_path, 1).save(4, b"four")
    assert attempt(tmp_path, 2, trial=4).take_over() is None
    other = TrialCheckpoints(tmp_path, study_key=8, trial_number=3, token=2)
    assert other.take_over() is None


def test_a_trial_that_has_ended_leaves_nothing(tmp_path: Path) -> None:
    checkpoints = begun(tmp_path, 1)
    checkpoints.save(4, b"four")
    checkpoints.remove()
    assert not list(tmp_path.rglob("*.ckpt"))


def test_a_root_that_can_not_be_written_is_an_os_error(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(OSError, match="Not a directory"):
        attempt(file, 1).take_over()


def test_a_file_that_finds_no_room_names_itself_and_leaves_the_one_before(tmp_path: Path) -> None:
    path = tmp_path / "state.ckpt"
    write_file(path, b"before")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**10, before[1]))
    try:
        with pytest.raises(OSError, match=r"state\.ckpt'$"):
            write_file(path, bytes(2**20))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert read_file(path) == b"before"
    assert os.listdir(tmp_path) == ["state.ckpt"]


@pytest.mark.parametrize("place", ["7", "7/3"])
def test_a_folder_that_is_a_link_is_no_place_for_checkpoints(tmp_path: Path, place: str) -> None:
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    elsewhere.mkdir()
    (root / place).parent.mkdir(parents=True)
    (root / place).symlink_to(elsewhere)
    with pytest.raises(OSError, match="symbolic link"):
        attempt(root, 1).take_over()
    assert not list(elsewhere.rglob("*.ckpt"))


def test_an_attempts_folder_that_is_a_link_is_neither_read_nor_written(tmp_path: Path) -> None:
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    begun(elsewhere, 5).save(4, b"foreign")
    foreign = elsewhere / "7" / "3" / "5"
    first = begun(root, 1)
    first.save(4, b"four")
    (root / "7" / "3" / "2").symlink_to(foreign)
    second = attempt(root, 2)
    assert second.take_over() == b"four"
    with pytest.raises(OSError, match="symbolic link"):
        second.save(8, b"eight")
    assert [path.name for path in foreign.iterdir()] == ["4.ckpt"]


def test_nothing_is_written_through_a_link(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("untouched")
    root = tmp_path / "root"
    first = begun(root, 1)
    own = root / "7" / "3" / "1"
    (own / "4.ckpt").symlink_to(victim)
    (own / ".8.ckpt.partial").symlink_to(victim)
    first.save(4, b"four")
    with pytest.raises(OSError, match="symbolic links"):
        first.save(8, b"eight")
    assert victim.read_text() == "untouched"
