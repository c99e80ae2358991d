"""torchvision's sets: each from a small archive in its publisher's layout, made here."""

import gzip
import hashlib
import io
import json
import pickle
import socket
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.datasets as sets
from PIL import Image
from scipy.io import savemat

from trainer.config import ConfigError, DataError
from trainer.data.options import DataOptions
from trainer.data.published import PUBLISHED
from trainer.data.registry import load

_VALUES = np.random.default_rng(0)


def _noise(*shape: int) -> Any:
    return _VALUES.integers(0, 256, shape, dtype=np.uint8)


def _picture(form: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(_noise(40, 48, 3)).save(file, form)
    return file.getvalue()


def _mat(**values: Any) -> bytes:
    file = io.BytesIO()
    savemat(file, values)
    return file.getvalue()


def _tar(path: Path, files: Mapping[str, bytes]) -> str:
    """Write an archive; its md5."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return _md5(path.read_bytes())


def _zip(path: Path, files: Mapping[str, bytes]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return _md5(path.read_bytes())


def _file(path: Path, content: bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return _md5(content)


def _md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def _make_cifar100(root: Path, patch: pytest.MonkeyPatch) -> None:
    names = ["apple", "bear", "clock"]
    files = {"meta": pickle.dumps({"fine_label_names": names})}
    for part, number in (("train", 30), ("test", 9)):
        labels = [n % 3 for n in range(number)]
        files[part] = pickle.dumps({"data": _noise(number, 3072), "fine_labels": labels})
    digest = _tar(
        root / "cifar-100-python.tar.gz",
        {f"cifar-100-python/{name}": content for name, content in files.items()},
    )
    patch.setattr(sets.CIFAR100, "tgz_md5", digest)
    for attribute, part in (("train_list", "train"), ("test_list", "test")):
        patch.setattr(sets.CIFAR100, attribute, [[part, _md5(files[part])]])
    patch.setattr(sets.CIFAR100, "meta", {**sets.CIFAR100.meta, "md5": _md5(files["meta"])})


def _make_dtd(root: Path, patch: pytest.MonkeyPatch) -> None:
    files: dict[str, bytes] = {}
    for part, number in (("train", 12), ("val", 6), ("test", 6)):
        names = [f"{('banded', 'dotted', 'woven')[n % 3]}/{part}_{n}.jpg" for n in range(number)]
        files |= {f"dtd/images/{name}": _picture("JPEG") for name in names}
        files[f"dtd/labels/{part}1.txt"] = "\n".join(names).encode()
    patch.setattr(sets.DTD, "_MD5", _tar(root / "dtd" / "dtd-r1.0.1.tar.gz", files))


def _make_eurosat(root: Path, patch: pytest.MonkeyPatch) -> None:
    files = {
        f"2750/{name}/{name}_{number}.jpg": _picture("JPEG")
        for name in ("Forest", "River", "SeaLake")
        for number in range(10)
    }
    digest = _zip(root / "eurosat" / "EuroSAT.zip", files)
    _expect(patch, "torchvision.datasets.eurosat", {"EuroSAT.zip": digest})


def _make_flowers102(root: Path, patch: pytest.MonkeyPatch) -> None:
    labels = np.array([1 + n % 3 for n in range(24)])
    ids = np.arange(1, 25)
    contents = {
        "label": _mat(labels=labels),
        "setid": _mat(trnid=ids[:12], valid=ids[12:18], tstid=ids[18:]),
    }
    files = {f"jpg/image_{number:05d}.jpg": _picture("JPEG") for number in ids.tolist()}
    below = root / "flowers-102"
    digests = {"image": _tar(below / "102flowers.tgz", files)}
    known = sets.Flowers102._file_dict
    for key, content in contents.items():
        digests[key] = _file(below / known[key][0], content)
    patch.setattr(
        sets.Flowers102, "_file_dict", {key: (known[key][0], d) for key, d in digests.items()}
    )


def _make_food101(root: Path, patch: pytest.MonkeyPatch) -> None:
    files: dict[str, bytes] = {}
    for part, number in (("train", 8), ("test", 3)):
        named = {
            name: [f"{name}/{part}{n}" for n in range(number)]
            for name in ("apple_pie", "sushi", "waffles")
        }
        files[f"food-101/meta/{part}.json"] = json.dumps(named).encode()
        files |= {
            f"food-101/images/{below}.jpg": _picture("JPEG")
            for names in named.values()
            for below in names
        }
    patch.setattr(sets.Food101, "_MD5", _tar(root / "food-101.tar.gz", files))


def _make_gtsrb(root: Path, patch: pytest.MonkeyPatch) -> None:
    training = {
        f"GTSRB/Training/{label:05d}/{number:05d}.ppm": _picture("PPM")
        for label in range(43)
        for number in range(3)
    }
    tested = {f"GTSRB/Final_Test/Images/{number:05d}.ppm": _picture("PPM") for number in range(6)}
    header = "Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId"
    rows = [f"{number:05d}.ppm;48;40;0;0;48;40;{number}" for number in range(6)]
    truth = {"GT-final_test.csv": "\n".join([header, *rows]).encode()}
    archives = {
        "GTSRB-Training_fixed.zip": training,
        "GTSRB_Final_Test_Images.zip": tested,
        "GTSRB_Final_Test_GT.zip": truth,
    }
    digests = {name: _zip(root / "gtsrb" / name, files) for name, files in archives.items()}
    _expect(patch, "torchvision.datasets.gtsrb", digests)


def _make_imagenette(root: Path, patch: pytest.MonkeyPatch) -> None:
    files = {
        f"imagenette2/{part}/{wnid}/{part}_{number}.JPEG": _picture("JPEG")
        for part, num_pictures in (("train", 8), ("val", 3))
        for wnid in sets.Imagenette._WNID_TO_CLASS
        for number in range(num_pictures)
    }
    digest = _tar(root / "imagenette2.tgz", files)
    known = sets.Imagenette._ARCHIVES
    patch.setattr(sets.Imagenette, "_ARCHIVES", {**known, "full": (known["full"][0], digest)})


def _make_mnist_like(loader: Any) -> Callable[[Path, pytest.MonkeyPatch], None]:
    def make(root: Path, patch: pytest.MonkeyPatch) -> None:
        resources = []
        for part, number in (("train", 30), ("t10k", 10)):
            sizes = [number.to_bytes(4, "big"), *[(28).to_bytes(4, "big")] * 2]
            contents = {
                f"{part}-images-idx3-ubyte.gz": b"\0\0\x08\x03"
                + b"".join(sizes)
                + _noise(number, 28, 28).tobytes(),
                f"{part}-labels-idx1-ubyte.gz": b"\0\0\x08\x01"
                + sizes[0]
                + bytes(n % 10 for n in range(number)),
            }
            for name, content in contents.items():
                path = root / loader.__name__ / "raw" / name
                resources.append((name, _file(path, gzip.compress(content))))
        patch.setattr(loader, "resources", resources)

    return make


def _make_pets(root: Path, patch: pytest.MonkeyPatch) -> None:
    breeds = ("Abyssinian", "yorkshire_terrier")
    annotations: dict[str, bytes] = {}
    pictures: dict[str, bytes] = {}
    for part, number in (("trainval", 16), ("test", 6)):
        lines = []
        for n in range(number):
            name = f"{breeds[n % 2]}_{part}{n}".replace(f"_{part}", f"_{len(pictures)}")
            pictures[f"images/{name}.jpg"] = _picture("JPEG")
            lines.append(f"{name} {1 + n % 2} {1 + n % 2} 1")
        annotations[f"annotations/{part}.txt"] = "\n".join(lines).encode()
    below = root / "oxford-iiit-pet"
    digests = [
        _tar(below / "images.tar.gz", pictures),
        _tar(below / "annotations.tar.gz", annotations),
    ]
    known = sets.OxfordIIITPet._RESOURCES
    patch.setattr(
        sets.OxfordIIITPet,
        "_RESOURCES",
        tuple((url, digest) for (url, _), digest in zip(known, digests, strict=True)),
    )


def _make_stl10(root: Path, patch: pytest.MonkeyPatch) -> None:
    files = {
        "train_X.bin": _noise(20, 3, 96, 96).tobytes(),
        "train_y.bin": bytes(1 + n % 2 for n in range(20)),
        "unlabeled_X.bin": b"",
        "test_X.bin": _noise(6, 3, 96, 96).tobytes(),
        "test_y.bin": bytes(1 + n % 2 for n in range(6)),
        "class_names.txt": b"airplane\nbird\n",
    }
    digest = _tar(
        root / "stl10_binary.tar.gz",
        {f"stl10_binary/{name}": content for name, content in files.items()},
    )
    patch.setattr(sets.STL10, "tgz_md5", digest)
    for attribute in ("train_list", "test_list"):
        named = [[name, _md5(files[name])] for name, _ in getattr(sets.STL10, attribute)]
        patch.setattr(sets.STL10, attribute, named)


def _make_svhn(root: Path, patch: pytest.MonkeyPatch) -> None:
    split_list = {}
    for part, number in (("train", 40), ("test", 10)):
        labels = np.array([[1 + n % 10] for n in range(number)], dtype=np.uint8)
        content = _mat(X=_noise(32, 32, 3, number), y=labels)
        url, name, _ = sets.SVHN.split_list[part]
        split_list[part] = [url, name, _file(root / name, content)]
    patch.setattr(sets.SVHN, "split_list", split_list)


def _expect(patch: pytest.MonkeyPatch, module: str, digests: Mapping[str, str]) -> None:
    """For a loader whose checksums stand in its code: the archives' own are expected."""
    from torchvision.datasets.utils import download_and_extract_archive

    def expecting(url: str, download_root: str, md5: str) -> None:
        assert len(md5) == 32
        download_and_extract_archive(
            url, download_root=download_root, md5=digests[url.rpartition("/")[2]]
        )

    patch.setattr(f"{module}.download_and_extract_archive", expecting)


MAKERS: dict[str, Callable[[Path, pytest.MonkeyPatch], None]] = {
    "cifar100": _make_cifar100,
    "dtd": _make_dtd,
    "eurosat": _make_eurosat,
    "flowers102": _make_flowers102,
    "food101": _make_food101,
    "gtsrb": _make_gtsrb,
    "imagenette": _make_imagenette,
    "kmnist": _make_mnist_like(sets.KMNIST),
    "mnist": _make_mnist_like(sets.MNIST),
    "oxford-pets": _make_pets,
    "stl10": _make_stl10,
    "svhn": _make_svhn,
}
EXPECTED: dict[str, tuple[tuple[int, int, int], list[int], tuple[str, ...]]] = {
    "cifar100": ((3, 32, 32), [24, 6, 9], ("apple", "bear", "clock")),
    "dtd": ((3, 40, 40), [12, 6, 6], ("banded", "dotted", "woven")),
    "eurosat": ((3, 40, 40), [19, 5, 6], ("Forest", "River", "SeaLake")),
    "flowers102": ((3, 40, 40), [12, 6, 6], ("pink primrose", "hard-leaved pocket orchid")),
    "food101": ((3, 40, 40), [19, 5, 9], ("apple_pie", "sushi", "waffles")),
    "gtsrb": ((3, 40, 40), [86, 43, 6], ("00000", "00001", "00002")),
    "imagenette": ((3, 40, 40), [64, 16, 30], ("tench", "English springer", "cassette player")),
    "kmnist": ((1, 28, 28), [20, 10, 10], ("o", "ki", "su")),
    "mnist": ((1, 28, 28), [20, 10, 10], ("0", "1", "2")),
    "oxford-pets": ((3, 40, 40), [13, 3, 6], ("Abyssinian", "Yorkshire Terrier")),
    "stl10": ((3, 96, 96), [16, 4, 6], ("airplane", "bird")),
    "svhn": ((3, 32, 32), [30, 10, 10], ("0", "1", "2")),
}


@pytest.fixture
def data_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty data root on a machine without a network."""
    root = tmp_path / "data"
    root.mkdir()
    monkeypatch.setenv("HPO_DATA", str(root))

    def refuse(*_args: object, **_words: object) -> None:
        raise OSError("no network here")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return root


def test_each_set_of_the_table_is_tried() -> None:
    assert set(PUBLISHED) == set(MAKERS) == set(EXPECTED)


@pytest.mark.parametrize("name", sorted(MAKERS))
def test_a_set_is_read_from_its_publishers_archives(
    data_root: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    MAKERS[name](data_root, monkeypatch)
    archives = {path for path in data_root.rglob("*") if path.is_file()}
    data = load(name, seed=0)
    input_size, numbers, class_names = EXPECTED[name]
    assert data.input_size == input_size
    assert [len(data.train), len(data.val), len(data.open_test())] == numbers
    assert data.class_names[: len(class_names)] == class_names
    assert data.findings.unusable == ()
    assert archives <= {path for path in data_root.rglob("*") if path.is_file()}
    assert not any(path.name.startswith(".") for path in data_root.iterdir())
    again = load(name, seed=0)
    assert again.fingerprint == data.fingerprint
    assert torch.equal(again.val.images, data.val.images)


@pytest.mark.parametrize("name", sorted(MAKERS))
def test_without_the_archives_and_a_network_one_line_says_what_to_put_where(
    data_root: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(DataError) as caught:
        load(name, seed=0)
    message = str(caught.value)
    assert message.isprintable()
    assert message.startswith(f"{name} is not whole under {data_root}")
    assert all(archive in message for archive in PUBLISHED[name].archives)
    assert list(data_root.iterdir()) == []
    assert capsys.readouterr().out == ""


def test_an_archive_with_another_checksum_is_not_unpacked(
    data_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _make_food101(data_root, monkeypatch)
    monkeypatch.setattr(sets.Food101, "_MD5", "0" * 32)
    with pytest.raises(DataError, match=r"food101 is not whole .*food-101\.tar\.gz"):
        load("food101", seed=0)
    assert [path.name for path in data_root.iterdir()] == ["food-101.tar.gz"]


def test_what_a_killed_process_half_unpacked_is_made_whole(
    data_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _make_pets(data_root, monkeypatch)
    (data_root / "oxford-iiit-pet" / "images").mkdir()
    (data_root / "oxford-iiit-pet" / "images" / "half.jpg").write_bytes(b"")
    assert len(load("oxford-pets", seed=0).open_test()) == 6


def test_mirrored_digits_and_signs_are_others() -> None:
    assert not any(PUBLISHED[name].flips for name in ("mnist", "kmnist", "svhn", "gtsrb"))


def test_pictures_of_a_set_are_scaled_and_arrays_are_not(
    data_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _make_dtd(data_root, monkeypatch)
    _make_svhn(data_root, monkeypatch)
    options = DataOptions(image_size=64)
    assert load("dtd", seed=0, options=options).input_size == (3, 64, 64)
    with pytest.raises(ConfigError, match="svhn has images of one size"):
        load("svhn", seed=0, options=options)
