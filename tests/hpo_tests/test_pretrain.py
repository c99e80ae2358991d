"""hpo pretrain, as a user runs it."""

import json
import os
import re
import signal
from pathlib import Path

import pytest

from tests.parts import Hpo

QUICK = ("--backbone", "smallcnn", "--epochs", "4")


def test_a_pretraining_that_was_killed_goes_on_and_a_study_starts_from_it(tmp_path: Path) -> None:
    hpo = Hpo(tmp_path)
    out = tmp_path / "weights"
    process = hpo.start("pretrain", *QUICK, "--out", str(out))
    assert process.stderr is not None
    while "epoch 2 of 4" not in process.stderr.readline():
        assert process.poll() is None
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.communicate()
    assert not out.exists()
    again = hpo.run("pretrain", *QUICK, "--out", str(out), "--json")
    assert again.returncode == 0, again.stderr
    assert again.stderr.startswith("going on where an earlier pretraining was cut\nepoch ")
    assert "epoch 1 of 4" not in again.stderr
    manifest = json.loads(again.stdout)
    assert manifest["data"]["images"] == 1438  # train and validation, not the test split
    assert {path.name for path in out.iterdir()} == {"manifest.json", "model.safetensors"}
    assert list((tmp_path / "checkpoints").glob("*/*/*/*.ckpt")) == []
    quick = ("--trials", "1", "--epochs", "1", "--workers", "1")
    launched = hpo.run("launch", "--weights", str(out), *quick)
    assert launched.returncode == 0, launched.stderr
    (trial,) = json.loads(hpo.run("trials", "--json").stdout)
    assert trial["params"]["backbone"] == "smallcnn"


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("--method", "byol"), 2, "unknown method 'byol'"),
        (("--backbone", "resnet19"), 2, "did you mean resnet18"),
        (("--epochs", "0"), 2, "epochs must be >= 1"),
        (("--data", "nothing"), 5, "nothing"),
        (("--device", "cuda:7"), 2, "cuda:7"),
    ],
)
def test_what_can_t_be_pretrained_is_one_line(
    arguments: tuple[str, ...], code: int, said: str, tmp_path: Path
) -> None:
    done = Hpo(tmp_path).run("pretrain", *arguments, "--out", str(tmp_path / "out"))
    assert done.returncode == code, done.stderr
    assert re.fullmatch(r"hpo: .*\n", done.stderr)
    assert said in done.stderr


def test_a_folder_that_holds_something_else_is_refused_before_anything_is_learnt(
    tmp_path: Path,
) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    done = Hpo(tmp_path).run("pretrain", *QUICK, "--out", str(tmp_path))
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
