"""hpo pretrain, as a user runs it."""

import json
import os
import re
import signal
from pathlib import Path

import pytest

from storage.checkpoints import TrialCheckpoints
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


def test_a_checkpoint_of_another_version_is_one_line_with_the_way_out(tmp_path: Path) -> None:
    hpo, out = Hpo(tmp_path), str(tmp_path / "weights")
    process = hpo.start("pretrain", *QUICK, "--out", out)
    assert process.stderr is not None
    while "epoch 2 of 4" not in process.stderr.readline():
        assert process.poll() is None
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    (trial,) = (tmp_path / "checkpoints").glob("*/0")
    earlier = TrialCheckpoints(
        tmp_path / "checkpoints", study_key=int(trial.parent.name), trial_number=0, token=2**62
    )
    earlier.take_over()
    earlier.save(99, b"of another version")
    (trial / str(2**62)).rename(trial / "1")
    done = hpo.run("pretrain", *QUICK, "--out", out)
    assert (done.returncode, done.stderr) == (
        1,
        "going on where an earlier pretraining was cut\nhpo: the checkpoint can't be read: it is "
        "broken: another --seed begins a new one\n",
    )


def test_a_home_that_is_a_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    hpo = Hpo(tmp_path, {"HPO_HOME": str(tmp_path / "file")})
    done = hpo.run("pretrain", *QUICK, "--out", str(tmp_path / "out"))
    assert done.returncode == 2
    assert re.fullmatch(r"hpo: no checkpoints can be kept: .*; set HPO_.*\n", done.stderr)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("--method", "byol"), 2, "unknown method 'byol'"),
        (("--backbone", "resnet19"), 2, "did you mean resnet18"),
        (("--epochs", "0"), 2, "epochs must be >= 1"),
        (("--data", "nothing"), 5, "nothing"),
        (("--device", "cuda:7"), 2, "cuda:7"),
        (("--lr", "1e30", "--epochs", "1"), 1, "the loss is nan after 1 epochs (lr 1e+30): give a"),
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
