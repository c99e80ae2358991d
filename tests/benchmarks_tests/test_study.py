"""That the comparison compares: the same work, counted alike, read alike."""

import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.peers.training import Witness
from benchmarks.study import (
    ARMS,
    BATCHES,
    KINDS,
    command_of,
    ended_with,
    first_images,
    points,
    run,
    summary,
)
from benchmarks.study_report import best_at, profile, report, seconds_until
from trainer.config import TrainConfig
from trainer.data.fashion_mnist import _read
from trainer.data.registry import load
from trainer.flops import training_flops


def test_all_arms_are_given_the_same_configurations() -> None:
    assert points() == points()
    assert len(points()) == KINDS["equal"]["num_trials"]
    assert {point["batch_size"] for point in points()} == set(BATCHES)


def test_the_first_images_are_those_of_the_data_set(tmp_path: Path) -> None:
    root = first_images(tmp_path, 50)
    split = _read(root / "FashionMNIST" / "raw", "train")
    whole = load("fashion-mnist", seed=0)
    assert len(split) == 50
    assert len(_read(root / "FashionMNIST" / "raw", "t10k")) == len(whole.open_test())


def task(**fields: Any) -> dict[str, Any]:
    return {"num_train": 900, "epochs": 2, **fields}


def test_an_arm_is_counted_by_its_reports() -> None:
    common = {"batch_size": 64, "backbone": "smallcnn", "lr": 0.1}
    lines = [
        {"at": 103.0, "trial": "0", "epoch": 1, "value": 0.5, **common},
        {"at": 109.0, "trial": "1", "epoch": 1, "value": 0.4, **common},
        {"at": 106.0, "trial": "0", "epoch": 2, "value": 0.75, **common},
    ]
    found = summary(lines, task(), 10.0, 100.0)
    assert (found["num_trials"], found["num_whole"]) == (2, 1)
    assert found["optimizer_steps"] == 3 * 15  # 900 images by 64, and a part of a batch
    assert found["images_per_second"] == 270.0
    assert found["curve"] == [(3.0, 0.5), (6.0, 0.75)]
    assert found["flops"] == 2700 * training_flops(
        TrainConfig(backbone="smallcnn"), input_size=(1, 28, 28), num_classes=10
    )
    assert found["peak_flops"] > 1e9


def test_the_table_says_how_many_times_longer_an_arm_took_in_the_same_round(
    tmp_path: Path,
) -> None:
    def row(seconds: float, best: float) -> dict[str, Any]:
        return {"seconds": seconds, "num_trials": 12, "num_whole": 12, "optimizer_steps": 100,
                "images_per_second": 1.0, "trials_per_hour": 1.0, "mean_value": 0.8,
                "flops": 60.0, "peak_flops": seconds / 2, "best": best,
                "curve": [[seconds / 4, 0.7], [seconds / 2, best]]}  # fmt: skip

    rounds = [{"hpo": row(10, 0.9), "ray tune": row(30, 0.8)},
              {"hpo": row(20, 0.9), "ray tune": row(80, 0.8)}]  # fmt: skip
    part = {"machine": {"cores": 2, "cpu": "x", "torch": "y"}, "images": 10, "rounds": rounds}
    path = tmp_path / "study.json"
    path.write_text(json.dumps({"equal": part}))
    text = report(path)
    assert "| ray tune | 55.0 +- 35.4 | 3.50 +- 0.71 |" in text
    # 60 operations in 80 s, where two cores could have done 2 * 40 a second
    assert "| 1.7 +- 1.1 | 0.8000 +- 0.0000 | 100 |" in text
    # both reach 0.8: hpo with its second report after half of its time
    path.write_text(json.dumps({"pruned": part}))
    assert "| ray tune | 55 +- 35 | 12, 12 | 27.5 +- 17.7 | 3.50 +- 0.71 |" in report(path)
    assert (tmp_path / "study-pruned.png").stat().st_size > 0


def test_the_profile_of_a_study_adds_up_to_its_seconds() -> None:
    spent = [{"worker": "a", "num_trials": 2, "training": 6.0, "evaluation": 2.0},
             {"worker": "b", "num_trials": 1, "training": 4.0, "evaluation": 2.0}]  # fmt: skip
    text = profile([{"seconds": 10.0, "spent": spent}, {"seconds": 9.0}])
    assert "| training | 5.00 +- 1.41 | 50.0 |" in text
    assert "| evaluation | 2.00 +- 0.00 | 20.0 |" in text
    assert "| start and end of the command | 3.00 +- 1.41 | 30.0 |" in text
    assert profile([{"seconds": 9.0}]) == ""


def test_a_curve_is_read_at_a_value_and_at_a_time() -> None:
    curve = [(1.0, 0.5), (4.0, 0.75)]
    assert (seconds_until(curve, 0.5), seconds_until(curve, 0.6)) == (1.0, 4.0)
    assert (best_at(curve, 0.5), best_at(curve, 3.9), best_at(curve, 4.0)) == (0.0, 0.5, 0.75)


def test_a_number_of_workers_is_an_arm(tmp_path: Path) -> None:
    given = {**KINDS["equal"], "seed": 0}
    command = command_of("hpo, 3 workers")(given, tmp_path)
    assert command[command.index("--workers") + 1] == "3"
    with pytest.raises(KeyError):
        command_of("another")


def test_the_witness_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "witness.jsonl"
    Witness(str(path)).note("a_0", 1, 0.5, {"lr": 0.1})
    (line,) = map(json.loads, path.read_text().splitlines())
    assert (line["trial"], line["epoch"], line["value"], line["lr"]) == ("a_0", 1, 0.5, 0.1)


def test_each_arm_that_is_installed_does_the_same_number_of_steps() -> None:
    arms = [arm for arm in ARMS if arm in ("hpo", "tutorial, a process a core")]
    found = [run(arm, KINDS["equal"], 0, 400) for arm in arms]
    assert len({row["optimizer_steps"] for row in found}) == 1
    assert {row["num_whole"] for row in found} == {12}
    assert sum(row["num_trials"] for row in found[0]["spent"]) == 12
    assert all(len(row["curve"]) >= 1 and row["curve"][-1][0] <= row["seconds"] for row in found)


def test_an_arm_that_takes_too_long_is_broken_off_with_all_of_its_processes(
    tmp_path: Path,
) -> None:
    child = f"import time; time.sleep(300)  # of {tmp_path}"
    waits = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    fails = [sys.executable, "-c", "raise SystemExit(3)"]
    with (tmp_path / "output").open("wb") as output:
        assert ended_with([sys.executable, "-c", waits], os.environ, output, 1) is None
        assert ended_with(fails, os.environ, output, 60) == 3
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            assert child.encode() not in process.read_bytes()
