"""A LightningModule's training: the same reports, resumed bit for bit, ended at any time."""

import io
import itertools
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.parts import documented_module
from trainer import modules
from trainer.config import ConfigError, OutOfMemory, TrainConfig, TrainingDiverged
from trainer.data.dataset import ImageDataset
from trainer.data.folds import cut_folds
from trainer.data.registry import load
from trainer.device import DevicePlan
from trainer.export.folder import export_model
from trainer.folds import train_folds
from trainer.loop import train
from trainer.reports import ProgressReport
from trainer.state import CheckpointError, read_history

CPU = DevicePlan(device="cpu")
MODULES = '''
import numpy
import torch
from lightning.pytorch.callbacks import EarlyStopping
from pytorch_lightning import LightningModule
from torch import nn
from torch.nn import functional
from my_package import Net

class Logged(Net):
    """With a metric of its own, and a schedule by name."""
    def __init__(self, num_classes, input_size, schedule="plateau", lr=1e-2):
        super().__init__(num_classes, input_size, lr=lr, hidden=16, dropout=0.3)
        self.save_hyperparameters()
        self.rates, self.validated = [], []
    def training_step(self, batch, batch_index):
        loss = super().training_step(batch, batch_index)
        self.log("train_loss", loss)
        return {"loss": loss}
    def validation_step(self, batch, batch_index):
        assert not self.training
        images, labels = batch
        self.validated.append(len(labels))
        self.log("val_loss", functional.cross_entropy(self(images), labels))
    def on_train_epoch_start(self):
        self.rates.append(self.optimizers().param_groups[0]["lr"])
    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), self.lr, momentum=0.9)
        if self.hparams.schedule == "step":
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=0.9)
        return {"optimizer": optimizer,
                "lr_scheduler": {"scheduler": plateau, "monitor": "val_loss"}}

class Odd(Logged):
    def __init__(self, num_classes, input_size, widths=print):
        super().__init__(num_classes, input_size)
        self.save_hyperparameters()

class Unsafe(Logged):
    def on_save_checkpoint(self, checkpoint):
        checkpoint["mine"] = print

class Stops(Logged):
    def configure_callbacks(self):
        return [EarlyStopping("val_loss", patience=1, min_delta=100.0)]

class ByHand(LightningModule):
    """Two optimizers of its own, and no word of its loss."""
    def __init__(self, num_classes, input_size):
        super().__init__()
        self.automatic_optimization = False
        self.first, self.last = nn.Linear(64, 16), nn.Linear(16, num_classes)
    def forward(self, images):
        return self.last(functional.relu(self.first(images.flatten(1))))
    def training_step(self, batch, batch_index):
        images, labels = batch
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(functional.cross_entropy(self(images), labels))
        for optimizer in self.optimizers():
            optimizer.step()
    def configure_optimizers(self):
        return [torch.optim.Adam(part.parameters(), 1e-2) for part in (self.first, self.last)]

class Frozen(Net):
    def __init__(self, num_classes, input_size):
        super().__init__(num_classes, input_size)
        self.layers[2].eval()
    def training_step(self, batch, batch_index):
        assert self.training and not self.layers[2].training
        return super().training_step(batch, batch_index)

class Fails(Net):
    def training_step(self, batch, batch_index):
        if self.global_step == 20:
            raise KeyError("no\\nsuch luck")
        return super().training_step(batch, batch_index)

class Diverges(Net):
    def training_step(self, batch, batch_index):
        return super().training_step(batch, batch_index) * float("nan")

class Forgets(Net):
    def training_step(self, batch, batch_index):
        raise RuntimeError("CUDA out of memory. Tried to allocate 20 GiB")
'''


