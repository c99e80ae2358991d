"""Options in pairs: each two values of any two options of a training, on tiny data.

                                  number
    options                           37   30 fields of TrainConfig, 7 around it
    pairs of values                5,661   and 189 triples of what an optimizer's state depends on
    of them may be trained         5,819   in 63 configurations, each cut in its last leg
    must be refused                   31   in 5 configurations
    seconds                           47   one core of an Intel Xeon that others used, too

It found that SMOTE failed with a seed of 2**32 or more, as all folds have, and that sgd with
momentum failed where a parameter has its first gradient after others: in a stage that is thawed, in
a layer that a network skips at times. Left out: bf16 on networks that shrink a picture to one pixel
(mobilenet_v3_small on 8 x 8). On a CPU without bf16 of its own, where choose_plan never takes it,
torch 2.15 leaves parts of the gradient of a strided convolution on one pixel unset.
"""

import dataclasses
import io
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from tests.trainer_tests.pairs import Meeting, Values, all_meetings, covering_array, meetings_of
from tests.trainer_tests.test_resume_matrix import assert_same_bits, curve_of
from trainer.backbones import BACKBONES, build
from trainer.config import (
    Average,
    Balance,
    ConfigError,
    Objective,
    Optimizer,
    Policy,
    Precision,
    Schedule,
    Trainable,
    TrainConfig,
    TrainingFailure,
)
from trainer.data.dataset import ImageDataset, Split
from trainer.data.folds import cut_folds
from trainer.device import DevicePlan
from trainer.folds import FoldsReport, FoldsState, train_folds
from trainer.loop import train
from trainer.reports import ProgressReport
from trainer.state import TrainState

pytestmark = pytest.mark.usefixtures("bf16_everywhere")
NUM_IMAGES = 25
OWN = f"{__name__}:skipping"
FIELDS: dict[str, tuple[Any, ...]] = {
    "backbone": ("smallcnn", "resnet8", "published", OWN),
    "module": ((), (("width", 2),)),
    "pretrained": (False, True),
    "weights": ("", "a file"),
    "trainable": get_args(Trainable),
    "backbone_lr": (1.0, 0.1),
    "head_hidden": (0, 4),
    "lr": (1e-3, 1e-12, 0.03),
    "batch_size": (8, 2, 24, 10_000),
    "epochs": (2, 1, 4),
    "optimizer": get_args(Optimizer),
    "momentum": (0.9, 0.0, 0.99),
    "weight_decay": (1e-2, 0.0, 1.0),
    "schedule": get_args(Schedule),
    "label_smoothing": (0.0, 0.1, 0.99),
    "dropout": (0.0, 0.5, 0.99),
    "clip_norm": (0.0, 1.0, 1e-6),
    "patience": (0, 1),
    "average": get_args(Average),
    "flip": (False, True),
    "translate": (0, 1, 7, 8),
    "rotation": (0.0, 10.0, 180.0),
    "cutout": (0, 3, 7, 8),
    "policy": get_args(Policy),
    "policy_magnitude": (9, 0, 30),
    "erasing": (0.0, 0.5, 1.0),
    "mixup": (0.0, 0.2, 1000.0),
    "cutmix": (0.0, 1.0, 1000.0),
    "balance": get_args(Balance),
    "seed": (0, 2**40),
}
"""All fields of TrainConfig."""
AROUND: dict[str, tuple[Any, ...]] = {
    "data": ("grey", "colour", "without validation"),
    "precision": get_args(Precision),
    "channels_last": (True, False),
    "micro_batch": (None, 2, 3),
    "objective": get_args(Objective),
    "end_step": (None, 4),
    "folds": (0, 2),
}
"""What else a training is told."""
ALL = FIELDS | AROUND
CLOSELY = ("trainable", "epochs", "optimizer", "momentum")
"""What an optimizer's state depends on: of these each three values meet."""
PICTURES = {
    "flip": False, "translate": 0, "rotation": 0.0, "cutout": 0, "erasing": 0.0, "policy": "none",
    "mixup": 0.0, "cutmix": 0.0,
}  # fmt: skip
"""With these the pictures stay the same."""
SIDES = {"grey": 8, "colour": 9, "without validation": 8}


