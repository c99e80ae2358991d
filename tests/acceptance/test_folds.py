"""K-fold validation through the commands, with a worker killed."""

import json
import os
import signal
import time
from pathlib import Path

from tests.parts import Hpo


def pid_of_a_worker_with_a_checkpoint(hpo: Hpo) -> int:
    """Looks for the file, since each `hpo status` takes a core for a second."""
    deadline = time.monotonic() + 120
    while not list((hpo.home / "checkpoints").rglob("*.ckpt")):
        assert time.monotonic() < deadline, "no worker has reported"
        time.sleep(0.1)
    (worker,) = json.loads(hpo.run("status", "--json").stdout)["workers"]
    return int(worker["pid"])


def test_a_folded_study_loses_nothing_to_a_kill_and_keeps_its_folds(short_folder: Path) -> None:
    home = short_folder / "folds"
    home.mkdir()
    hpo = Hpo(home)
    assert "HPO_STORAGE" not in hpo.environment
    usual = ("--trials", "1", "--epochs", "10", "--backbone", "resnet8", "--workers", "1")
    launcher = hpo.start("launch", "--folds", "3", *usual)
    os.kill(pid_of_a_worker_with_a_checkpoint(hpo), signal.SIGKILL)
    _, err = launcher.communicate(timeout=400)
    assert launcher.returncode == 0, err
    found = json.loads(hpo.run("trials", "--json").stdout)
    assert [(trial["state"], trial["attempts"]) for trial in found] == [("COMPLETE", 2)]

    # in one go it comes to the same values, so the kill changed nothing
    again = hpo.run("replay", "--trial", "0", "--epochs", "6", "--json")
    assert again.returncode == 0, again.stdout + again.stderr
    replayed = json.loads(again.stdout)
    assert replayed["steps"] == [1, 4, 8, 12, 16, 20, 24] == found[0]["steps"][:7]
    assert replayed["replayed"] == found[0]["values"][:7]

    done = hpo.run("launch", "--folds", "4")
    assert done.returncode == 2
    assert "folds is 3 there and 4 here" in done.stderr
