"""A LightningModule and a LightningDataModule of one's own, through the commands."""

import json
import os
import signal
import time
from pathlib import Path

from PIL import Image

from storage.database import Database
from storage.snapshots import snapshot
from storage.studies import find_studies
from tests.parts import Hpo, documented_module
from trainer.data.registry import load

DATA = """
import torch
from lightning.pytorch import LightningDataModule
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

class Digits(LightningDataModule):
    def setup(self, stage):
        found = load_digits()
        images = torch.tensor(found.images / 16, dtype=torch.float32)[:, None]
        self.parts = TensorDataset(images, torch.tensor(found.target))
    def train_dataloader(self):
        return DataLoader(self.parts)
"""


def pid_of_a_worker_with_reports(database: Database) -> int:
    """Of one whose trial is past its first epoch."""
    deadline = time.monotonic() + 120
    while True:
        for record in find_studies(database):
            for worker in snapshot(database, record.study_id).workers:
                if worker.step is not None and worker.step >= 4:
                    return worker.pid
        assert time.monotonic() < deadline, "no worker has reported"
        time.sleep(0.02)


def test_a_module_is_tuned_loses_nothing_to_a_kill_and_classifies_pictures(
    database: Database, database_url: str, tmp_path: Path
) -> None:
    (tmp_path / "my_package.py").write_text(documented_module())
    (tmp_path / "my_data.py").write_text(DATA)
    home = tmp_path / "home"
    home.mkdir()
    hpo = Hpo(home, {"HPO_STORAGE": database_url, "PYTHONPATH": str(tmp_path)})
    launcher = hpo.start(
        "launch", "--module", "my_package:Net", "--data", "lightning:my_data:Digits", "--set",
        "module.hidden=16", "--trials", "3", "--epochs", "12", "--workers", "1",
    )  # fmt: skip
    os.kill(pid_of_a_worker_with_reports(database), signal.SIGKILL)
    _, err = launcher.communicate(timeout=400)
    assert launcher.returncode == 0, err
    (record,) = find_studies(database)
    trials = snapshot(database, record.study_id).trials
    assert (record.name, sorted(trial.attempts for trial in trials)) == ("Digits", [1, 1, 2])
    assert {trial.state for trial in trials} <= {"COMPLETE", "PRUNED"}

    out = tmp_path / "out"
    done = hpo.run("best", "--export", "--out", str(out), "--top-k", "1", "--seeds", "0", "--json")
    assert done.returncode == 0, done.stderr
    best = json.loads(done.stdout)
    assert {"torchscript", "onnx", "torch-export", "safetensors"} <= set(best["export"]["formats"])
    assert best["trial"]["params"]["backbone"] == "lightning:my_package:Net"
    test = load("digits", seed=0).open_test()
    files = [str(tmp_path / f"{index}.png") for index in range(10)]
    for image, file in zip(test.images, files, strict=False):
        Image.fromarray(image[0].numpy()).save(file)
    predicted = json.loads(hpo.run("predict", str(out), *files, "--json").stdout)
    labels = map(str, test.labels.tolist())
    assert sum(row["class"] == label for row, label in zip(predicted, labels, strict=False)) >= 7
    assert "Traceback" not in err + done.stderr


COUNTED = """
import os
from pathlib import Path
import torch
from lightning.pytorch import LightningDataModule
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

class Counted(LightningDataModule):
    def setup(self, stage):
        with open(os.environ["NOTES"], "a") as file:
            file.write(f"{stage} {os.getpid()}\\n")
        found = load_digits()
        images = torch.tensor(found.images / 16, dtype=torch.float32)[:, None]
        self.parts = TensorDataset(images[:500], torch.tensor(found.target)[:500])
    def train_dataloader(self):
        return DataLoader(self.parts)
"""


def test_the_items_of_a_data_module_are_read_by_the_launch_that_makes_the_study_and_never_again(
    database_url: str, tmp_path: Path
) -> None:
    (tmp_path / "counted_data.py").write_text(COUNTED)
    (tmp_path / "home").mkdir()
    notes = tmp_path / "notes"
    variables = {"HPO_STORAGE": database_url, "PYTHONPATH": str(tmp_path), "NOTES": str(notes)}
    hpo = Hpo(tmp_path / "home", variables)
    common = ("launch", "--data", "lightning:counted_data:Counted", "--workers", "2")
    made = hpo.run(*common, "--backbone", "smallcnn", "--epochs", "1", "--trials", "4")
    assert made.returncode == 0, made.stderr
    assert [line.split()[0] for line in notes.read_text().splitlines()] == ["fit"]
    again = hpo.run(*common, "--trials", "6")
    assert again.returncode == 0, again.stderr
    shown = json.loads(hpo.run("status", "--json").stdout)
    assert shown["complete"] + shown["pruned"] == 6
    assert len(notes.read_text().splitlines()) == 1
    # a retraining and the re-checks, too; the test split is drawn from all items
    out = tmp_path / "out"
    best = hpo.run("best", "--export", "--out", str(out), "--top-k", "1", "--seeds", "2",
                   "--formats", "safetensors", "--json")  # fmt: skip
    assert best.returncode == 0, best.stderr
    assert len({line.split()[1] for line in notes.read_text().splitlines()}) == 2
