"""The export folder appears whole or not at all, and nobody else's folder is touched."""

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from trainer.config import ConfigError
from trainer.export.publish import check_out, new_folder

# Exports again and again, each time in a child that kills itself at its next file operation.
KILLED_AT_EACH_OPERATION = """
import json, os, shutil, signal, sys
from pathlib import Path
from trainer.export import publish

parent, before, exchange = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
out = parent / "out"
if exchange == "without":
    publish._exchange = lambda one, other: False

def write(folder, text):
    for name in ("manifest.json", "model.bin"):
        (folder / name).write_text(json.dumps({"made_by": "hpo", "text": text}))

def start_again():
    shutil.rmtree(parent)
    parent.mkdir()
    if before == "older":
        out.mkdir()
        write(out, "old")

def attempt(kill_at):
    count = 0
    def kill(event, arguments):
        nonlocal count
        if event.startswith(("os.", "open", "shutil.", "ctypes.call", "fcntl.")):
            if count == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1
    sys.addaudithook(kill)
    with publish.new_folder(out) as folder:
        write(folder, "new")
    os._exit(0)

def state(folder):
    if not folder.exists():
        return "absent"
    texts = {json.loads(path.read_text())["text"] for path in folder.iterdir()}
    return "/".join(sorted(texts)) if len(list(folder.iterdir())) == 2 else "torn"

states = []
kill_at, status = 0, None
while status != 0:
    start_again()
    child = os.fork()
    if child == 0:
        attempt(kill_at)
    status = os.waitpid(child, 0)[1]
    kill_at += 1
    killed = state(out)
    with publish.new_folder(out) as folder:
        found = state(out)
        write(folder, "next")
    left = [path.name for path in parent.iterdir()]
    states.append([killed, found, state(out), left])
print(json.dumps(states))
"""


