"""What was read once is mapped by the processes that follow, and nothing else is."""

import gc
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from trainer import modules
from trainer.config import DataError
from trainer.data.cache import make_room
from trainer.data.dataset import ImageDataset
from trainer.data.options import DataOptions
from trainer.data.registry import load

DATA = """
import os
import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset

def note(what):
    with open(os.environ["NOTES"], "a") as file:
        file.write(what + "\\n")

class Items(Dataset):
    classes = ["even", "odd"]
    def __init__(self, part, number):
        self.part, self.number = part, number
        self.shift = int(os.environ.get("SHIFT", "0"))
    def __len__(self):
        return self.number
    def __getitem__(self, index):
        if index == self.number - 1:
            note("read " + self.part)
        generator = torch.Generator().manual_seed(index + self.shift)
        return torch.randint(0, 256, (3, 40, 40), generator=generator, dtype=torch.uint8), index % 2

class Own(LightningDataModule):
    def setup(self, stage):
        note("setup " + stage)
    def train_dataloader(self):
        return DataLoader(Items("train", 60))
    def val_dataloader(self):
        return DataLoader(Items("val", 12))
    def test_dataloader(self):
        return DataLoader(Items("test", 8))

class TrainAlone(LightningDataModule):
    def setup(self, stage):
        note("setup " + stage)
    def train_dataloader(self):
        return DataLoader(Items("train", 60))
"""


