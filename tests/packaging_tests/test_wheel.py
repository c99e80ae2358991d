"""What `pip install` brings: the wheel in an environment of its own, away from the checkout."""

import os
import re
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from tests.packaging_tests.project import CHECKOUT, PACKAGES, pyproject


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", out, cwd=CHECKOUT)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of a fresh environment with our wheel in it.

    The dependencies are those of the environment that runs the tests, by a .pth file: torch alone
    would take minutes to install.
    """
    folder = tmp_path_factory.mktemp("fresh") / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    python = folder / "bin/python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps",
        "--no-index", "--disable-pip-version-check", wheel)  # fmt: skip
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    return folder / "bin"


def run(*command: str | Path, cwd: Path | None = None) -> str:
    """Its output. Neither the checkout nor the caller's settings are in sight."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, env=clean, cwd=cwd
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_wheel_holds_all_of_the_three_packages_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    written = {
        str(path.relative_to(CHECKOUT))
        for package in PACKAGES
        for path in (CHECKOUT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert packed == written
    assert {name.partition("/")[0] for name in packed} == set(PACKAGES)
    assert {f"{package}/py.typed" for package in PACKAGES} <= packed  # `Typing :: Typed`


def test_the_wheel_imports_from_outside_the_checkout(installed: Path, tmp_path: Path) -> None:
    lines = "; ".join(f"import {name}; print({name}.__file__)" for name in PACKAGES)
    found = run(installed / "python", "-W", "error", "-c", lines, cwd=tmp_path).split()
    assert len(found) == len(PACKAGES)
    for file in found:
        assert Path(file).is_relative_to(installed.parent)


def test_every_module_of_the_wheel_imports(installed: Path, tmp_path: Path) -> None:
    modules = [
        ".".join(path.relative_to(CHECKOUT).with_suffix("").parts).removesuffix(".__init__")
        for package in PACKAGES
        for path in (CHECKOUT / package).rglob("*.py")
        # a script, run by its path
        if path.name != "embedded_guard.py"
    ]
    lines = f"import importlib\nfor name in {modules!r}: importlib.import_module(name)"
    assert run(installed / "python", "-c", lines, cwd=tmp_path) == ""


def test_the_installed_command_says_its_help_and_version(installed: Path, tmp_path: Path) -> None:
    assert "launch" in run(installed / "hpo", "--help", cwd=tmp_path)
    version = pyproject()["project"]["version"]
    assert re.search(
        rf"\b{re.escape(version)}\b", run(installed / "hpo", "--version", cwd=tmp_path)
    )
