"""Where Python looks for modules in processes of ours."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = str(Path(__file__).parents[2])
ISOLATE = "import sys; from hpo.import_path import isolate; isolate(); "


def shown(tmp_path: Path, program: str, *flags: str, **variables: str) -> list[str]:
    """The lines that a program prints, started in tmp_path."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, *flags, "-c", program],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**environment, **variables},
        check=True,
    )
    return done.stdout.splitlines()


def test_the_folders_of_pythonpath_come_last_and_the_current_one_not_at_all(tmp_path: Path) -> None:
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    program = ISOLATE + "print(*sys.path, sep='\\n')"
    found = shown(tmp_path, program, PYTHONPATH=f"{one}::{two}:{ROOT}")
    assert found[-2:] == [one, two]
    assert str(tmp_path) not in found
    assert "" not in found
    standard = os.path.dirname(os.__file__)
    assert found.index(standard) < found.index(ROOT) < found.index(one)
    assert found.count(ROOT) == 1


def test_processes_begin_without_them_and_are_given_them_last(tmp_path: Path) -> None:
    theirs = str(tmp_path / "theirs")
    child = "import sys; print(*sys.path, sep='|'); "
    child += "from hpo.import_path import isolate; isolate(); print(*sys.path, sep='|')"
    program = ISOLATE + f"import subprocess; subprocess.run([sys.executable, '-c', {child!r}])"
    begun, given = shown(tmp_path, program, PYTHONPATH=f"{theirs}:{ROOT}")
    assert not {theirs, "", str(tmp_path)} & set(begun.split("|"))
    assert given.split("|")[-1] == theirs


def test_packages_that_pythonpath_repeats_stay_where_they_are(tmp_path: Path) -> None:
    packages = next(entry for entry in sys.path if entry.endswith("site-packages"))
    program = ISOLATE + "print(*sys.path, sep='\\n')"
    found = shown(tmp_path, program, PYTHONPATH=f"{tmp_path}:{packages}")
    assert found[-1] == str(tmp_path)
    assert packages in found


def test_twice_is_as_once(tmp_path: Path) -> None:
    program = ISOLATE + "once = list(sys.path); isolate(); print(once == sys.path)"
    assert shown(tmp_path, program, PYTHONPATH=str(tmp_path)) == ["True"]
    assert shown(tmp_path, program, "-P") == ["True"]


@pytest.mark.parametrize("pythonpath", ["", "."])
def test_processes_that_decode_pictures_run_no_code_of_the_folder_they_are_started_in(
    tmp_path: Path, pythonpath: str
) -> None:
    for name in ("pickle", "PIL", "numpy", "signal"):
        (tmp_path / f"{name}.py").write_text(f"open('ran {name}', 'w').close()\n")
    Image.new("L", (8, 8)).save(tmp_path / "picture.png")
    program = (
        "from hpo.import_path import isolate\n"
        "isolate()\n"
        "import pathlib\n"
        "import trainer.data.decoding as decoding\n"
        "decoding.num_cores = lambda: 2\n"
        "if __name__ == '__main__':\n"
        "    with decoding.decoders() as pool:\n"
        "        paths = [pathlib.Path('picture.png')] * 40\n"
        "        found = list(pool.map(decoding.look_at_header, paths, num_bytes=2**27,\n"
        "                              progress=lambda done, total: None))\n"
        "    print(len(found), {header.reason for header in found}, pool._pool is not None)\n"
    )
    assert shown(tmp_path, program, PYTHONPATH=pythonpath) == ["40 {None} True"]
    assert list(tmp_path.glob("ran *")) == []
