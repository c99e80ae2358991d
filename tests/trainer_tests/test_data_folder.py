"""Folders of pictures: layouts, sizes and modes mixed, and what is wrong with them in one line."""

import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from trainer.config import DataError
from trainer.data.dataset import Split
from trainer.data.registry import load

_MODES = ("RGB", "L", "RGBA", "P", "CMYK")


def _write_class(folder: Path, num_pictures: int, *, side: int = 40, seed: int = 0) -> None:
    """Pictures of mixed sizes (shorter side as given), modes and formats."""
    folder.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng([seed, *folder.name.encode()])
    for number in range(num_pictures):
        shape = (side, side + number % 3 * 10, 3)
        image = Image.fromarray(values.integers(0, 256, shape, dtype=np.uint8))
        mode = _MODES[number % len(_MODES)]
        image.convert(mode).save(folder / f"{number}{'.jpg' if mode == 'CMYK' else '.png'}")


@pytest.fixture
def animals(tmp_path: Path) -> Path:
    root = tmp_path / "animals"
    _write_class(root / "cats", 20)
    _write_class(root / "dogs", 10)
    return root


def _rows(split: Split) -> set[bytes]:
    return {image.numpy().tobytes() for image in split.images}


def test_each_sub_folder_is_a_class(animals: Path) -> None:
    data = load(str(animals), seed=0)
    assert data.name == "animals"
    assert data.class_names == ("cats", "dogs")
    assert data.input_size == (3, 40, 40)
    assert data.flips
    counts = [torch.bincount(s.labels).tolist() for s in (data.train, data.val, data.open_test())]
    assert counts == [[13, 6], [3, 2], [4, 2]]


def test_no_picture_is_in_two_splits(animals: Path) -> None:
    data = load(str(animals), seed=3)
    train, val, test = _rows(data.train), _rows(data.val), _rows(data.open_test())
    assert len(train | val | test) == len(train) + len(val) + len(test) == 30


def test_neither_seed_nor_place_nor_file_names_change_the_test_split(
    animals: Path, tmp_path: Path
) -> None:
    first = load(str(animals), seed=0)
    copy = tmp_path / "elsewhere"
    shutil.copytree(animals, copy)
    for number, path in enumerate(sorted((copy / "cats").iterdir(), reverse=True)):
        path.rename(path.with_name(f"renamed-{number}{path.suffix}"))
    second = load(str(copy), seed=1)
    assert first.fingerprint == second.fingerprint
    assert torch.equal(first.open_test().images, second.open_test().images)
    assert not torch.equal(first.val.images, second.val.images)


def test_another_picture_is_another_fingerprint(animals: Path) -> None:
    first = load(str(animals), seed=0).fingerprint
    Image.new("RGB", (40, 40), "red").save(animals / "dogs" / "red.png")
    assert load(str(animals), seed=0).fingerprint != first


@pytest.mark.parametrize(("side", "expected"), [(8, 32), (50, 50), (300, 224)])
def test_the_side_is_the_usual_one_within_bounds(tmp_path: Path, side: int, expected: int) -> None:
    for name in ("a", "b"):
        _write_class(tmp_path / "set" / name, 5, side=side)
    assert load(str(tmp_path / "set"), seed=0).input_size == (3, expected, expected)


def test_gray_pictures_have_one_channel(tmp_path: Path) -> None:
    for shade, name in enumerate("ab"):
        folder = tmp_path / "set" / name
        folder.mkdir(parents=True)
        for number in range(5):
            Image.new("L", (32, 32), 100 * shade + number).save(folder / f"{number}.png")
    data = load(str(tmp_path / "set"), seed=0)
    assert data.input_size == (1, 32, 32)
    assert set(data.open_test().images[:, 0, 0, 0].tolist()) < {*range(5), *range(100, 105)}


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    root = tmp_path / "parts"
    for seed, (part, number) in enumerate([("train", 10), ("val", 4), ("test", 3)]):
        for name in ("a", "b"):
            _write_class(root / part / name, number, seed=seed)
    return root


def test_given_parts_are_used_as_they_are(parts: Path) -> None:
    data = load(str(parts), seed=0)
    assert [len(s) for s in (data.train, data.val, data.open_test())] == [20, 8, 6]
    assert torch.equal(load(str(parts), seed=1).val.images, data.val.images)


