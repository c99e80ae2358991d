"""Networks that kill, hang or raise, workers that can't work, data that take long: by commands."""

import contextlib
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from storage.database import Database
from storage.snapshots import StudySnapshot, snapshot
from storage.studies import find_study
from tests.parts import Hpo

NETWORKS = """
import os, signal, time
import torch
from torch import nn

if os.environ.get("WITHOUT_A_PACKAGE"):
    raise ImportError("No module named 'einops'")

class Net(nn.Module):
    def __init__(self, input_size, num_classes, act):
        super().__init__()
        self.act = act
        self.body = nn.Sequential(nn.Conv2d(input_size[0], 8, 3, padding=1), nn.ReLU(),
                                  nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(8, num_classes)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, images):
        if self.training:
            self.steps += 1  # goes on after a checkpoint
            if int(self.steps) >= 60:
                self.act()
        return self.head(self.body(images))

def killed(input_size, num_classes, dropout):
    return Net(input_size, num_classes, lambda: os.kill(os.getpid(), signal.SIGKILL))

def leaving(input_size, num_classes, dropout):
    return Net(input_size, num_classes, lambda: os._exit(1))

def hanging(input_size, num_classes, dropout):
    return Net(input_size, num_classes, lambda: time.sleep(3600))

def raising(input_size, num_classes, dropout):
    def act():
        raise ValueError("broken at its 60th step")
    return Net(input_size, num_classes, act)

def _well(input_size, num_classes, dropout):
    return Net(input_size, num_classes, lambda: None)

well_1 = well_2 = well_3 = well_4 = well_5 = well_6 = well_7 = _well
"""

DATA = """
import os, time
from pathlib import Path
import torch
from lightning.pytorch import LightningDataModule
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

class Slow(LightningDataModule):
    def setup(self, stage):
        if os.environ.get("WITHOUT_DATA"):
            raise FileNotFoundError("no such file: pictures.bin")
        if os.environ.get("HPO_WORKER_ID"):
            time.sleep(float(os.environ.get("SLOW_SECONDS", "0")))
        found = load_digits()
        images = torch.tensor(found.images / 16, dtype=torch.float32)[:, None]
        self.parts = TensorDataset(images, torch.tensor(found.target))
    def train_dataloader(self):
        return DataLoader(self.parts)
"""


@pytest.fixture
def sick(database_url: str, tmp_path: Path) -> Hpo:
    """The commands, with the networks above where Python finds them."""
    (tmp_path / "ill_networks.py").write_text(NETWORKS)
    (tmp_path / "slow_data.py").write_text(DATA)
    home = tmp_path / "home"
    home.mkdir()
    variables = {
        "HPO_STORAGE": database_url,
        "PYTHONPATH": str(tmp_path),
        "HPO_STALL_SECONDS": "3",
        "HPO_LEASE_SECONDS": "3",
    }
    return Hpo(home, variables)


def trials(hpo: Hpo) -> Any:
    return json.loads(hpo.run("trials", "--json").stdout)


@pytest.mark.parametrize(
    ("network", "reason"),
    [
        ("killed", "killed"),
        ("leaving", "exit code 1"),
        ("hanging", "no optimizer step in 3 s"),
    ],
)
def test_a_trial_that_always_dies_after_a_report_ends_after_three_attempts(
    sick: Hpo, network: str, reason: str
) -> None:
    words = {"killed": "by signal 9 (SIGKILL"}.get(network, reason)
    launched = sick.run(
        "launch", "--backbone", f"ill_networks:{network}", "--trials", "4", "--epochs", "8",
        "--set", "batch_size=64", "--pruner", "none", "--workers", "1",
    )  # fmt: skip
    assert launched.returncode == 6, launched.stderr
    assert words in launched.stderr.splitlines()[-1]
    found = trials(sick)
    assert len(found) >= 3
    for trial in found:
        assert (trial["state"], trial["attempts"]) == ("FAIL", 3 + trials_progress(trial))
        assert trial["steps"][-1] == 12  # the 60th step lies in the fourth epoch
        assert words in trial["reason"]


def trials_progress(trial: Any) -> int:
    """The first attempt reports, so it is not one of the three that come no further."""
    return 1 if trial["steps"] else 0


def test_a_training_that_raises_is_tried_in_a_second_process_and_ends_with_its_reason(
    sick: Hpo,
) -> None:
    launched = sick.run(
        "launch", "--backbone", "ill_networks:raising", "--trials", "4", "--epochs", "8",
        "--set", "batch_size=64", "--workers", "1",
    )  # fmt: skip
    assert launched.returncode == 6, launched.stderr
    last = launched.stderr.splitlines()[-1]
    assert "ValueError: broken at its 60th step" in last
    assert [(trial["state"], trial["attempts"]) for trial in trials(sick)] == [("FAIL", 2)] * 3