@pytest.fixture(autouse=True)
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_package.py").write_text(documented_module())
    (tmp_path / "my_trainings.py").write_text(MODULES)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("my_package", "my_trainings"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    modules.find_class.cache_clear()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


@pytest.fixture(scope="module")
def digits() -> ImageDataset:
    whole = load("digits", seed=0)
    return ImageDataset(**{**vars(whole), "train": whole.train.take(range(256))})


def config(name: str = "my_package:Net", **fields: Any) -> TrainConfig:
    usual = {"batch_size": 16, "epochs": 3, "lr": 1e-2, "translate": 1}
    return TrainConfig.from_dict({"backbone": f"lightning:{name}", **usual, **fields})


def curve(report: ProgressReport) -> list[dict[str, Any]]:
    """The reports so far without their times."""
    history = report.state.history
    return [{name: past[name] for name in past if "second" not in name} for past in history]


def assert_same_weights(first: ProgressReport, second: ProgressReport) -> None:
    one, other = first.state.model.state_dict(), second.state.model.state_dict()
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_it_learns_and_reports_as_any_network(digits: ImageDataset) -> None:
    reports = list(train(config(), digits, CPU))
    assert [report.step for report in reports] == [1, 4, 8, 12]
    assert [report.images_seen for report in reports] == [64, 256, 512, 768]
    assert [report.finished for report in reports] == [False, False, False, True]
    assert reports[-1].val_accuracy > 0.6
    assert reports[-1].train_loss < reports[0].train_loss
    assert all(report.images_per_second > 0 for report in reports)
    assert not list(Path.cwd().iterdir())


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("my_package:Net", {"dropout": 0.5}),
        ("my_trainings:Logged", {"module.schedule": "step", "balance": "sampling"}),
        ("my_trainings:Logged", {"module.schedule": "plateau", "batch_size": 64}),
        ("my_trainings:ByHand", {"flip": True}),
        ("my_trainings:Odd", {}),
    ],
)
def test_a_resumed_training_is_bit_for_bit_the_one_that_never_stopped(
    name: str, fields: dict[str, Any], digits: ImageDataset
) -> None:
    wanted, checkpoints = config(name, **fields), []
    for whole in train(wanted, digits, CPU):
        checkpoints.append(whole.state.to_bytes())
        torch.load(io.BytesIO(checkpoints[-1]), weights_only=True)
        assert read_history(checkpoints[-1]) == whole.state.history
    for checkpoint in checkpoints[:-1]:
        torch.rand(3)
        *_, resumed = train(wanted, digits, CPU, resume=checkpoint)
        assert curve(resumed) == curve(whole)
        assert_same_weights(resumed, whole)
    assert list(train(wanted, digits, CPU, resume=checkpoints[-1])) == []


def test_a_plateau_schedule_sees_the_validation_of_each_epoch_and_a_metric_to_watch_without_any(
    digits: ImageDataset,
) -> None:
    wanted = config("my_trainings:Logged")
    model: Any = list(train(wanted, digits, CPU))[-1].state.model
    assert model.rates == pytest.approx([1e-2, 1e-2, 1e-3])
    assert sum(model.validated) == 3 * len(digits.val)
    whole = digits.with_validation_in_training()
    last = list(train(wanted, whole, CPU))[-1]
    model = last.state.model
    assert sum(model.validated) == 3 * len(whole.train)
    assert last.val_accuracy != last.val_accuracy


def test_optimized_by_hand_the_loss_is_that_of_the_last_batch(digits: ImageDataset) -> None:
    losses = [report.train_loss for report in train(config("my_trainings:ByHand"), digits, CPU)]
    assert 0 < losses[-1] < losses[0] < 3


def test_what_is_frozen_stays_so(digits: ImageDataset) -> None:
    assert len(list(train(config("my_trainings:Frozen"), digits, CPU))) == 4


def test_torch_s_random_state_is_the_caller_s_between_reports(digits: ImageDataset) -> None:
    torch.manual_seed(7)
    expected = torch.rand(5)
    torch.manual_seed(7)
    drawn = [torch.rand(1) for _ in train(config(), digits, CPU)]
    assert torch.equal(torch.cat([*drawn, torch.rand(1)]), expected)


class Leave(BaseException):
    """What nobody may catch."""


@pytest.mark.parametrize("batch", [0, 2, 17])
@pytest.mark.parametrize("error", [Leave(), KeyboardInterrupt(), ValueError("x")], ids=repr)
def test_what_pulse_raises_ends_the_training_and_is_raised_as_it_is(
    error: BaseException, batch: int, digits: ImageDataset
) -> None:
    beats = itertools.count()

    def pulse() -> None:
        if next(beats) == batch:
            raise error

    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(type(error)) as caught:
        list(train(config(), digits, CPU, pulse=pulse))
    assert caught.value is error
    assert "lightning-fit" not in {thread.name for thread in threading.enumerate()}
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_left_at_a_report_it_ends_and_its_model_can_be_used(digits: ImageDataset) -> None:
    reports = train(config(), digits, CPU)
    first, second = next(reports), next(reports)
    assert first.state is second.state
    reports.close()
    assert "lightning-fit" not in {thread.name for thread in threading.enumerate()}
    assert second.state.model(digits.val.images[:2].float()).shape == (2, 10)
    assert second.state.result._trainer is None