def test_without_a_val_folder_the_seed_draws_one(parts: Path) -> None:
    shutil.rmtree(parts / "val")
    data = load(str(parts), seed=0)
    assert [len(s) for s in (data.train, data.val, data.open_test())] == [16, 4, 6]


def test_without_a_test_folder_the_fingerprint_draws_one_from_train(parts: Path) -> None:
    shutil.rmtree(parts / "test")
    data = load(str(parts), seed=0)
    assert [len(s) for s in (data.train, data.val, data.open_test())] == [16, 8, 4]


def test_no_pixel_of_a_test_picture_is_kept_before_the_test_split_is_opened(
    parts: Path, cache: Path
) -> None:
    data = load(str(parts), seed=0)
    kept = [path.read_bytes() for path in cache.glob("*/images")]
    assert [len(content) for content in kept] == [28 * 3 * 40 * 40]
    test = data.open_test()
    assert not any(image.numpy().tobytes() in kept[0] for image in test.images)
    assert len(list(cache.glob("*/images"))) == 2


def test_a_test_picture_that_changes_before_the_test_split_is_opened_is_named(parts: Path) -> None:
    data = load(str(parts), seed=0)
    path = parts / "test" / "a" / "0.png"
    Image.new("RGB", (40, 40), "red").save(path)
    with pytest.raises(DataError, match=r"0\.png has changed .*another picture"):
        data.open_test()
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match=r"0\.png has changed"):
        data.open_test()


def test_a_broken_test_picture_is_named_before_anything_is_trained(parts: Path) -> None:
    path = parts / "test" / "a" / "0.png"
    path.write_bytes(path.read_bytes()[:200])
    assert str(path) in _refusal(parts)


def test_a_class_called_train_is_a_class(tmp_path: Path) -> None:
    for name in ("train", "plane"):
        _write_class(tmp_path / "vehicles" / name, 5)
    assert load(str(tmp_path / "vehicles"), seed=0).class_names == ("plane", "train")


def _refusal(folder: Path) -> str:
    with pytest.raises(DataError) as caught:
        load(str(folder), seed=0)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_folder_without_classes_is_refused(tmp_path: Path) -> None:
    assert "no such folder" in _refusal(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    assert "no sub-folders" in _refusal(tmp_path / "empty")
    _write_class(tmp_path / "flat", 3)
    assert "no sub-folders" in _refusal(tmp_path / "flat")
    _write_class(tmp_path / "single" / "cats", 3)
    assert "one class only (cats)" in _refusal(tmp_path / "single")


def test_a_class_without_pictures_is_named(animals: Path) -> None:
    (animals / "birds").mkdir()
    (animals / "birds" / "list.txt").write_text("none yet")
    assert f"{animals / 'birds'}: no pictures" in _refusal(animals)


def test_a_broken_picture_is_named(animals: Path) -> None:
    (animals / "dogs" / "3.png").write_bytes(b"no picture")
    assert str(animals / "dogs" / "3.png") in _refusal(animals)


def test_pictures_that_lie_deeper_are_not_passed_over(animals: Path) -> None:
    _write_class(animals / "dogs" / "puppies", 3)
    assert "not deeper" in _refusal(animals)


def test_a_folder_or_class_that_train_does_not_know_is_named(parts: Path) -> None:
    (parts / "valid").mkdir()
    assert "did you mean val?" in _refusal(parts)
    (parts / "valid").rmdir()
    _write_class(parts / "test" / "c", 2)
    assert "unknown class 'c'" in _refusal(parts)


def test_an_empty_test_folder_is_refused_rather_than_replaced(parts: Path) -> None:
    shutil.rmtree(parts / "test")
    (parts / "test").mkdir()
    assert str(parts / "test") in _refusal(parts)


def test_too_few_pictures_are_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        _write_class(tmp_path / "tiny" / name, 1)
    assert "too few" in _refusal(tmp_path / "tiny")


def test_other_files_are_passed_over_and_counted(
    animals: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (animals / "dogs" / "notes.txt").write_text("good dogs")
    (animals / "dogs" / ".DS_Store").write_bytes(b"")
    (animals / ".cache").mkdir()
    with caplog.at_level(logging.WARNING):
        data = load(str(animals), seed=0)
    assert data.num_classes == 2
    assert "1 files passed over (.txt)" in caplog.text