class Skipping(nn.Module):
    """Half of its training steps leave out a layer, which then has no gradient."""

    def __init__(self, channels: int, num_classes: int, dropout: float) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Sequential(nn.Dropout(dropout), nn.Linear(8, num_classes))

    def forward(self, images: Tensor) -> Tensor:
        found = self.first(images).relu()
        if not self.training or torch.rand(()) < 0.5:
            found = found + self.second(found).relu()
        logits: Tensor = self.head(found.mean(dim=(2, 3)))
        return logits


def skipping(input_size: tuple[int, int, int], num_classes: int, dropout: float) -> nn.Module:
    return Skipping(input_size[0], num_classes, dropout)


def can_be_trained(row: Values) -> bool:
    """By the documentation; row may lack fields, which then have values that fit."""
    if row.get("pretrained") and row.get("weights"):
        return False
    if row.get("folds") and row.get("end_step"):  # which trainings of folds are not told
        return False
    if row.get("pretrained") and row.get("backbone", "published") != "published":
        return False
    side = SIDES[row.get("data", "colour")]
    if row.get("translate", 0) >= side or row.get("cutout", 0) >= side:
        return False
    if row.get("balance") != "smote":
        return True
    hidden = row.get("backbone") == OWN and row.get("dropout", 0.0) > 0
    stay = all(row.get(name, off) == off for name, off in PICTURES.items())
    return row.get("trainable", "head") == "head" and stay and not hidden


def dataset(kind: str) -> ImageDataset:
    """Noise in four classes: one of two images, one that may have none to train on."""
    generator = torch.Generator().manual_seed(len(kind))
    size = (3, 9, 11) if kind == "colour" else (1, 8, 8)
    images = torch.randint(256, (NUM_IMAGES + 8, *size), generator=generator).to(torch.uint8)
    labels = torch.arange(NUM_IMAGES + 8) % 2
    labels[3] = labels[12] = 2
    labels[-2:] = 3
    everything = Split(images, labels)
    num_train = len(labels) if kind == "without validation" else NUM_IMAGES
    return ImageDataset(
        name=kind,
        train=everything.take(range(num_train)),
        val=everything.take(range(num_train, len(labels))),
        class_names=("a", "b", "c", "d"),
        mean=(0.5,) * size[0],
        std=(0.25,) * size[0],
        fingerprint=f"{len(kind):064}",
        flips=True,
        open_test=lambda: everything.take([]),
    )


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """Weights of each of the networks, for three channels and other classes."""
    folder, found = tmp_path_factory.mktemp("weights"), {}
    for number, name in enumerate(("smallcnn", "resnet8", OWN)):
        model = build(TrainConfig(backbone=name, seed=9), input_size=(3, 8, 8), num_classes=7)
        tensors = {key: tensor.contiguous() for key, tensor in model.state_dict().items()}
        if number:  # as an export of ours has them
            tensors |= {"mean": torch.full((3,), 0.4), "std": torch.full((3,), 0.3)}
        found[name] = folder / f"{number}.safetensors"
        safetensors.torch.save_file(tensors, found[name])
    return found | {"published": found["resnet8"]}


