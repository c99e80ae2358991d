"""The cache of pictures: whole or absent, whoever is killed; shared, bounded, never in use."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from trainer.config import DataError
from trainer.data import cache as cache_module
from trainer.data import decoding
from trainer.data.cache import held_folder, kept_folder, locked_folder, make_room
from trainer.data.registry import load


class Builder:
    """Fills a folder, and counts how often it did."""

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes, self.num_calls = num_bytes, 0

    def __call__(self, folder: Path) -> None:
        self.num_calls += 1
        assert list(folder.iterdir()) == []
        (folder / "images").write_bytes(bytes(self.num_bytes))


def held(name: str, build: Builder) -> cache_module.Held:
    return held_folder(name, build, num_bytes=build.num_bytes)


def test_a_folder_is_built_once(cache: Path) -> None:
    build = Builder(10)
    for _ in range(3):
        folder = held("images-a", build)
        assert folder.path == cache / "images-a"
        folder.let_go()
    assert build.num_calls == 1
    assert [path.name for path in cache.iterdir()] == ["images-a"]


def test_what_could_not_be_built_leaves_nothing(cache: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "images").write_bytes(b"half")
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        held_folder("images-a", fail, num_bytes=1)
    assert list(cache.iterdir()) == []
    held("images-a", Builder(1)).let_go()


def test_what_a_killed_process_left_is_built_anew(cache: Path) -> None:
    partial = cache / ".partial-images-a"
    partial.mkdir(parents=True)
    (partial / "images").write_bytes(b"half")
    folder = held("images-a", Builder(10))
    assert (folder.path / "images").read_bytes() == bytes(10)
    folder.let_go()
    assert not partial.exists()


def test_two_that_want_the_same_at_once_build_it_once() -> None:
    build = Builder(1000)
    started = threading.Event()

    def slow(folder: Path) -> None:
        started.set()
        time.sleep(0.5)
        build(folder)

    first = threading.Thread(target=lambda: held_folder("images-a", slow, num_bytes=1000).let_go())
    first.start()
    assert started.wait(10)
    held("images-a", build).let_go()
    first.join()
    assert build.num_calls == 1


def test_the_oldest_go_first_and_what_is_held_stays(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HPO_CACHE_BYTES", "3500")
    folders = {name: held(f"images-{name}", Builder(1000)) for name in "abc"}
    for age, name in enumerate("cba", 1):
        os.utime(cache / f"images-{name}", (1000 * age, 1000 * age))
    folders["a"].let_go()
    folders["b"].let_go()
    held("images-b", Builder(1000)).let_go()  # used again: a is the older one now
    held("images-d", Builder(1000)).let_go()
    assert sorted(path.name for path in cache.iterdir()) == ["images-b", "images-c", "images-d"]
    folders["c"].let_go()


def test_what_killed_processes_left_goes_when_room_is_made(cache: Path) -> None:
    cache.mkdir(parents=True)
    for name in (".partial-images-x", ".gone-1"):
        (cache / name).mkdir()
        (cache / name / "images").write_bytes(b"half")
    with locked_folder(cache / ".partial-images-y"):
        make_room(0)
        assert [path.name for path in cache.iterdir()] == [".partial-images-y"]


def test_a_bound_that_is_no_number_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HPO_CACHE_BYTES", "2G")
    with pytest.raises(DataError, match="must be a number of bytes, got '2G'"):
        held("images-a", Builder(1))


def test_a_cache_that_can_not_be_made_is_one_line(cache: Path) -> None:
    cache.parent.write_text("a file is in the way")
    with pytest.raises(DataError, match="set HPO_HOME to a folder"):
        kept_folder("index-a")


def test_nobody_else_can_open_the_cache_and_hold_a_lock_there(cache: Path) -> None:
    cache.mkdir(parents=True)
    cache.chmod(0o755)  # as earlier versions made it
    held("images-a", Builder(10)).let_go()
    assert cache.stat().st_mode & 0o7777 == 0o700


def test_what_root_makes_below_another_users_home_is_that_users(cache: Path) -> None:
    cache.parent.mkdir()
    if os.geteuid() == 0:
        os.chown(cache.parent, 54_321, 54_321)
    held("images-a", Builder(10)).let_go()
    kept_folder("index-a")
    made = [cache, cache / "images-a", cache / "index-a"]
    assert {path.stat().st_uid for path in made} == {cache.parent.stat().st_uid}


def test_whoever_waits_for_a_folder_is_told_on_whom(
    cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    held("images-a", Builder(10)).let_go()
    holder = subprocess.Popen(
        ["flock", str(cache / "images-a"), "sh", "-c", "echo held; exec sleep 1"],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    held("images-a", Builder(10)).let_go()
    assert f"waiting for it (process {holder.pid})" in caplog.text
    holder.communicate()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 pictures that take a few milliseconds each."""
    root = tmp_path_factory.mktemp("made")
    values = np.random.default_rng(0)
    for number in range(200):
        below = root / "ab"[number % 2]
        below.mkdir(exist_ok=True)
        pixels = values.integers(0, 256, (150, 150, 3), dtype=np.uint8)
        path = below / f"{number}.png"
        Image.fromarray(pixels).save(path, compress_level=1)
        os.utime(path, (1e9, 1e9))
    return root