def killed_states(tmp_path: Path, before: str, exchange: str) -> list[list[Any]]:
    """After each kill: the folder's state, its state in the next export, then all that is left."""
    command = [sys.executable, "-c", KILLED_AT_EACH_OPERATION]
    done = subprocess.run(
        [*command, str(tmp_path / "parent"), before, exchange],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    states: list[list[Any]] = json.loads(done.stdout)
    return states


def an_export(folder: Path, text: str = "old") -> Path:
    folder.mkdir()
    (folder / "manifest.json").write_text(json.dumps({"made_by": "hpo", "text": text}))
    return folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_killed_at_any_operation_is_absent_or_whole(tmp_path: Path) -> None:
    (tmp_path / "parent").mkdir()
    states = killed_states(tmp_path, "nothing", "with")
    assert len(states) > 10
    assert {killed for killed, *_ in states} == {"absent", "new"}
    assert all(rest == ["next", ["out"]] for _, _, *rest in states)


def test_an_older_export_stays_until_the_new_one_takes_its_place(tmp_path: Path) -> None:
    (tmp_path / "parent").mkdir()
    states = killed_states(tmp_path, "older", "with")
    kinds = [killed for killed, *_ in states]
    if sys.platform == "linux":
        assert set(kinds) == {"old", "new"}
        assert kinds == sorted(kinds, reverse=True), "the new one never goes away again"
    assert all(rest == ["next", ["out"]] for _, _, *rest in states)


def test_where_folders_cannot_be_swapped_an_older_export_is_never_lost(tmp_path: Path) -> None:
    (tmp_path / "parent").mkdir()
    states = killed_states(tmp_path, "older", "without")
    assert {killed for killed, *_ in states} == {"old", "absent", "new"}
    assert {found for _, found, *_ in states} == {"old", "new"}, "put back by the next export"
    assert all(rest == ["next", ["out"]] for _, _, *rest in states)


def test_a_folder_of_somebody_else_is_refused_and_untouched(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_text("precious")
    with pytest.raises(ConfigError, match=r"isn't empty and is no older export"):
        check_out(tmp_path)
    assert names(tmp_path) == ["photo.jpg"]


@pytest.mark.parametrize(
    "manifest", ["", "[]", "{}", '{"made_by": "someone"}', "\xff", "[" * 9999, "null"]
)
def test_a_manifest_that_is_not_ours_protects_its_folder(tmp_path: Path, manifest: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "manifest.json").write_text(manifest, encoding="latin-1")
    with pytest.raises(ConfigError, match="no older export"):
        check_out(out)


def test_a_folder_filled_by_somebody_during_the_export_is_not_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def fill() -> None:
        with new_folder(out) as folder:
            an_export(folder / "nested")
            out.mkdir()
            (out / "precious").touch()

    with pytest.raises(ConfigError, match="no older export"):
        fill()
    assert names(tmp_path) == ["out"]
    assert names(out) == ["precious"]


def test_an_empty_folder_is_taken_and_missing_ones_above_are_made(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for out in (tmp_path / "empty", tmp_path / "a" / "b" / "out"):
        check_out(out)
        with new_folder(out) as folder:
            (folder / "file").touch()
        assert names(out) == ["file"]
        assert names(out.parent) in (["a", "empty"], ["out"], ["empty"])


def test_a_link_to_a_folder_stays_a_link_to_the_new_one(tmp_path: Path) -> None:
    an_export(tmp_path / "real")
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "real")
    with new_folder(link) as folder:
        (folder / "file").touch()
    assert link.is_symlink()
    assert names(link) == ["file"]


def test_a_block_that_raises_leaves_the_older_export_alone(tmp_path: Path) -> None:
    out = an_export(tmp_path / "out")
    with pytest.raises(KeyboardInterrupt), new_folder(out):
        raise KeyboardInterrupt
    assert names(tmp_path) == ["out"]
    assert names(out) == ["manifest.json"]


def test_the_folder_has_the_rights_that_any_other_new_folder_has(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    with new_folder(tmp_path / "out"):
        pass
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_an_export_under_way_is_no_leftover(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with new_folder(out) as first:
        (first / "file").write_text("first")
        (first / "manifest.json").write_text('{"made_by": "hpo"}')
        with new_folder(out) as second:
            (second / "manifest.json").write_text('{"made_by": "hpo"}')
        assert names(first) == ["file", "manifest.json"]
    assert names(out) == ["file", "manifest.json"], "the last one to end stays"
    assert names(tmp_path) == ["out"]


def test_the_leftovers_of_another_folder_are_left(tmp_path: Path) -> None:
    for name in (".out.partial-1-aa", ".output.partial-1-aa", ".out.backup"):
        (tmp_path / name).mkdir()
    with new_folder(tmp_path / "out"):
        pass
    assert names(tmp_path) == [".out.backup", ".output.partial-1-aa", "out"]


def test_a_link_that_looks_like_a_leftover_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").touch()
    (tmp_path / ".out.partial-1-aa").symlink_to(tmp_path / "precious")
    with new_folder(tmp_path / "out"):
        pass
    assert names(tmp_path / "precious") == ["file"]


@pytest.mark.parametrize(
    "out",
    ["/dev/null/out", "/proc/out", "/", "nul\0byte", "x" * 600, "file", "file/out"],
)
def test_a_folder_that_cannot_be_written_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    for refuse in (check_out, lambda path: new_folder(path).__enter__()):
        with pytest.raises(ConfigError) as refusal:
            refuse(Path(out))
        assert len(str(refusal.value).splitlines()) == 1
        assert "\0" not in str(refusal.value)
    assert names(tmp_path) == ["file"]


def test_a_folder_whose_path_is_no_utf_8_is_refused_in_one_line_and_nothing_is_made(
    tmp_path: Path,
) -> None:
    latin = tmp_path / os.fsdecode(b"caf\xe9")
    with pytest.raises(ConfigError, match=r"bytes that aren't UTF-8 .*: give another --out$"):
        check_out(latin / "out")
    assert not latin.exists()


def test_a_disk_that_is_full_is_said_in_one_line(tmp_path: Path) -> None:
    with (
        pytest.raises(ConfigError, match=r"can't be written: No space left on device$"),
        new_folder(tmp_path / "out"),
        Path("/dev/full").open("wb", buffering=0) as full,
    ):
        full.write(b"model")
    assert names(tmp_path) == []


def test_a_disk_without_locks_takes_an_export_and_keeps_leftovers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(descriptor: int, operation: int) -> None:
        raise OSError(95, f"Operation not supported: {descriptor} {operation}")

    (tmp_path / ".out.partial-1-aa").mkdir()
    monkeypatch.setattr(fcntl, "flock", no_locks)
    with new_folder(tmp_path / "out"):
        pass
    assert names(tmp_path) == [".out.partial-1-aa", "out"]


def test_refusing_early_needs_no_torch() -> None:
    code = "import sys, trainer.export.publish; assert 'torch' not in sys.modules"
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
