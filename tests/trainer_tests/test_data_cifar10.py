"""CIFAR-10 in its publisher's layout: small batches, with torchvision's checksums set to theirs."""

import hashlib
import pickle
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.datasets import CIFAR10

from trainer.config import DataError
from trainer.data.cifar10 import _unpack
from trainer.data.registry import load

_NAMES = ["airplane", "automobile", "bird"]
_IMAGES_PER_BATCH = 12


def _md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()


def _write_batch(path: Path, seed: int) -> None:
    values = np.random.default_rng(seed)
    data = values.integers(0, 256, (_IMAGES_PER_BATCH, 3072), dtype=np.uint8)
    labels = [i % 3 for i in range(_IMAGES_PER_BATCH)]
    path.write_bytes(pickle.dumps({"data": data, "labels": labels}))


@pytest.fixture
def data_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data root with the archive alone, and no network."""
    root, batches = tmp_path / "data", tmp_path / "cifar-10-batches-py"
    root.mkdir()
    batches.mkdir()
    train_names = [f"data_batch_{i}" for i in range(1, 6)]
    for seed, name in enumerate([*train_names, "test_batch"]):
        _write_batch(batches / name, seed)
    meta = batches / "batches.meta"
    meta.write_bytes(pickle.dumps({"label_names": _NAMES}))
    archive = root / CIFAR10.filename
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(batches, arcname=batches.name)
    monkeypatch.setattr(
        CIFAR10, "train_list", [[name, _md5(batches / name)] for name in train_names]
    )
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", _md5(batches / "test_batch")]])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": _md5(meta)})
    monkeypatch.setattr(CIFAR10, "tgz_md5", _md5(archive))
    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")
    monkeypatch.setenv("HPO_DATA", str(root))
    shutil.rmtree(batches)
    return root


def test_the_archive_in_the_data_root_is_unpacked_and_read(data_root: Path) -> None:
    data = load("cifar10", seed=0)
    assert (len(data.train), len(data.val)) == (48, 12)
    assert data.input_size == (3, 32, 32)
    assert data.class_names == tuple(_NAMES)
    assert data.flips
    assert sorted(path.name for path in data_root.iterdir()) == [
        "cifar-10-batches-py",
        "cifar-10-python.tar.gz",
    ]


@pytest.mark.usefixtures("data_root")
def test_channels_are_planes_of_red_green_and_blue() -> None:
    test = load("cifar10", seed=0).open_test()
    batch = np.random.default_rng(5).integers(0, 256, (_IMAGES_PER_BATCH, 3072), dtype=np.uint8)
    assert torch.equal(test.images, torch.from_numpy(batch).reshape(-1, 3, 32, 32))
    assert test.labels.tolist() == [i % 3 for i in range(_IMAGES_PER_BATCH)]


@pytest.mark.usefixtures("data_root")
def test_the_seed_draws_validation_and_nothing_else() -> None:
    first, second = load("cifar10", seed=0), load("cifar10", seed=1)
    assert first.fingerprint == second.fingerprint
    assert torch.equal(first.open_test().images, second.open_test().images)
    assert not torch.equal(first.val.images, second.val.images)


def test_an_unpacked_batch_that_was_changed_is_replaced_from_the_archive(data_root: Path) -> None:
    first = load("cifar10", seed=0)
    (data_root / "cifar-10-batches-py" / "data_batch_2").write_bytes(b"something else")
    assert load("cifar10", seed=0).fingerprint == first.fingerprint


@pytest.mark.parametrize("content", [None, b"torn"])
def test_without_the_archive_and_a_network_one_line_says_what_to_put_where(
    data_root: Path, content: bytes | None, capsys: pytest.CaptureFixture[str]
) -> None:
    archive = data_root / CIFAR10.filename
    archive.unlink()
    if content is not None:
        archive.write_bytes(content)
    with pytest.raises(DataError) as caught:
        load("cifar10", seed=0)
    message = str(caught.value)
    assert "\n" not in message
    assert f"put the published cifar-10-python.tar.gz into {data_root}" in message
    assert not (data_root / "cifar-10-batches-py").exists()
    assert capsys.readouterr().out == ""


def test_a_batch_with_another_checksum_is_never_unpickled(data_root: Path) -> None:
    load("cifar10", seed=0)
    (data_root / CIFAR10.filename).unlink()
    witness = data_root / "witness"

    class Trap:
        def __reduce__(self) -> tuple[object, ...]:
            return witness.touch, ()

    (data_root / "cifar-10-batches-py" / "data_batch_1").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(DataError, match="cifar10"):
        load("cifar10", seed=0)
    assert not witness.exists()


def test_a_hostile_archive_leaves_plain_files_in_its_one_folder_alone(tmp_path: Path) -> None:
    archive, unpacked = tmp_path / "archive.tar", tmp_path / "in" / CIFAR10.base_folder
    unpacked.parent.mkdir()
    folder = unpacked.name
    witness = tmp_path / "witness"
    with tarfile.open(archive, "w") as tar:
        names = ("../up", f"{folder}/../../up", str(tmp_path / "absolute"), f"{folder}/sub/deep")
        for name in (*names, f"{folder}/.."):
            tar.addfile(tarfile.TarInfo(name))
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE):
            member = tarfile.TarInfo(f"{folder}/of-type-{kind.decode()}")
            member.type, member.linkname = kind, str(witness)
            tar.addfile(member)
        tar.addfile(tarfile.TarInfo(f"{folder}/good"))
    _unpack(archive, unpacked)
    assert [path.name for path in unpacked.iterdir()] == ["good"]
    assert sorted(path.name for path in tmp_path.rglob("*")) == sorted(
        ["archive.tar", "in", folder, "good"]
    )
