"""A folder full of modules with the names of real ones: none of its code is run, by no process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.parts import Hpo

MODULES = ("torch", "json", "numpy", "optuna", "pickle", "socket", "typer", "psycopg2", "hpo")
PACKAGES = ("storage", "trainer", "sqlalchemy", "PIL")
START = """import re
import sys
from hpo.__main__ import run
if __name__ == "__main__":
    sys.exit(run())
"""
"""The command as pip installs it."""


def hostile_folder(folder: Path, *, ran: Path, leave_out: tuple[str, ...] = ()) -> Path:
    """Modules and packages, each of which writes a file to `ran` when it is imported."""
    folder.mkdir()
    ran.mkdir()
    places = {name: folder / f"{name}.py" for name in MODULES}
    places |= {name: folder / name / "__init__.py" for name in PACKAGES}
    for name, place in places.items():
        if name not in leave_out:
            place.parent.mkdir(exist_ok=True)
            place.write_text(f"open({str(ran / name)!r}, 'w').close()\n")
    return folder


def command(script: Path, hpo: Hpo, cwd: Path, *args: str) -> str:
    """Run a command in a folder, as a user does by its name; it must end well."""
    done = subprocess.run(
        [sys.executable, str(script), *args],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env=hpo.environment,
        cwd=cwd,
        timeout=120,
    )
    assert done.returncode == 0, (args, done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize("way", ["in the folder", "in the folder, PYTHONPATH with it"])
def test_no_command_and_none_of_its_processes_runs_code_of_the_folder_it_is_started_in(
    way: str, hpo: Hpo, tmp_path: Path
) -> None:
    in_path = way != "in the folder"
    ran = tmp_path / "ran"
    # with PYTHONPATH, Python has decided whose hpo it is before ours is there
    hostile = hostile_folder(tmp_path / "h", ran=ran, leave_out=("hpo",) if in_path else ())
    if in_path:
        hpo = Hpo(hpo.home, {**hpo.variables, "PYTHONPATH": f"{hostile}:"})
    script = tmp_path / "bin" / "hpo"
    script.parent.mkdir()
    script.write_text(START)
    picture = tmp_path / "picture.png"
    Image.new("L", (8, 8)).save(picture)
    out = str(tmp_path / "out")
    command(script, hpo, hostile, "doctor", "--workers", "2", "--epochs", "1")
    command(script, hpo, hostile, "launch", "--trials", "1", "--epochs", "1", "--workers", "1")
    command(script, hpo, hostile, "worker", "--study", "digits", "--device", "cpu")
    command(
        script, hpo, hostile, "best", "--export", "--out", out, "--top-k", "1", "--seeds", "0",
        "--formats", "onnx,torch-export",
    )  # fmt: skip
    command(script, hpo, hostile, "predict", out, str(picture))
    command(script, hpo, hostile, "launch", "--trials", "2", "--workers", "1", "--detach")
    command(script, hpo, hostile, "launch", "--study", "digits", "--workers", "1")
    assert os.listdir(ran) == []
