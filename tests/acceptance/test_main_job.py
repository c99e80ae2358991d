"""From nothing to an exported, tested model, by the commands alone."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image

from storage.database import Database
from tests.parts import PASSWORD, Hpo, TcpPostgres
from trainer.data.registry import load

QUICK = ("--backbone", "smallcnn", "--epochs", "2")
"""Trials of a second or less."""
SLOW = ("--backbone", "resnet20", "--epochs", "12")
"""Trials of ten seconds or more."""


def ended(done: subprocess.CompletedProcess[str]) -> subprocess.CompletedProcess[str]:
    assert done.returncode == 0, done.stderr
    return done


def status(hpo: Hpo, *args: str) -> Any:
    return json.loads(ended(hpo.run("status", "--json", *args)).stdout)


def trials(hpo: Hpo, *args: str) -> Any:
    return json.loads(ended(hpo.run("trials", "--json", *args)).stdout)


def wait_until(hpo: Hpo, holds: Any, *, seconds: float = 120) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = trials(hpo)
        if holds(found):
            return found
        time.sleep(0.3)
    raise AssertionError(f"not within {seconds} s: {found}")


def check_export(folder: Path, printed: Any) -> None:
    """Each file gives the stated accuracy on the test images, by a runtime of its own."""
    manifest = json.loads((folder / "manifest.json").read_text())
    test = load("digits", seed=0).open_test()
    labels = test.labels.numpy()
    session = onnxruntime.InferenceSession(folder / manifest["formats"]["onnx"]["file"])
    (logits,) = session.run(None, {session.get_inputs()[0].name: test.images.numpy()})[:1]
    script = torch.jit.load(  # type: ignore[no-untyped-call]
        folder / manifest["formats"]["torchscript"]["file"]
    )
    for found in (np.asarray(logits), script(test.images).detach().numpy()):
        accuracy = float((found.argmax(1) == labels).mean())
        assert accuracy == pytest.approx(printed["test"]["accuracy"], abs=1e-9)
    assert {"torchscript", "onnx", "torch-export", "safetensors"} <= set(manifest["formats"])
    assert {"onnx-fp16", "onnx-int8"} <= {*manifest["formats"], *manifest["refused"]}
    metrics = json.loads((folder / "metrics.json").read_text())
    assert sum(map(sum, metrics["test"]["confusion_matrix"])) == len(test)
    with Image.open(folder / "confusion_matrix.png") as picture:
        assert picture.size[0] > 300


@pytest.mark.filterwarnings("ignore:.*torch.jit.load.*:FutureWarning")
def test_a_study_ends_with_an_export_that_classifies_pictures(hpo: Hpo, tmp_path: Path) -> None:
    launched = ended(hpo.run("launch", "--trials", "12", "--epochs", "8", "--json"))
    found = json.loads(launched.stdout)
    assert found["complete"] + found["pruned"] == found["budget"] == 12
    assert found["pruned"] > 0
    assert (found["running"], found["waiting"], found["workers"]) == (0, 0, [])
    assert status(hpo) == found
    for trial in trials(hpo):
        assert trial["attempts"] == 1
        assert len(trial["steps"]) == len(trial["values"]) > 0
        assert trial["value"] == trial["values"][-1]
        assert "saved" in trial["reason"] or "trained for" in trial["reason"]
    known = json.loads(ended(hpo.run("best", "--json")).stdout)
    assert (known["test"], known["export"]) == (None, None)
    assert known["trial"] == found["best"]

    out = tmp_path / "out"
    best = json.loads(ended(hpo.run("best", "--export", "--out", str(out), "--json")).stdout)
    low, high = best["test"]["ci95"]
    assert low < best["test"]["accuracy"] <= high <= 1  # all 359 may be right
    check_export(out, best)
    test = load("digits", seed=0).open_test()
    for index in range(10):
        picture = Image.fromarray(test.images[index, 0].numpy())
        picture.save(tmp_path / f"{index}.png")
    files = [str(tmp_path / f"{index}.png") for index in range(10)]
    predicted = json.loads(ended(hpo.run("predict", str(out), *files, "--json")).stdout)
    hits = [row["class"] == str(int(test.labels[i])) for i, row in enumerate(predicted)]
    assert sum(hits) >= 8
    (tmp_path / "no.png").write_text("no picture")
    refused = hpo.run("predict", str(out), str(tmp_path / "no.png"))
    assert refused.returncode == 5
    assert len(refused.stderr.strip().splitlines()) == 1

    # the same command again has nothing to do; a larger budget goes on
    assert ended(hpo.run("launch", "--trials", "12")).stdout.startswith("digits: 12/12 trials")
    assert ended(hpo.run("launch", "--trials", "13")).stdout.startswith("digits: 13/13 trials")
    again = ended(hpo.run("best", "--export", "--out", str(out)))
    assert "has been opened 2 times" in again.stdout


def test_an_export_folder_that_can_not_be_written_is_refused_before_training(
    hpo: Hpo, tmp_path: Path
) -> None:
    ended(hpo.run("launch", "--trials", "1", *QUICK))
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/hpo")):
        done = hpo.run("best", "--export", "--out", str(out))
        assert done.returncode == 2
        assert len(done.stderr.strip().splitlines()) == 1
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "thesis.txt").write_text("precious")
    assert hpo.run("best", "--export", "--out", str(tmp_path / "theirs")).returncode == 2
    assert (tmp_path / "theirs" / "thesis.txt").read_text() == "precious"
    database = Database(hpo.environment["HPO_STORAGE"])
    with database.engine.connect() as connection:
        names = connection.exec_driver_sql("SELECT study_name FROM studies").scalars().all()
    database.engine.dispose()
    assert names == ["digits"], "a study of re-checks has begun"


def test_eight_workers_from_an_empty_database_make_the_budget_exactly(
    empty_url: str, tmp_path: Path
) -> None:
    hpo = Hpo(tmp_path, {"HPO_STORAGE": empty_url})
    done = ended(hpo.run("launch", "--trials", "50", "--workers", "8", *QUICK, timeout=500))
    assert done.stdout.startswith("digits: 50/50 trials")
    found = trials(hpo)
    assert len(found) == 50
    assert {trial["state"] for trial in found} <= {"COMPLETE", "PRUNED"}
    assert [trial["number"] for trial in found] == list(range(50))


def busy_worker(hpo: Hpo) -> dict[str, Any]:
    """A worker whose trial has a report, and a checkpoint therefore."""
    for _ in range(300):
        shown = hpo.run("status", "--json")  # there may be no study yet
        for worker in json.loads(shown.stdout)["workers"] if shown.returncode == 0 else []:
            if worker["trial"] is not None and worker["epoch"] > 0:
                return dict(worker)
        time.sleep(0.3)
    raise AssertionError("no worker has reported")


def test_a_killed_worker_loses_no_trial(tcp_postgres: TcpPostgres, tmp_path: Path) -> None:
    hpo = Hpo(tmp_path, {"HPO_STORAGE": tcp_postgres.url})
    launcher = hpo.start("launch", "--trials", "2", *SLOW)
    victim = busy_worker(hpo)
    os.kill(victim["pid"], signal.SIGKILL)
    out, err = launcher.communicate(timeout=400)
    assert launcher.returncode == 0, err
    found = trials(hpo)
    assert len(found) == 2
    assert {trial["state"] for trial in found} <= {"COMPLETE", "PRUNED"}
    taken_over = found[victim["trial"]]
    assert taken_over["attempts"] == 2
    assert taken_over["steps"] == sorted(set(taken_over["steps"]))
    logs = "".join(path.read_text() for path in (tmp_path / "logs").rglob("*.log"))
    assert PASSWORD not in out + err + logs


def test_an_interrupted_launch_says_how_to_go_on_and_does(hpo: Hpo) -> None:
    launcher = hpo.start("launch", "--trials", "2", *SLOW)
    number = busy_worker(hpo)["trial"]
    before = trials(hpo)[number]
    started = time.monotonic()
    launcher.send_signal(signal.SIGINT)
    _, err = launcher.communicate(timeout=60)
    assert launcher.returncode == 130
    assert time.monotonic() - started < 12
    assert "go on with: hpo launch --study digits" in err
    stopped = status(hpo)
    assert (stopped["running"], stopped["workers"]) == (0, [])
    assert stopped["waiting"] >= 1
    assert ended(hpo.run("launch", timeout=400)).stdout.startswith("digits: 2/2 trials")
    after = trials(hpo)[number]
    assert after["attempts"] == 2
    assert after["params"] == before["params"]
    assert after["values"][: len(before["values"])] == before["values"]


def test_a_stopped_study_lets_its_launcher_end_and_can_go_on(hpo: Hpo) -> None:
    detached = ended(hpo.run("launch", "--trials", "3", "--detach", *SLOW))
    assert "runs in the background" in detached.stderr
    busy_worker(hpo)
    told = ended(hpo.run("stop"))
    assert "go on with: hpo launch --study digits" in told.stdout
    deadline = time.monotonic() + 60
    while status(hpo)["workers"]:
        assert time.monotonic() < deadline
        time.sleep(0.5)
    found = status(hpo)
    assert found["running"] == 0
    assert found["waiting"] >= 1


def test_without_a_url_everything_runs_on_the_embedded_server(short_folder: Path) -> None:
    home = short_folder / "a home"
    home.mkdir()
    hpo = Hpo(home)
    environment = hpo.environment
    assert "HPO_STORAGE" not in environment
    assert ended(hpo.run("launch", "--trials", "2", *QUICK)).stdout.startswith("digits: 2/2")
    assert status(hpo)["budget"] == 2
    time.sleep(8)
    assert not (home / "postgres" / "data" / "postmaster.pid").exists()
