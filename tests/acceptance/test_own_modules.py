"""Networks of the user's own are found where the user stands, and by the study from then on."""

import json
import os
from pathlib import Path

from hpo.own_modules import find_own_folders
from storage.database import Database
from storage.studies import find_study
from tests.parts import Hpo

NETWORK = """
from torch import nn

from {package}.layers import Linear

def make(input_size, num_classes, dropout):
    return nn.Sequential(nn.Flatten(), Linear(64, num_classes))
"""


def own_package(folder: Path, package: str) -> Path:
    """A package with a function that makes a network, and a torch.py beside it, which is not it."""
    (folder / package).mkdir(parents=True)
    (folder / package / "__init__.py").write_text("")
    (folder / package / "nets.py").write_text(NETWORK.format(package=package))
    (folder / package / "layers.py").write_text("from torch.nn import Linear\n")
    (folder / "torch.py").write_text("raise SystemExit('not this one')\n")
    return folder


def test_a_network_of_the_current_folder_is_found_by_workers_and_commands_started_elsewhere(
    database: Database, hpo: Hpo, tmp_path: Path
) -> None:
    folder = own_package(tmp_path / "theirs", "my_nets")
    small = ("--epochs", "1", "--workers", "1")
    launch = ("launch", "--backbone", "my_nets.nets:make", *small)
    done = Hpo(folder, {**hpo.variables, "HPO_HOME": str(hpo.home)}).run(*launch, "--trials", "1")
    assert done.returncode == 0, done.stderr
    assert find_study(database, "digits").spec["import_paths"] == [str(folder)]
    for command in (
        (*launch, "--trials", "2"),
        ("worker", "--study", "digits", "--device", "cpu"),
        ("replay", "--trial", "0"),
        ("best", "--export", "--top-k", "1", "--seeds", "0", "--formats", "onnx"),
    ):
        done = hpo.run(*command)
        assert done.returncode == 0, (command, done.stderr)


def test_a_network_in_pythonpath_is_kept_too_and_an_installed_one_needs_no_folder(
    database: Database, hpo: Hpo, tmp_path: Path
) -> None:
    folder = own_package(tmp_path / "theirs", "my_nets")
    with_path = Hpo(hpo.home, {**hpo.variables, "PYTHONPATH": str(folder)})
    small = ("--trials", "1", "--epochs", "1", "--workers", "1")
    done = with_path.run("launch", "--backbone", "my_nets.nets:make,resnet8", *small)
    assert done.returncode == 0, done.stderr
    assert find_study(database, "digits").spec["import_paths"] == [str(folder)]
    assert find_own_folders(["torchvision.models:resnet18", "timm:resnet18", "resnet8"]) == ()


def test_a_network_that_is_nowhere_is_refused_in_a_line(hpo: Hpo) -> None:
    done = hpo.run("launch", "--backbone", "my_nets.nets:make")
    assert done.returncode == 2
    assert done.stderr == (
        "hpo: backbone my_nets.nets:make: ModuleNotFoundError: No module named 'my_nets'; "
        "launch in its folder, or put that into PYTHONPATH\n"
    )


def test_the_weights_of_an_export_do_not_decide_what_code_is_run(hpo: Hpo, tmp_path: Path) -> None:
    own_package(hpo.home, "my_nets")
    export = tmp_path / "export"
    export.mkdir()
    (export / "model.safetensors").write_bytes(b"\2\0\0\0\0\0\0\0{}")
    for name, option in (("my_nets.nets:make", "--backbone"), ("lightning:a:B", "--module")):
        (export / "manifest.json").write_text(json.dumps({"config": {"backbone": name}}))
        (hpo.home / "my_nets" / "__init__.py").write_text("open('ran', 'w').close()\n")
        done = hpo.run("launch", "--weights", str(export))
        assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
        assert f"{option} {name.removeprefix('lightning:')!r}" in done.stderr
    assert not os.path.exists(hpo.home / "ran")