def test_one_network_of_eight_that_kills_its_process_does_not_end_the_study(
    sick: Hpo, tmp_path: Path
) -> None:
    space = tmp_path / "space.toml"
    names = ["killed", *(f"well_{number}" for number in range(1, 8))]
    networks = json.dumps([f"ill_networks:{name}" for name in names])
    space.write_text(f"[space]\nbackbone = {networks}\nbatch_size = 64\nepochs = 5\n")
    launched = sick.run(
        "launch", "--space", str(space), "--trials", "8", "--sampler", "random",
        "--pruner", "none", "--seed", "3", "--workers", "2",
    )  # fmt: skip
    assert launched.returncode == 0, launched.stderr
    found = trials(sick)
    failed = [trial for trial in found if trial["state"] == "FAIL"]
    assert sum(trial["state"] == "COMPLETE" for trial in found) == 8
    assert failed
    assert {trial["params"]["backbone"] for trial in failed} == {"ill_networks:killed"}


def until(database: Database, holds: Callable[[StudySnapshot], Any], what: str) -> StudySnapshot:
    """The study when this holds."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        with contextlib.suppress(Exception):
            study = snapshot(database, find_study(database, "study").study_id)
            if holds(study):
                return study
        time.sleep(0.1)
    raise AssertionError(f"never: {what}")


def test_workers_that_can_not_work_leave_with_their_reason_and_fail_no_trial(
    sick: Hpo, database: Database
) -> None:
    launcher = sick.start(
        "launch", "--study", "study", "--backbone", "ill_networks:well_1", "--data",
        "lightning:slow_data:Slow", "--trials", "8", "--epochs", "60", "--pruner", "none",
        "--workers", "1",
    )  # fmt: skip
    until(database, lambda study: any(worker.step for worker in study.workers), "a report")
    join = ("worker", "--study", "study")
    ill = {
        "unknown device 'cuda:7'": start(sick, *join, "--device", "cuda:7"),
        "No module named 'einops'": start(sick, *join, WITHOUT_A_PACKAGE="1"),
        "no such file: pictures.bin": start(sick, *join, WITHOUT_DATA="1"),
    }
    without_disk = start(sick, *join, largest_file=1000)
    codes = {}
    for reason, process in ill.items():
        _, err = process.communicate(timeout=240)
        codes[reason] = process.returncode
        assert reason in err.splitlines()[-1], err
        assert "Traceback" not in err
    assert codes == dict(zip(ill, (2, 2, 5), strict=True))
    shown = json.loads(sick.run("status", "--study", "study", "--json").stdout)
    assert len(shown["sick"]) == 3
    assert all(any(reason in each["reason"] for each in shown["sick"]) for reason in ill)
    text = sick.run("status", "--study", "study").stdout
    assert "einops" in text
    _, err = launcher.communicate(timeout=400)
    without_disk.communicate(timeout=60)
    assert launcher.returncode == 0, err
    found = trials(sick)
    assert [trial["state"] for trial in found] == ["COMPLETE"] * 8


def start(hpo: Hpo, *args: str, largest_file: int | None = None, **variables: str) -> Any:
    """A command in an environment of its own. largest_file: in bytes, as on a full disk."""

    def limit() -> None:
        if largest_file is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))

    return subprocess.Popen(
        [sys.executable, "-P", "-m", "hpo.cli", *args],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **hpo.environment, **variables},
        cwd=hpo.home,
        preexec_fn=limit,
    )


def test_a_worker_is_known_while_its_data_take_longer_to_load_than_a_lease(
    sick: Hpo, database: Database
) -> None:
    slow = Hpo(sick.home, {**sick.variables, "SLOW_SECONDS": "9"})
    launcher = slow.start(
        "launch", "--study", "study", "--backbone", "ill_networks:well_1", "--data",
        "lightning:slow_data:Slow", "--trials", "2", "--epochs", "2", "--workers", "1",
    )  # fmt: skip
    study = until(database, lambda study: study.workers, "a worker that is known")
    (first,) = study.workers
    assert (first.state, first.trial) == ("starting", None)
    later = until(database, lambda study: study.num_finished, "a trial that has ended")
    assert [worker.id for worker in later.workers] in ([], [first.id])
    _, err = launcher.communicate(timeout=240)
    assert launcher.returncode == 0, err
    assert "starting another" not in err
