"""Studies whose trials start from weights."""

import json
import shutil
from pathlib import Path

import pytest

from tests.parts import Hpo

QUICK = ("--trials", "2", "--workers", "1", "--epochs", "1")


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of a study that has been, by the product's own commands."""
    home = tmp_path_factory.mktemp("earlier")
    earlier = Hpo(home)
    done = earlier.run("launch", *QUICK, "--backbone", "smallcnn", "--study", "earlier")
    assert done.returncode == 0, done.stderr
    out = home / "export"
    quick = ("--top-k", "1", "--seeds", "0", "--formats", "safetensors,onnx")
    done = earlier.run("best", "--export", "--out", str(out), *quick)
    assert done.returncode == 0, done.stderr
    return out


def test_a_study_starts_from_an_export_and_exports_in_its_turn(
    export: Path, tmp_path: Path
) -> None:
    hpo = Hpo(tmp_path)
    space = tmp_path / "space.toml"
    space.write_text('[space]\ntrainable = "head"\nhead_hidden = [0, 16]\n')
    launched = hpo.run("launch", *QUICK, "--weights", str(export), "--space", str(space))
    assert launched.returncode == 0, launched.stderr
    trials = json.loads(hpo.run("trials", "--json").stdout)
    assert {trial["params"]["backbone"] for trial in trials} == {"smallcnn"}
    assert {trial["state"] for trial in trials} <= {"COMPLETE", "PRUNED"}
    out = tmp_path / "next"
    quick = ("--top-k", "1", "--seeds", "0", "--formats", "safetensors,onnx")
    done = hpo.run("best", "--export", "--out", str(out), *quick)
    assert done.returncode == 0, done.stderr
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["config"]["weights"] == export.name
    assert manifest["config"]["trainable"] == "head"
    # the frozen layers are those of the first export, and are fed as they were there
    import safetensors.torch
    import torch

    first, second = (safetensors.torch.load_file(f / "model.safetensors") for f in (export, out))
    for name in ("mean", "std", "backbone.0.weight", "backbone.9.running_var"):
        assert torch.equal(first[name], second[name])
    assert not torch.equal(
        *(tensors.get("backbone.14.weight", torch.zeros(1)) for tensors in (first, second))
    )


def test_weights_that_changed_meanwhile_are_refused(export: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(export, copy)
    (tmp_path / "home").mkdir()
    hpo = Hpo(tmp_path / "home")
    assert hpo.run("launch", *QUICK, "--weights", str(copy)).returncode == 0
    with (copy / "model.safetensors").open("ab") as file:
        file.write(b"more")
    worker = hpo.run("worker", "--study", "digits")
    assert worker.returncode == 2
    assert worker.stderr == (f"hpo: weights {copy} are not those that the study was made with\n")
    other = hpo.run("launch", "--study", "digits", "--weights", str(export))
    assert other.returncode == 2
    assert "weights is" in other.stderr


def test_weights_that_can_t_be_used_are_one_line_before_a_study_is_made(
    export: Path, tmp_path: Path
) -> None:
    hpo = Hpo(tmp_path)
    for arguments, said in (
        (("--weights", str(tmp_path / "nothing")), "can't be read: No such file"),
        (("--weights", str(export), "--backbone", "resnet8"), "is of another network"),
    ):
        done = hpo.run("launch", *QUICK, *arguments)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert said in done.stderr
    assert json.loads(hpo.run("studies", "--json").stdout) == []
