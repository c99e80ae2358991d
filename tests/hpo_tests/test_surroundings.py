"""Folders, users and variables as machines have them: a command works, or ends with one line."""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from storage.database import Database
from storage.snapshots import snapshot
from storage.studies import find_studies, find_study
from tests.parts import Hpo

SMALL = ("--epochs", "1", "--workers", "1", "--trials", "1")


def test_a_temporary_folder_too_long_for_sockets_does(hpo: Hpo, tmp_path: Path) -> None:
    long = tmp_path / ("x" * 120)
    long.mkdir()
    there = Hpo(hpo.home, {**hpo.variables, "TMPDIR": str(long)})
    done = there.run("launch", *SMALL)
    assert done.returncode == 0, done.stderr
    done = there.run("doctor", "--workers", "2", "--epochs", "1")
    assert done.returncode == 0, done.stdout


def test_a_command_in_a_deleted_folder_is_one_line(hpo: Hpo, tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    command = f"rmdir {gone}; exec {sys.executable} -P -m hpo studies"
    done = subprocess.run(
        ["sh", "-c", command], cwd=gone, capture_output=True, text=True, env=hpo.environment
    )
    assert (done.returncode, done.stderr) == (
        2,
        "hpo: the folder that you stand in was deleted: cd into another\n",
    )


def test_a_search_goes_on_with_new_workers_when_its_folder_is_deleted(
    hpo: Hpo, database: Database, tmp_path: Path
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    there = Hpo(gone, {**hpo.variables, "HPO_HOME": str(hpo.home)})
    launcher = there.start("launch", "--epochs", "8", "--workers", "1", "--trials", "2")
    pid = None
    while pid is None:
        assert launcher.poll() is None
        try:
            workers = snapshot(database, find_study(database, "digits").study_id).workers
            pid = next((each.pid for each in workers if each.step), None)
        except Exception:
            continue
    shutil.rmtree(gone)
    os.kill(pid, signal.SIGKILL)
    out, err = launcher.communicate(timeout=200)
    assert (launcher.returncode, "Traceback" in err) == (0, False), err
    assert "2/2 trials" in out
    assert "starting another" in err


@pytest.mark.parametrize(
    ("variable", "value", "code", "said"),
    [
        ("HPO_LEASE_SECONDS", "x", 2, "HPO_LEASE_SECONDS takes a time above 0"),
        ("HPO_LEASE_SECONDS", "9h", 2, "a lease lasts up to an hour"),
        ("HPO_STALL_SECONDS", "-1", 2, "HPO_STALL_SECONDS takes a time above 0"),
        ("HPO_CHECKPOINTS", "ftp://x", 3, "HPO_CHECKPOINTS"),
        ("HPO_HOME", "~nobody-of-this-name/x", 3, "set it to a full path"),
        ("HPO_HOME", "{file}", 2, "set HPO_HOME to a folder of yours"),
        ("HPO_HOME", "{file}/below", 2, "set HPO_HOME to a folder of yours"),
        ("HPO_STORAGE", "nonsense", 3, "postgresql://"),
    ],
)
def test_a_variable_that_can_t_be_is_one_line(
    variable: str, value: str, code: int, said: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    file = tmp_path / "file"
    file.write_text("")
    given = {variable: value.format(file=file)}
    if variable not in ("HPO_HOME", "HPO_STORAGE"):
        given["HPO_STORAGE"] = request.getfixturevalue("database_url")
    done = Hpo(tmp_path, given).run("launch", *SMALL)
    assert done.returncode == code, done.stderr
    assert re.fullmatch(r"hpo: .*\n", done.stderr)
    assert said in done.stderr


@pytest.mark.parametrize("name", [b"caf\xe9", b"dog"])
def test_a_class_of_latin_1_bytes_is_one_line_before_there_is_a_study_a_file_of_them_works(
    name: bytes, hpo: Hpo, database: Database
) -> None:
    pictures(hpo.home / "pics" / "cat")
    pictures(hpo.home / "pics" / os.fsdecode(name))
    (hpo.home / "pics" / "cat" / "0.png").rename(hpo.home / "pics" / "cat" / "\udce9.png")
    done = hpo.run("launch", "--data", "pics/", *SMALL)
    assert "Traceback" not in done.stderr
    if name == b"dog":
        assert done.returncode == 0, done.stderr
        done = hpo.run("best", "--export", "--top-k", "1", "--seeds", "0", "--formats", "onnx")
        assert done.returncode == 0, done.stderr
        return
    assert done.returncode == 5, done.stderr
    assert "the class name 'caf\\udce9' is no text in UTF-8: give it another" in done.stderr
    assert find_studies(database) == []


def pictures(folder: Path) -> None:
    """Twelve of them, each another."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(len(list(folder.parent.iterdir())))
    for number in range(12):
        pixels = rng.integers(0, 256, (8, 8), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")


def test_a_size_of_the_cache_that_is_none_is_one_line(hpo: Hpo) -> None:
    for name in ("a", "b"):
        pictures(hpo.home / "pics" / name)
    wrong = Hpo(hpo.home, {**hpo.variables, "HPO_CACHE_BYTES": "abc"})
    done = wrong.run("launch", "--data", "pics/", *SMALL)
    assert done.returncode == 5
    assert done.stderr.endswith("hpo: HPO_CACHE_BYTES must be a number of bytes, got 'abc'\n")


def test_cores_that_are_none_end_a_worker_and_fail_no_trial(hpo: Hpo) -> None:
    assert hpo.run("launch", *SMALL).returncode == 0
    wrong = Hpo(hpo.home, {**hpo.variables, "HPO_WORKER_CORES": "x"})
    done = wrong.run("worker", "--study", "digits")
    assert (done.returncode, done.stderr) == (
        2,
        "hpo: HPO_WORKER_CORES must be a whole number >= 1, got 'x'\n",
    )


@pytest.mark.parametrize("option", ["--data", "--weights"])
def test_the_home_of_a_user_who_is_not_there_is_one_line(option: str, hpo: Hpo) -> None:
    done = hpo.run("launch", option, "~nobody-of-this-name/x", *SMALL)
    assert done.returncode in (2, 5)
    assert re.fullmatch(r"hpo: .*~nobody-of-this-name/x.*\n", done.stderr)
