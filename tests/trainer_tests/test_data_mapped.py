"""Images in a mapped file: tensors like any other, of which a process keeps only some in memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from trainer.config import TrainConfig
from trainer.data.cache import held_folder
from trainer.data.dataset import Split, channel_statistics
from trainer.data.mapped import MappedImages, join, map_images, write_whole
from trainer.data.options import DataOptions
from trainer.data.registry import load
from trainer.device import DevicePlan
from trainer.loop import train

SHAPE = (200, 3, 32, 32)
VALUES = np.random.default_rng(0).integers(0, 256, SHAPE, dtype=np.uint8)


def _mapped(max_memory_bytes: int | None) -> Tensor:
    def build(folder: Path) -> None:
        (folder / "images").write_bytes(VALUES.tobytes())

    folder = held_folder("images-x", build, num_bytes=VALUES.nbytes)
    return map_images(folder, "images", SHAPE, max_memory_bytes=max_memory_bytes)


@pytest.mark.parametrize("limit", [None, 2**16, 2**30])
def test_they_are_what_the_file_holds(limit: int | None) -> None:
    images = _mapped(limit)
    assert isinstance(images, MappedImages) == (limit == 2**16)
    whole = torch.from_numpy(VALUES)
    chosen = torch.randperm(200)[:64]
    assert torch.equal(images, whole)
    assert torch.equal(images.index_select(0, chosen), whole[chosen])
    assert torch.equal(images[50:120][3:9], whole[53:59])
    assert torch.equal(images[chosen], whole[chosen])
    assert torch.equal(images[7], whole[7])
    assert images.to("cpu") is images
    assert torch.equal(images.to(torch.float32), whole.float())
    assert type(images[:100].index_select(0, chosen[:2] // 2)) is Tensor
    assert channel_statistics(images) == channel_statistics(whole)
    assert Split(images, torch.zeros(200, dtype=torch.int64)).take([3, 1]).images.shape[0] == 2


@pytest.mark.parametrize("limit", [None, 2**16])
def test_neighbours_are_joined_without_a_copy(limit: int | None) -> None:
    images = _mapped(limit)
    joined = join(images[:120], images[120:])
    assert torch.equal(joined, torch.from_numpy(VALUES))
    assert joined.data_ptr() == images.data_ptr()
    assert type(joined) is type(images)
    for first, second in ((images[120:], images[:120]), (images[:100], images[120:])):
        copied = join(first, second)
        assert torch.equal(copied, torch.cat([first, second]))
        assert copied.data_ptr() != first.data_ptr()


def test_the_folder_is_held_as_long_as_a_tensor_shows_it(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HPO_CACHE_BYTES", "1")
    images = _mapped(2**16)[:5].index_select(0, torch.tensor([0])), _mapped(None)[50:60]

    def other() -> list[str]:
        held_folder("images-y", lambda _folder: None, num_bytes=1).let_go()
        return sorted(path.name for path in cache.iterdir())

    assert "images-x" in other()
    assert int(images[1].sum()) == int(VALUES[50:60].sum())
    del images
    (cache / "images-y").rmdir()
    assert other() == ["images-y"]


def test_a_file_for_which_there_is_no_room_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"space|large"):
        write_whole(tmp_path / "images", 2**55)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """600 pictures that are 84 MiB as images of 224 x 224."""
    root = tmp_path_factory.mktemp("large")
    values = np.random.default_rng(0)
    for number in range(600):
        (root / "ab"[number % 2]).mkdir(exist_ok=True)
        pixels = values.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        path = root / "ab"[number % 2] / f"{number}.png"
        Image.fromarray(pixels).save(path)
        os.utime(path, (1e9, 1e9))
    return root


_MEASURE = """
import gc, json, sys
from pathlib import Path

import torch
from trainer.data.options import DataOptions
from trainer.data.registry import load

def peak():
    status = Path("/proc/self/status").read_text().splitlines()
    Path("/proc/self/clear_refs").write_text("5")
    return int(next(line for line in status if line.startswith("VmHWM")).split()[1]) * 1024

limit = int(sys.argv[2]) or None
options = DataOptions(image_size=224, max_memory_bytes=limit)
load(sys.argv[1], seed=0, options=options)  # what is imported and kept is not counted below
gc.collect()
peak()
before = peak()
data = load(sys.argv[1], seed=0, options=options)
whole = data.with_validation_in_training()
for images in (data.train.images, data.val.images, whole.train.images):
    for chosen in torch.split(torch.randperm(len(images)), 16):
        images.index_select(0, chosen)
    for start in range(0, len(images), 16):
        images[start : start + 16].max()
print(json.dumps(peak() - before))
"""


def _more_memory(folder: Path, limit: int) -> int:
    """By how many bytes the peak grows while the data is read and gone through."""
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(folder), str(limit)],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    return int(json.loads(done.stdout))


def test_memory_stays_bounded_on_a_folder_larger_than_the_limit(folder: Path) -> None:
    """All images are 69 MiB, a batch of 16 is 2."""
    limit = 16 * 2**20
    assert _more_memory(folder, limit) < limit + 16 * 2**20
    assert _more_memory(folder, 0) > 60 * 2**20


def test_a_training_is_the_same_with_and_without_a_limit(folder: Path) -> None:
    losses = []
    for limit in (None, 2**20):
        data = load(str(folder), seed=0, options=DataOptions(image_size=32, max_memory_bytes=limit))
        config = TrainConfig(backbone="smallcnn", epochs=1, batch_size=64, flip=True)
        reports = list(train(config, data, DevicePlan(device="cpu")))
        losses.append([(r.train_loss, r.val_loss) for r in reports])
    assert losses[0] == losses[1]
