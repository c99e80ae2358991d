"""Temporary folders with paths too long for a socket."""

import multiprocessing.connection
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from hpo.errors import UsageError
from hpo.executors import sockets

_WORKS = """
import multiprocessing, os, tempfile
from multiprocessing.util import get_temp_dir
from hpo.executors import local
local.PRELOADED = "json"

if __name__ == "__main__":
    folder = tempfile.gettempdir()
    local.warm_up()
    with multiprocessing.get_context("forkserver").Pool(1) as pool:
        assert pool.apply(os.getppid) != os.getpid()
        inherited = pool.apply(get_temp_dir)
    assert inherited == get_temp_dir()
    assert tempfile.gettempdir() == folder
    print(get_temp_dir())
"""


@pytest.mark.parametrize("length", [10, 120])
def test_workers_are_forked_whatever_the_length_of_the_temporary_folder(
    short_folder: Path, tmp_path: Path, length: int
) -> None:
    folder = short_folder / ("x" * length)
    folder.mkdir()
    script = tmp_path / "works.py"
    script.write_text(_WORKS)
    done = subprocess.run(
        [sys.executable, str(script)],
        env={
            **os.environ,
            "TMPDIR": str(folder),
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path]),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    used = Path(done.stdout.strip())
    assert used.is_relative_to(folder) == (length == 10)
    assert not used.exists()  # it is removed with the process


def test_where_no_short_folder_can_be_written_the_way_out_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / ("x" * 120)
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setattr(sockets, "_SHORT", (str(tmp_path / "missing"),))
    monkeypatch.delitem(multiprocessing.current_process()._config, "tempdir", raising=False)  # type: ignore[attr-defined]
    with pytest.raises(UsageError, match="set TMPDIR to a folder with a short path"):
        sockets.short_folder_for_sockets()
    assert tempfile.tempdir == str(folder)
