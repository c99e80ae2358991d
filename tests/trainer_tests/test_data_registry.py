"""Sources by name or path, and the sources that need no made files: digits, Fashion-MNIST."""

import gzip
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_digits
from torchvision.datasets import FashionMNIST

from trainer.config import DataError
from trainer.data import fashion_mnist
from trainer.data.dataset import ImageDataset, Split
from trainer.data.registry import SOURCES, load, settled_source, source_name

_NOWHERE = "http://127.0.0.1:9/"


def _rows(split: Split) -> set[bytes]:
    return {image.numpy().tobytes() for image in split.images}


@pytest.fixture(scope="module")
def digits() -> ImageDataset:
    return load("digits", seed=0)


@pytest.fixture(scope="module")
def fashion() -> ImageDataset:
    return load("fashion-mnist", seed=0)


def test_sources_are_known_without_torch() -> None:
    code = "import sys, trainer.data.registry as r; r.source_name('digits'); print(*sys.modules)"
    modules = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert "torch" not in modules


def test_an_unknown_source_lists_the_names_and_the_nearest() -> None:
    with pytest.raises(DataError) as caught:
        load("fashon-mnist", seed=0)
    message = str(caught.value)
    assert "\n" not in message
    assert "did you mean fashion-mnist?" in message
    assert all(name in message for name in SOURCES)


def test_a_name_that_no_file_can_have_is_an_unknown_source() -> None:
    for source in ("x" * 300, "a\0b"):
        with pytest.raises(DataError, match="unknown data set"):
            settled_source(source)


def test_a_study_is_named_after_its_source() -> None:
    assert source_name("digits") == "digits"
    assert source_name("some/where/My photos (2)/") == "My-photos-2"
    assert source_name("/") == "data"
    for odd in ("ä" * 80, "a" * 80, ".hidden", "-x"):
        assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", source_name(f"./{odd}"))


def test_a_settled_source_holds_in_any_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "birds").mkdir()
    monkeypatch.chdir(tmp_path)
    assert settled_source("birds") == settled_source("./birds") == str(tmp_path / "birds")
    assert settled_source("cifar10") == "cifar10"
    assert settled_source("~/birds") == str(Path.home() / "birds")
    with pytest.raises(DataError, match="unknown data set"):
        settled_source("")


@pytest.mark.parametrize("name", ["n" * 600, "two\0parts"])
def test_names_that_no_file_can_have_are_refused_in_one_line(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="unknown data set"):
        settled_source(name)
    with pytest.raises(DataError, match="no such folder"):
        load(str(tmp_path / ("n" * 600)), seed=0)


def test_digits_are_scikit_learns_images_spread_over_0_to_255(digits: ImageDataset) -> None:
    splits = [digits.train, digits.val, digits.open_test()]
    assert [len(split) for split in splits] == [1150, 288, 359]
    assert digits.input_size == (1, 8, 8)
    assert digits.class_names == tuple("0123456789")
    assert not digits.flips
    source = torch.tensor(load_digits().images)
    ours = torch.cat([split.images for split in splits]).squeeze(1)
    expected = (source * 255 / 16).round().to(torch.uint8)
    assert sorted(map(bytes, ours.flatten(1).numpy())) == sorted(
        map(bytes, expected.flatten(1).numpy())
    )


def test_each_class_of_the_digits_is_in_each_split_in_its_share(digits: ImageDataset) -> None:
    for split in (digits.train, digits.val, digits.open_test()):
        shares = torch.bincount(split.labels, minlength=10) / len(split)
        assert shares.min() > 0.09
        assert shares.max() < 0.11


def test_no_seed_changes_the_test_split_of_the_digits(digits: ImageDataset) -> None:
    other = load("digits", seed=1)
    assert torch.equal(digits.open_test().images, other.open_test().images)
    assert digits.fingerprint == other.fingerprint
    assert not torch.equal(digits.val.labels, other.val.labels)
    assert not _rows(other.open_test()) & _rows(other.train.take(range(1150)))


def test_the_same_seed_gives_the_same_digits(digits: ImageDataset) -> None:
    again = load("digits", seed=0)
    assert torch.equal(again.train.images, digits.train.images)
    assert torch.equal(again.val.labels, digits.val.labels)


def test_the_digits_have_this_fingerprint_on_every_machine(digits: ImageDataset) -> None:
    assert digits.fingerprint.startswith("1f6f9a1faa62d24f")


