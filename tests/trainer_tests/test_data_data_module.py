"""LightningDataModules as data: read once, split, and refused in one line."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from trainer import modules
from trainer.config import ConfigError, DataError
from trainer.data.options import DataOptions
from trainer.data.registry import load, settled_source, source_name

DATA = '''
import numpy
import torch
from lightning.pytorch import LightningDataModule
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

class Squares(Dataset):
    """60 images of 3 classes, each a gray of its own."""
    classes = ["low", "middle", "high"]
    def __init__(self, kind="float"):
        self.kind = kind
    def __len__(self):
        return 60
    def __getitem__(self, index):
        level = 4 * index
        if self.kind == "float":
            return torch.full((1, 8, 8), level / 255), torch.tensor(index % 3)
        if self.kind == "bytes":
            return torch.full((1, 8, 8), level, dtype=torch.uint8), index % 3
        gray = Image.fromarray(numpy.full((8, 8), level, dtype=numpy.uint8))
        return gray.convert("1" if self.kind == "bits" else self.kind), numpy.int64(index % 3)

class Whole(LightningDataModule):
    """All three splits; the test split by a stage of its own."""
    kind = "float"
    def __init__(self):
        super().__init__()
        self.stages = []
    def prepare_data(self):
        self.prepared = True
        print("printed")
    def setup(self, stage):
        assert self.prepared
        self.squares = Squares(self.kind)
        if stage == "test":
            self.held_out = Subset(self.squares, range(50, 60))
    def train_dataloader(self):
        return DataLoader(Subset(self.squares, range(40)), batch_size=7, shuffle=True)
    def val_dataloader(self):
        return DataLoader(Subset(self.squares, range(40, 50)))
    def test_dataloader(self):
        return DataLoader(self.held_out)

class Bytes(Whole):
    kind = "bytes"

class Gray(Whole):
    kind = "L"

class Colours(Whole):
    kind = "RGBA"

class TrainAlone(LightningDataModule):
    def __init__(self, data_dir):
        super().__init__()
        self.data_dir = data_dir
    def train_dataloader(self):
        return DataLoader(Squares())

class Given(LightningDataModule):
    """Gives what its class says for an item."""
    number = 6
    def item(self, index):
        return torch.zeros(1, 4, 4), index % 2
    def train_dataloader(self):
        return DataLoader(Items(self))

class Items(Dataset):
    def __init__(self, owner):
        self.owner = owner
    def __len__(self):
        return self.owner.number
    def __getitem__(self, index):
        return self.owner.item(index)

class Normalized(Given):
    def item(self, index):
        return torch.full((1, 4, 4), -0.5), index % 2

class Undefined(Given):
    def item(self, index):
        return torch.full((1, 4, 4), float("nan")), index % 2

class Whole255(Given):
    def item(self, index):
        return torch.full((1, 4, 4), 255), index % 2

class Sizes(Given):
    def item(self, index):
        return torch.zeros(1, 4, 4 + index), index % 2

class Random(Given):
    def item(self, index):
        return torch.rand(1, 4, 4), index % 2

class Arrays(Given):
    def item(self, index):
        return numpy.zeros((4, 4, 3)), index % 2

class Batches(Given):
    def item(self, index):
        return torch.zeros(2, 1, 4, 4), index % 2

class Unlabelled(Given):
    def item(self, index):
        return torch.zeros(1, 4, 4)

class Negative(Given):
    def item(self, index):
        return torch.zeros(1, 4, 4), index % 2 - 1

class Empty(Given):
    number = 0

class OneClass(Given):
    def item(self, index):
        return torch.zeros(1, 4, 4), 0

class OtherVal(Given):
    def val_dataloader(self):
        return DataLoader(Squares())

class Broken(Given):
    def setup(self, stage):
        raise OSError("no\\nsuch disk")

class Stream(IterableDataset):
    def __iter__(self):
        return iter([])

class Streamed(Given):
    def train_dataloader(self):
        return DataLoader(Stream())

class Several(Given):
    def train_dataloader(self):
        return [DataLoader(Items(self))]

class WithoutTrain(LightningDataModule):
    pass

class Needy(Given):
    def __init__(self, path):
        super().__init__()

class Plain:
    pass
'''


@pytest.fixture(autouse=True)
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_data.py").write_text(DATA)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("HPO_DATA", str(tmp_path / "sets"))
    monkeypatch.delitem(sys.modules, "my_data", raising=False)
    modules.find_class.cache_clear()


@pytest.mark.parametrize("name", ["Whole", "Bytes", "Gray"])
def test_its_splits_are_read_as_bytes_and_the_test_split_when_it_is_opened(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data = load(f"lightning:my_data:{name}", seed=0)
    assert data.train.images[:, 0, 0, 0].tolist() == [4 * index for index in range(40)]
    assert data.train.labels.tolist() == [index % 3 for index in range(40)]
    assert data.val.images[:, 0, 0, 0].tolist() == [4 * index for index in range(40, 50)]
    assert data.class_names == ("low", "middle", "high")
    assert (data.name, data.input_size, data.train.images.dtype) == (name, (1, 8, 8), torch.uint8)
    assert data.open_test().images[:, 0, 0, 0].tolist() == [4 * index for index in range(50, 60)]
    assert capsys.readouterr().out == ""
    assert load(f"lightning:my_data:{name}", seed=1).fingerprint == data.fingerprint


def test_the_same_images_have_the_same_fingerprint_and_others_another() -> None:
    found = [
        load(f"lightning:my_data:{name}", seed=0).fingerprint
        for name in ("Whole", "Bytes", "Gray", "Colours")
    ]
    assert found[0] == found[1] == found[2] != found[3]
    assert load("lightning:my_data:Colours", seed=0).input_size == (3, 8, 8)


def test_what_it_does_not_split_is_split_as_other_data(tmp_path: Path) -> None:
    first, again, other = (load("lightning:my_data:TrainAlone", seed=seed) for seed in (1, 1, 2))
    tests = [data.open_test().images[:, 0, 0, 0].tolist() for data in (first, again, other)]
    assert tests[0] == tests[1] == tests[2]
    assert [len(tests[0]), len(first.train), len(first.val)] == [12, 38, 10]
    held = [set(split.images[:, 0, 0, 0].tolist()) for split in (first.train, first.val)]
    assert not held[0] & held[1] & set(tests[0])
    assert torch.equal(first.val.images, again.val.images)
    assert not torch.equal(first.val.images, other.val.images)
    assert not (tmp_path / "sets").exists()


def test_a_source_of_that_name_is_settled_and_names_a_study() -> None:
    source = "lightning:my_data:Whole"
    assert (settled_source(source), source_name(source)) == (source, "Whole")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("Normalized", "item 0 has values from -0.5 to -0.5, not uint8 or within 0 to 1: leave "),
        ("Undefined", "item 0 has values from nan to nan"),
        ("Whole255", "item 0 has values from 255 to 255"),
        ("Sizes", "train: item 1 is 1x4x5, others are 1x4x4: Resize"),
        ("Random", "item 0 is another image each time: leave random transforms out"),
        ("Arrays", "item 0 is a ndarray, not a PIL image"),
        ("Batches", "item 0 is a (2, 1, 4, 4) Tensor, not a PIL image or a tensor (C,H,W)"),
        ("Unlabelled", "item 0 is no (image, label): ValueError"),
        ("Negative", "labels must be 0 or more, got -1"),
        ("Empty", "train: no images"),
        ("OneClass", "at least two different classes"),
        ("OtherVal", "images of train are 1x4x4, those of val 1x8x8: Resize"),
        ("Broken", "setup: OSError: no such disk"),
        ("Streamed", "train_dataloader must give one DataLoader, of a data set with a length"),
        ("Several", "train_dataloader must give one DataLoader"),
        ("WithoutTrain", "train_dataloader: MisconfigurationException"),
        ("Needy", "Needy: TypeError"),
        ("Plain", "data lightning:my_data:Plain is no LightningDataModule"),
        ("None", "AttributeError"),
    ],
)
def test_what_is_no_data_is_one_line(name: str, said: str) -> None:
    with pytest.raises(DataError) as caught:
        load(f"lightning:my_data:{name}", seed=0)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_without_lightning_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("lightning", "lightning.pytorch"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(DataError, match=r"needs lightning: pip install 'hpo-vision\[lightning\]'$"):
        load("lightning:my_data:Whole", seed=0)


def test_a_size_for_pictures_is_refused() -> None:
    options: Any = DataOptions(image_size=32)
    with pytest.raises(ConfigError, match="--image-size is for picture files"):
        load("lightning:my_data:Whole", seed=0, options=options)