@pytest.fixture
def _published(files: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A network with weights like torchvision's, which needs no download."""

    class Enum:
        url = "https://example.org/published.pth"

        def get_state_dict(self, **_: Any) -> dict[str, Tensor]:
            return safetensors.torch.load_file(files["published"])

        def transforms(self) -> SimpleNamespace:
            return SimpleNamespace(mean=(0.4, 0.5, 0.6), std=(0.2, 0.2, 0.3))

    published = dataclasses.replace(BACKBONES["resnet8"], weights=Enum)
    monkeypatch.setitem(BACKBONES, "published", published)


def end_of(
    row: Values, files: Mapping[str, Path], resume: bytes | None = None
) -> tuple[Sequence[ProgressReport | FoldsReport], bytes]:
    """A training's reports, and what was saved in the middle of its last leg."""
    fields = {name: row[name] for name in FIELDS} | {"module": dict(row["module"])}
    if fields["weights"]:
        fields["weights"] = str(files[row["backbone"]])
    config, data = TrainConfig.from_dict(fields), dataset(row["data"])
    plan = DevicePlan(
        device="cpu",
        precision=row["precision"],
        channels_last=row["channels_last"],
        micro_batch=row["micro_batch"],
    )
    saved: list[bytes] = []

    def keep(state: TrainState | FoldsState) -> None:
        now = state if isinstance(state, TrainState) else state.states[-1]
        if now.underway is not None and now.underway.next_batch in (0, 1, 4):
            saved[:] = [state.to_bytes()]

    rest: dict[str, Any] = {"objective": row["objective"], "try_averages": ("tail",)}
    reports: list[ProgressReport] | list[FoldsReport]
    if row["folds"]:
        folds = cut_folds(data, row["folds"], 0, device="cpu")
        reports = list(train_folds(config, folds, plan, resume=resume, keep=keep, **rest))
    else:
        rest["end_step"] = row["end_step"]
        reports = list(train(config, data, plan, resume=resume, keep=keep, **rest))
    return reports, saved[0]


def assert_trains(row: Values, files: Mapping[str, Path]) -> None:
    """To its end, with finite losses, and bit for bit when it is cut."""
    reports, saved = end_of(row, files)
    last = reports[-1]
    assert last.finished
    assert last.reason is not None or last.step == (row["end_step"] or 4 * row["epochs"])
    has_validation = row["data"] != "without validation" or row["folds"] > 0
    for report in reports:
        assert math.isfinite(report.train_loss)
        assert math.isfinite(report.val_loss) == has_validation
    torch.load(io.BytesIO(last.state.to_bytes()), weights_only=True)
    (*_, again), _ = end_of(row, files, saved)
    # without validation images values are NaN, which repr has, too
    assert repr(curve_of(again.state.history)) == repr(curve_of(last.state.history))
    for one, other in zip(states_of(again), states_of(last), strict=True):
        assert_same_bits(one, other)


def states_of(report: ProgressReport | FoldsReport) -> Sequence[TrainState]:
    return [report.state] if isinstance(report.state, TrainState) else report.state.states


def test_a_covering_array_holds_every_pair_once_at_least_and_is_the_same_each_time() -> None:
    fields = {"a": (1, 2, 3), "b": ("x", "y"), "c": (None, True), "d": (0.5, 1.5, 2.5)}

    def fits(row: Values) -> bool:
        return not (row.get("a") == 1 and row.get("d") == 0.5)

    for closely, num_triples, most in (((), 0, 12), (("b", "c", "d"), 2 * 2 * 3, 15)):
        wanted = {each for each in all_meetings(fields, closely) if fits(dict(each))}
        num_pairs = 3 * 2 + 3 * 2 + 3 * 3 + 2 * 2 + 2 * 3 + 2 * 3 - 1
        assert len(wanted) == num_pairs + num_triples
        rows = covering_array(fields, wanted, fits, closely)
        assert {each for row in rows for each in meetings_of(row, closely)} == wanted
        assert all(fits(row) and list(row) == list(fields) for row in rows)
        assert len(rows) <= most
        assert rows == covering_array(fields, wanted, fits, closely)


def test_the_array_has_every_field_of_a_training() -> None:
    assert list(FIELDS) == [field.name for field in dataclasses.fields(TrainConfig)]


@pytest.mark.usefixtures("_published")
def test_each_two_values_of_any_two_options_train_together_or_are_refused_in_one_line(
    files: Mapping[str, Path],
) -> None:
    everything = set(all_meetings(ALL, CLOSELY))
    trainable: set[Meeting] = {each for each in everything if can_be_trained(dict(each))}
    rows = covering_array(ALL, trainable, can_be_trained, CLOSELY)
    refused = covering_array(ALL, everything - trainable)
    faults: list[str] = []
    for row in itertools.chain(rows, refused):
        try:
            assert_trains(row, files)
            trains = True
        except (ConfigError, TrainingFailure) as error:
            trains = False
            said = str(error)
            if "\n" in said or not said:
                faults.append(f"{said!r} is no line: {row}")
        except Exception as error:
            faults.append(f"{type(error).__name__}: {error}: {row}"[:600])
            continue
        if trains != can_be_trained(row):
            faults.append(f"{'trains' if trains else said}: {row}")
    assert not faults, "\n".join(faults)
