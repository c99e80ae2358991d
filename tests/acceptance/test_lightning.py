"""A LightningModule and a LightningDataModule of one's own, through the commands."""

import json
import os
import signal
import time
from pathlib import Path

from PIL import Image

from tests.parts import Hpo, documented_module
from trainer.data.registry import load

DATA = """
import torch
from lightning.pytorch import LightningDataModule
from my_package import Net
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

class Digits(LightningDataModule):
    def setup(self, stage):
        found = load_digits()
        images = torch.tensor(found.images / 16, dtype=torch.float32)[:, None]
        self.parts = TensorDataset(images, torch.tensor(found.target))
    def train_dataloader(self):
        return DataLoader(self.parts)

class Slow(Net):
    def training_step(self, batch, batch_index):
        torch.zeros(400, 400) @ torch.zeros(400, 4000)
        return super().training_step(batch, batch_index)
"""


def pid_of_a_worker_with_a_checkpoint(hpo: Hpo) -> int:
    """Looks for the file, since each `hpo status` takes a core for a second."""
    deadline = time.monotonic() + 120
    while not list((hpo.home / "checkpoints").rglob("*.ckpt")):
        assert time.monotonic() < deadline, "no worker has reported"
        time.sleep(0.05)
    found = json.loads(hpo.run("status", "--json").stdout)["workers"]
    return next(int(worker["pid"]) for worker in found if worker["trial"] is not None)


def test_a_module_is_tuned_loses_nothing_to_a_kill_and_classifies_pictures(
    database_url: str, tmp_path: Path
) -> None:
    (tmp_path / "my_package.py").write_text(documented_module())
    (tmp_path / "my_data.py").write_text(DATA)
    home = tmp_path / "home"
    home.mkdir()
    hpo = Hpo(home, {"HPO_STORAGE": database_url, "PYTHONPATH": str(tmp_path)})
    launcher = hpo.start(
        "launch", "--module", "my_data:Slow", "--data", "lightning:my_data:Digits", "--set",
        "module.hidden=16", "--trials", "3", "--epochs", "12", "--workers", "1",
    )  # fmt: skip
    os.kill(pid_of_a_worker_with_a_checkpoint(hpo), signal.SIGKILL)
    _, err = launcher.communicate(timeout=400)
    assert launcher.returncode == 0, err
    found = json.loads(hpo.run("trials", "--json").stdout)
    assert sorted(trial["attempts"] for trial in found) == [1, 1, 2]
    assert {trial["state"] for trial in found} <= {"COMPLETE", "PRUNED"}

    # in one go the killed trial comes to the same values
    killed = next(trial for trial in found if trial["attempts"] == 2)
    again = hpo.run("replay", "--trial", str(killed["number"]), "--epochs", "12", "--json")
    assert again.returncode == 0, again.stdout + again.stderr
    assert json.loads(again.stdout)["replayed"] == killed["values"]

    out = tmp_path / "out"
    done = hpo.run("best", "--export", "--out", str(out), "--top-k", "1", "--seeds", "0", "--json")
    assert done.returncode == 0, done.stderr
    best = json.loads(done.stdout)
    assert {"torchscript", "onnx", "torch-export", "safetensors"} <= set(best["export"]["formats"])
    assert best["trial"]["params"]["backbone"] == "lightning:my_data:Slow"
    test = load("digits", seed=0).open_test()
    for index in range(10):
        Image.fromarray(test.images[index, 0].numpy()).save(tmp_path / f"{index}.png")
    files = [str(tmp_path / f"{index}.png") for index in range(10)]
    predicted = json.loads(hpo.run("predict", str(out), *files, "--json").stdout)
    hits = [row["class"] == str(int(test.labels[i])) for i, row in enumerate(predicted)]
    assert sum(hits) >= 7
    assert "Traceback" not in err + done.stderr