@pytest.fixture
def notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """What the module has done since it was last asked."""
    (tmp_path / "noting_data.py").write_text(DATA)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("NOTES", str(tmp_path / "notes"))
    monkeypatch.delitem(sys.modules, "noting_data", raising=False)
    modules.find_class.cache_clear()

    def taken() -> list[str]:
        path = tmp_path / "notes"
        lines = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return lines

    return taken


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Forty pictures from long ago, two of them the same."""
    values = np.random.default_rng(0)
    for number in range(40):
        path = tmp_path / "pictures" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = values.integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    shutil.copy(tmp_path / "pictures" / "a" / "0.png", tmp_path / "pictures" / "a" / "copy.png")
    for path in (tmp_path / "pictures").rglob("*.png"):
        os.utime(path, (1e9, 1e9))
    return tmp_path / "pictures"


SOURCES = ("lightning:noting_data:Own", "lightning:noting_data:TrainAlone")


def assert_same(first: ImageDataset, second: ImageDataset) -> None:
    """All that a training sees is the same to the byte."""
    for name in ("train", "val"):
        one, other = getattr(first, name), getattr(second, name)
        assert one.images.numpy().tobytes() == other.images.numpy().tobytes()
        assert one.labels.equal(other.labels)
    for name in ("name", "class_names", "mean", "std", "fingerprint", "flips", "input_size"):
        assert getattr(first, name) == getattr(second, name), name
    assert (first.groups is None) == (second.groups is None)
    if first.groups is not None and second.groups is not None:
        assert first.groups.equal(second.groups)


@pytest.mark.parametrize("source", SOURCES)
def test_a_modules_items_are_read_once_and_are_the_same_to_the_byte(
    source: str, notes: Callable[[], list[str]]
) -> None:
    first = load(source, seed=3)
    assert notes() == ["setup fit", "read train", *(["read val"] if "Own" in source else [])]
    limited = DataOptions(max_memory_bytes=2**20)
    for options in (DataOptions(), limited):
        later = load(source, seed=3, options=options, fingerprint=first.fingerprint)
        assert_same(later, first)
    assert notes() == []
    assert_same(load(source, seed=3), first)  # a launch that makes a study always reads
    assert "read train" in notes()


def test_a_modules_test_split_is_read_when_it_is_opened_and_not_before(
    notes: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    own, drawn = (load(source, seed=0) for source in SOURCES)
    held_out = [data.open_test() for data in (own, drawn)]
    later = [
        load(source, seed=0, fingerprint=data.fingerprint)
        for source, data in zip(SOURCES, (own, drawn), strict=True)
    ]
    notes()
    assert later[0].open_test().images.equal(held_out[0].images)
    assert notes() == ["setup fit", "setup test", "read test"]
    assert later[1].open_test().images.equal(held_out[1].images)
    assert notes() == ["setup fit", "setup fit", "read train"]
    monkeypatch.setenv("SHIFT", "1")
    with pytest.raises(DataError, match="TrainAlone: its items have changed since they were"):
        later[1].open_test()


def test_another_fingerprint_is_not_served(
    notes: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = SOURCES[0]
    first = load(source, seed=0)
    notes()
    assert load(source, seed=0, fingerprint="0" * 64).fingerprint == first.fingerprint
    assert "read train" in notes()
    monkeypatch.setenv("SHIFT", "1")
    other = load(source, seed=0)
    assert other.fingerprint != first.fingerprint
    notes()
    for data in (first, other):
        assert_same(load(source, seed=0, fingerprint=data.fingerprint), data)
    assert notes() == []
    # what is wanted is no longer to be had
    cache = Path(os.environ["HPO_HOME"]) / "cache"
    shutil.rmtree(cache)
    assert load(source, seed=0, fingerprint=first.fingerprint).fingerprint == other.fingerprint
    assert [path.name for path in cache.iterdir() if path.name.startswith("set-")] == []


def file_of(cache: Path, kind: str, name: str) -> Path:
    (folder,) = (path for path in cache.iterdir() if path.name.startswith(kind))
    return folder / name


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def zeroed(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def gone(path: Path) -> None:
    path.unlink()


def changed(path: Path) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "mean": [0.0] * len(content["mean"])}))


@pytest.mark.parametrize(
    ("kind", "name", "breaks"),
    [
        *[("images-", "images", breaks) for breaks in (cut, zeroed, gone)],
        ("images-", "images.whole", gone),
        *[("set-", "about.json", breaks) for breaks in (cut, zeroed, gone, changed)],
        *[("set-", "numbers", breaks) for breaks in (cut, zeroed, gone)],
    ],
)
@pytest.mark.parametrize("with_fingerprint", [True, False])
def test_what_is_broken_in_the_cache_is_made_anew(
    kind: str,
    name: str,
    breaks: Callable[[Path], None],
    with_fingerprint: bool,
    notes: Callable[[], list[str]],
    cache: Path,
) -> None:
    source = SOURCES[0]
    first = load(source, seed=0)
    path = file_of(cache, kind, name)
    whole = path.read_bytes()
    breaks(path)
    notes()
    fingerprint = first.fingerprint if with_fingerprint else None
    again = load(source, seed=0, fingerprint=fingerprint)
    assert "read train" in notes()
    assert file_of(cache, kind, name).read_bytes() == whole
    assert_same(load(source, seed=0, fingerprint=first.fingerprint), again)
    assert notes() == []


@pytest.mark.parametrize("breaks", [cut, zeroed, gone])
def test_broken_images_of_pictures_are_decoded_anew(
    breaks: Callable[[Path], None], pictures: Path, cache: Path
) -> None:
    first = load(str(pictures), seed=0)
    fingerprint, path = first.fingerprint, file_of(cache, "images-", "images")
    whole = path.read_bytes()
    breaks(path)
    for given in (fingerprint, None):
        again = load(str(pictures), seed=0, fingerprint=given)
        assert again.fingerprint == fingerprint
        assert file_of(cache, "images-", "images").read_bytes() == whole


def test_who_knows_the_fingerprint_of_pictures_looks_at_no_file(pictures: Path) -> None:
    first = load(str(pictures), seed=0)
    held_out = first.open_test()
    assert (
        load(str(pictures), seed=0, fingerprint=first.fingerprint)
        .open_test()
        .images.equal(held_out.images)
    )
    pictures.rename(pictures.with_name("elsewhere"))
    later = load(str(pictures), seed=0, fingerprint=first.fingerprint)
    assert_same(later, first)
    assert len(set(first.groups.tolist())) == len(first.groups) - 1  # type: ignore[union-attr,arg-type]
    with pytest.raises(DataError, match="no such folder"):
        later.open_test()
    pictures.with_name("elsewhere").rename(pictures)
    (pictures / "b" / "1.png").unlink()
    with pytest.raises(DataError, match="has changed since it was first read"):
        later.open_test()


def test_another_seed_size_or_source_has_data_of_its_own(pictures: Path, tmp_path: Path) -> None:
    first = load(str(pictures), seed=0)
    shutil.copytree(pictures, tmp_path / "same")
    for source, seed, options in (
        (pictures, 1, DataOptions()),
        (pictures, 0, DataOptions(image_size=32)),
        (tmp_path / "same", 0, DataOptions()),
    ):
        found = load(str(source), seed=seed, options=options, fingerprint=first.fingerprint)
        assert_same(found, load(str(source), seed=seed, options=options))
        assert found.fingerprint == first.fingerprint


def test_what_was_read_is_evicted_like_other_pictures_and_read_again(
    notes: Callable[[], list[str]], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = SOURCES[0]
    fingerprint = load(source, seed=0).fingerprint
    held = load(source, seed=0, fingerprint=fingerprint)
    monkeypatch.setenv("HPO_CACHE_BYTES", "1")
    notes()
    make_room(1)
    assert [path.name.partition("-")[0] for path in cache.iterdir()] == ["images"]  # is in use
    assert load(source, seed=0, fingerprint=fingerprint).train.images.equal(held.train.images)
    assert "read train" in notes()
    del held
    gc.collect()
    make_room(1)
    assert list(cache.iterdir()) == []
    load(source, seed=0, fingerprint=fingerprint)
    assert "read train" in notes()


def test_one_process_reads_and_the_others_wait_for_it(
    notes: Callable[[], list[str]], cache: Path, tmp_path: Path
) -> None:
    source = SOURCES[0]
    fingerprint = load(source, seed=0).fingerprint
    shutil.rmtree(cache)
    notes()
    program = (
        "import sys\nfrom trainer.data.registry import load\n"
        "data = load(sys.argv[1], seed=0, fingerprint=sys.argv[2])\n"
        "print(data.fingerprint, int(data.train.images.sum()))"
    )
    project = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{project}"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, source, fingerprint],
            stdout=subprocess.PIPE,
            env=environment,
        )
        for _ in range(3)
    ]
    said = {process.communicate(timeout=240)[0] for process in processes}
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert len(said) == 1
    assert notes() == ["setup fit", "read train", "read val"]
