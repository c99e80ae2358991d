"""The commands that a newcomer types, on machines that lack this or that."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.packaging_tests.project import CHECKOUT

SYSTEM_PACKAGES = CHECKOUT / ".ci/debian-packages"


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """What make reads, in a folder without an environment."""
    folder = tmp_path / "a clone"
    (folder / ".ci").mkdir(parents=True)
    for name in ("Makefile", "pyproject.toml", "constraints.txt", ".ci/debian-packages"):
        shutil.copy(CHECKOUT / name, folder / name)
    return folder


def make(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    ours = ("MAKE", "MFLAGS", "PYTHON", "PYTEST")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    return subprocess.run(["make", *words], cwd=folder, capture_output=True, text=True, env=clean)


def bin_folder(folder: Path, *, own: dict[str, str], borrowed: tuple[str, ...] = ()) -> str:
    """A PATH with these scripts and these programs of the machine, and no other."""
    folder.mkdir()
    for name, script in own.items():
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)
    for name in ("sh", "grep", "env", *borrowed):
        found = shutil.which(name)
        assert found is not None
        (folder / name).symlink_to(found)
    return str(folder)


def debian_packages(path: str, *names: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["sh", str(SYSTEM_PACKAGES), *names], env={"PATH": path}, capture_output=True, text=True
    )


def test_demo_installs_and_runs_the_main_job(clone: Path) -> None:
    plan = make(clone, "--dry-run", "demo").stdout.splitlines()
    venv = next(i for i, line in enumerate(plan) if line == "python3 -m venv .venv")
    install = next(i for i, line in enumerate(plan) if "pip install" in line)
    assert venv < install
    assert "-c constraints.txt" in plan[install]
    assert plan[-1] == ".venv/bin/hpo launch --trials 50"


def test_test_installs_and_ends_with_pytest(clone: Path) -> None:
    plan = make(clone, "--dry-run", "test", "PYTHON=python3.12").stdout.splitlines()
    assert "python3.12 -m venv .venv" in plan
    assert any("pip install" in line and ".[test]" in line for line in plan)
    assert any("debian-packages chromium dataset-fashion-mnist" in line for line in plan)
    assert "-m pytest" in plan[-1]


def test_a_second_call_installs_nothing(clone: Path) -> None:
    (clone / ".venv/bin").mkdir(parents=True)
    for name in ("bin/python", "installed", "installed-test"):
        (clone / ".venv" / name).touch()
    assert make(clone, "--dry-run", "demo").stdout == ".venv/bin/hpo launch --trials 50\n"
    assert "pip install" not in make(clone, "--dry-run", "test").stdout
    (clone / "pyproject.toml").touch()
    assert "pip install" in make(clone, "--dry-run", "test").stdout


def test_a_python_that_is_too_old_is_refused_in_one_line(clone: Path, tmp_path: Path) -> None:
    old = tmp_path / "python3.9"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    done = make(clone, "demo", f"PYTHON={old}")
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if not line.startswith("make")]
    assert said == ["hpo needs Python 3.11 or newer; name one: make PYTHON=python3.12 demo"]
    assert not (clone / ".venv").exists()


def test_debian_packages_that_are_there_cost_nothing(tmp_path: Path) -> None:
    path = bin_folder(tmp_path / "bin", own={"chromium": "", "apt-get": "echo called >&2"})
    done = debian_packages(path, "chromium")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_missing_debian_packages_are_installed_one_by_one(tmp_path: Path) -> None:
    calls = tmp_path / "calls"
    record = f'echo "$@" >> "{calls}"'
    path = bin_folder(tmp_path / "bin", own={"apt-get": record, "id": "echo 0", "dpkg-query": ""})
    done = debian_packages(path, "chromium", "some-package")
    assert done.returncode == 0
    update, first, second = calls.read_text().splitlines()
    assert "update" in update
    assert first.endswith("chromium")
    assert second.endswith("some-package")


@pytest.mark.parametrize(
    "own",
    [
        {"id": "echo 0"},
        {"id": "echo 1000", "apt-get": "echo called >&2"},
        {"id": "echo 1000", "apt-get": "echo called >&2", "sudo": "exit 1"},
        {"id": "echo 0", "apt-get": "exit 100"},
    ],
    ids=["no apt", "no rights", "no passwordless sudo", "apt fails"],
)
def test_where_apt_may_not_one_line_says_what_to_install(
    tmp_path: Path, own: dict[str, str]
) -> None:
    path = bin_folder(tmp_path / "bin", own={"dpkg-query": "exit 1", **own})
    done = debian_packages(path, "chromium", "some-package")
    assert done.returncode == 0
    assert done.stdout == ""
    assert done.stderr.splitlines()[-1] == (
        "please install what is missing: apt-get install chromium some-package"
    )
    assert "called" not in done.stderr


def test_the_merge_ends_with_pytests_count_also_when_tests_fail(tmp_path: Path) -> None:
    shutil.copytree(CHECKOUT / ".ci", tmp_path / ".ci")
    asked = f'echo "$@" >> "{tmp_path / "asked"}"; case "$*" in *test)'
    fails = (
        f'{asked} echo "1 failed in 2s"; echo "make: *** [Makefile:1: test] Error 1" >&2; exit 2'
    )
    path = bin_folder(
        tmp_path / "bin", own={"make": f"{fails};; esac"}, borrowed=("bash", "dirname", "sed")
    )
    done = subprocess.run(
        [tmp_path / ".ci/run"], env={"PATH": path}, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert done.stdout.splitlines()[-1] == "1 failed in 2s"
    assert done.stderr == ""
    targets = [line.split()[-1] for line in (tmp_path / "asked").read_text().splitlines()]
    assert targets == ["check", "test"]