_READ = """
import sys
from trainer.data import decoding
from trainer.data.registry import load
decoding._FEW_BYTES = 0
if __name__ == "__main__":
    data = load(sys.argv[1], seed=0)
    print(data.fingerprint, len(data.train), len(data.val), int(data.train.images.sum()))
"""


@contextlib.contextmanager
def _reading(folder: Path, script: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that reads the folder, with processes of its own to decode."""
    script.write_text(_READ)
    process = subprocess.Popen(
        [sys.executable, str(script), str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def _is_writing(cache: Path) -> bool:
    """Whether pixels lie in a file of rows by now."""
    with contextlib.suppress(FileNotFoundError):
        return any(path.stat().st_blocks > 0 for path in cache.glob("index-*/rows-*"))
    return False


def _session(leader: int) -> list[int]:
    """The processes that a process of its own session has started, and itself."""
    members = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, session = path.read_text().rpartition(")")[2].split()[:4]
            if int(session) == leader and state != "Z":
                members.append(int(path.parent.name))
    return members


def test_two_launches_at_once_one_killed_half_way_leave_one_whole_cache(
    folder: Path, cache: Path, tmp_path: Path
) -> None:
    script = tmp_path / "read.py"
    with _reading(folder, script) as first, _reading(folder, script) as second:
        while not _is_writing(cache):
            assert first.poll() is second.poll() is None
            time.sleep(0.005)
        # the one that holds the folder's lock has started processes to decode with
        victim = max((first, second), key=lambda process: len(_session(process.pid)))
        survivor = second if victim is first else first
        victim.kill()
        victim.wait()
        out, err = survivor.communicate(timeout=120)
        assert survivor.returncode == 0, err
        assert _session(victim.pid) == []
    names = sorted(path.name.partition("-")[0] for path in cache.iterdir())
    assert names == ["images", "index", "set"]
    assert [path.name for path in cache.glob("index-*/*")] == ["index.json"]
    data = load(str(folder), seed=0)
    words = [data.fingerprint, len(data.train), len(data.val), int(data.train.images.sum())]
    assert out.split() == [str(word) for word in words]
    assert (len(data.train), len(data.val), len(data.open_test())) == (128, 32, 40)


def test_processes_decode_what_one_alone_would(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = load(str(folder), seed=0)
    monkeypatch.setenv("HPO_HOME", str(tmp_path / "other"))
    monkeypatch.setattr(decoding, "_FEW_BYTES", 0)
    monkeypatch.setattr(decoding, "num_cores", lambda: 3)
    together = load(str(folder), seed=0)
    assert together.train.images.equal(alone.train.images)
    assert together.open_test().images.equal(alone.open_test().images)


def test_a_process_that_dies_while_decoding_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "_FEW_BYTES", 0)
    monkeypatch.setattr(decoding, "num_cores", lambda: 2)
    with decoding.decoders() as working, pytest.raises(DataError, match="died"):
        list(working.map(os._exit, [3], num_bytes=1, progress=lambda _done, _all: None))