def test_fashion_mnist_is_read_from_debians_package(fashion: ImageDataset) -> None:
    assert [len(split) for split in (fashion.train, fashion.val)] == [54_000, 6_000]
    assert fashion.input_size == (1, 28, 28)
    assert fashion.fingerprint.startswith("0d9eceb07f2ccbdb")
    assert torch.bincount(fashion.val.labels).tolist() == [600] * 10
    # the published mean and standard deviation of all 60,000 training images
    whole = fashion.with_validation_in_training()
    assert whole.mean == pytest.approx((0.2860,), abs=1e-4)
    assert whole.std == pytest.approx((0.3530,), abs=1e-4)


def test_fashion_mnists_test_split_is_the_official_one(fashion: ImageDataset) -> None:
    test = fashion.open_test()
    assert torch.bincount(test.labels).tolist() == [1_000] * 10
    assert test.labels[:5].tolist() == [9, 2, 1, 1, 6]


@pytest.fixture
def data_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty data root on a machine without Debian's package and without a network."""
    monkeypatch.setenv("HPO_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(fashion_mnist, "DEBIAN_FOLDER", tmp_path / "debian")
    monkeypatch.setattr(FashionMNIST, "mirrors", [_NOWHERE])
    return tmp_path / "data"


def _write_idx(folder: Path, *, compressed: bool, num_images: int = 40) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for part in ("train", "t10k"):
        pixels = bytes(i % 251 for i in range(num_images * 28 * 28))
        sizes = b"".join(n.to_bytes(4, "big") for n in (num_images, 28, 28))
        content = {
            f"{part}-images-idx3-ubyte": b"\0\0\x08\x03" + sizes + pixels,
            f"{part}-labels-idx1-ubyte": b"\0\0\x08\x01"
            + num_images.to_bytes(4, "big")
            + bytes(i % 10 for i in range(num_images)),
        }
        for name, payload in content.items():
            if compressed:
                (folder / f"{name}.gz").write_bytes(gzip.compress(payload))
            else:
                (folder / name).write_bytes(payload)


@pytest.mark.parametrize(
    ("place", "compressed"), [("fashion-mnist", True), ("FashionMNIST/raw", False)]
)
def test_fashion_mnist_is_found_in_the_data_root(
    data_root: Path, place: str, compressed: bool
) -> None:
    _write_idx(data_root / place, compressed=compressed)
    data = load("fashion-mnist", seed=0)
    assert (len(data.train), len(data.val), len(data.open_test())) == (30, 10, 40)


def test_the_test_files_are_not_read_before_the_test_split_is_opened(data_root: Path) -> None:
    folder = data_root / "fashion-mnist"
    _write_idx(folder, compressed=True)
    for name in ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"):
        (folder / name).write_bytes(b"torn")
    data = load("fashion-mnist", seed=0)
    with pytest.raises(DataError, match=r"t10k-images-idx3-ubyte\.gz can't be read"):
        data.open_test()


@pytest.mark.parametrize("keep", [0, 3, 100, 20_000])
def test_a_torn_file_is_named(data_root: Path, keep: int) -> None:
    folder = data_root / "fashion-mnist"
    _write_idx(folder, compressed=False)
    images = folder / "train-images-idx3-ubyte"
    images.write_bytes(images.read_bytes()[:keep])
    with pytest.raises(DataError, match="train-images-idx3-ubyte"):
        load("fashion-mnist", seed=0)


def test_labels_that_do_not_fit_the_images_are_refused(data_root: Path) -> None:
    _write_idx(data_root / "fashion-mnist", compressed=False)
    _write_idx(data_root / "other", compressed=False, num_images=41)
    name = "train-labels-idx1-ubyte"
    shutil.copy(data_root / "other" / name, data_root / "fashion-mnist" / name)
    with pytest.raises(DataError, match="don't fit together"):
        load("fashion-mnist", seed=0)


def test_without_fashion_mnist_and_a_network_one_line_says_what_to_put_where(
    data_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(DataError) as caught:
        load("fashion-mnist", seed=0)
    message = str(caught.value)
    assert "\n" not in message
    assert "dataset-fashion-mnist" in message
    assert str(data_root / "fashion-mnist") in message
    assert list(data_root.iterdir()) == []
    assert capsys.readouterr().out == ""


def test_a_data_root_that_cannot_be_made_is_one_line(
    data_root: Path,
) -> None:
    data_root.write_text("a file is in the way")
    with pytest.raises(DataError, match="fashion-mnist is not whole under"):
        load("fashion-mnist", seed=0)