def test_patience_ends_it(digits: ImageDataset) -> None:
    (*_, last) = train(config(lr=1e-9, epochs=9, patience=2), digits, CPU)
    assert last.finished
    assert last.step < 36
    assert "early stopping" in str(last.reason)


def test_its_own_early_stopping_ends_it(digits: ImageDataset) -> None:
    (*_, last) = train(config("my_trainings:Stops", epochs=9), digits, CPU)
    assert (last.step, last.finished) == (8, True)
    assert last.reason == "lightning:my_trainings:Stops ended its training by itself"


@pytest.mark.parametrize(
    ("name", "kind", "said"),
    [
        ("Fails", ConfigError, r"Fails: KeyError: 'no\\nsuch luck' \(my_trainings.py, line \d+\)$"),
        ("Diverges", TrainingDiverged, "the training loss is nan after 0.25 epochs"),
        ("Forgets", OutOfMemory, "batch_size 16 doesn't fit into the memory of cpu"),
    ],
)
def test_what_goes_wrong_in_its_code_is_one_line(
    name: str, kind: type[Exception], said: str, digits: ImageDataset
) -> None:
    with pytest.raises(kind, match=said) as caught:
        list(train(config(f"my_trainings:{name}"), digits, CPU))
    assert "\n" not in str(caught.value)
    assert "lightning-fit" not in {thread.name for thread in threading.enumerate()}


def test_a_batch_that_does_not_fit_ends_the_trial_as_a_result(digits: ImageDataset) -> None:
    plan = DevicePlan(device="cpu", micro_batch=8)
    with pytest.raises(OutOfMemory, match="a LightningModule's batches are not split"):
        next(train(config(), digits, plan))


def test_a_checkpoint_that_only_code_can_read_is_refused(digits: ImageDataset) -> None:
    reports = train(config("my_trainings:Unsafe"), digits, CPU)
    next(reports)
    report = next(reports)
    with pytest.raises(ConfigError, match="must be tensors and plain values"):
        report.state.to_bytes()
    reports.close()


def test_a_checkpoint_of_another_training_is_refused(digits: ImageDataset) -> None:
    reports = train(config(epochs=2), digits, CPU)
    next(reports)
    content = next(reports).state.to_bytes()
    reports.close()
    with pytest.raises(CheckpointError, match="of another config: module, lr"):
        next(train(config(epochs=2, lr=1, module={"hidden": 5}), digits, CPU, resume=content))
    ours = TrainConfig(backbone="smallcnn", epochs=2)
    with pytest.raises(CheckpointError, match="another format"):
        next(train(ours, digits, CPU, resume=content))
    saved = torch.load(io.BytesIO(content), weights_only=True)
    saved["lightning"]["optimizer_states"] = [{"state": {}, "param_groups": []}]
    file = io.BytesIO()
    torch.save(saved, file)
    with pytest.raises(CheckpointError, match="the checkpoint doesn't fit"):
        next(train(config(epochs=2), digits, CPU, resume=file.getvalue()))


def test_folds_go_on_together_and_resume(digits: ImageDataset) -> None:
    folds = cut_folds(digits, 2, 0, device="cpu")
    wanted = config(batch_size=64, epochs=2)
    first, last = train_folds(wanted, folds, CPU)
    reports = train_folds(wanted, folds, CPU)
    content = next(reports).state.to_bytes()
    reports.close()
    (resumed,) = train_folds(wanted, folds, CPU, resume=content)
    assert resumed.val_loss == last.val_loss != first.val_loss


def test_it_is_trained_in_bf16(digits: ImageDataset) -> None:
    plan = DevicePlan(device="cpu", precision="bf16")
    (*_, last) = train(config(), digits, plan)
    assert last.val_accuracy > 0.6


def test_each_format_that_needs_no_extra_is_exported(digits: ImageDataset, tmp_path: Path) -> None:
    wanted = config("my_trainings:Logged")
    (*_, last) = train(wanted, digits, CPU)
    manifest = export_model(
        last.state.result,
        config=wanted,
        data=digits,
        test=digits.val,
        out=tmp_path / "out",
        about={},
        metrics={},
        formats=("torchscript", "onnx", "torch-export", "safetensors"),
    )
    assert set(manifest["formats"]) == {"torchscript", "onnx", "torch-export", "safetensors"}
    assert manifest["formats"]["safetensors"]["network"] == "network.py"
    assert manifest["config"]["backbone"] == "lightning:my_trainings:Logged"
    weight: Tensor = last.state.model.state_dict()["layers.1.weight"]
    assert weight.requires_grad is False
    assert os.listdir() == []
