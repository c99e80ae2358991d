"""Pictures become a data set: what is broken is left out, what is there twice stays together."""

import contextlib
import errno
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance

from trainer.config import ConfigError, DataError
from trainer.data.dataset import ImageDataset
from trainer.data.options import DataOptions
from trainer.data.registry import load


def photograph(seed: int, side: int = 96) -> Image.Image:
    """Smooth shapes, unlike those of another seed."""
    shapes = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(shapes).resize((side, side), Image.Resampling.BICUBIC)


def write_class(folder: Path, num_pictures: int, *, seed: int) -> None:
    folder.mkdir(parents=True)
    for number in range(num_pictures):
        photograph(1000 * seed + number).save(folder / f"{number:03d}.png")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("made")
    for seed, name in enumerate(("cats", "dogs"), 1):
        write_class(root / name, 60, seed=seed)
    return root


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """Of 60 cats and 60 dogs."""
    root = Path(shutil.copytree(made, tmp_path / "set"))
    root.chmod(0o755)
    return root


def refusal(source: Path, options: DataOptions | None = None) -> str:
    with pytest.raises(DataError) as caught:
        load(str(source), seed=0, options=options or DataOptions())
    message = str(caught.value)
    assert message.isprintable(), "one line"
    return message


def sizes(data: ImageDataset) -> list[int]:
    return [len(data.train), len(data.val), len(data.open_test())]


def break_pictures(folder: Path, num_pictures: int) -> list[Path]:
    paths = sorted(folder.rglob("*.png"))[::7][:num_pictures]
    for number, path in enumerate(paths):
        path.write_bytes(path.read_bytes()[: 100 * number])
    return paths


def test_broken_pictures_are_left_out_and_listed(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    paths = break_pictures(folder, 3)
    with caplog.at_level(logging.WARNING):
        data = load(str(folder), seed=0, options=DataOptions(max_broken=0.025))
    assert sum(sizes(data)) == 117
    assert sorted(picture.where for picture in data.findings.unusable) == sorted(map(str, paths))
    assert all(str(path) in caplog.text for path in paths)
    assert data.findings.num_pictures == 120
    assert dict(data.findings.class_counts) == {"cats": 57, "dogs": 60}


def test_more_broken_pictures_than_allowed_are_refused_with_their_number_and_the_first(
    folder: Path,
) -> None:
    paths = break_pictures(folder, 4)
    message = refusal(folder, DataOptions(max_broken=0.025))
    assert "4 of 120 pictures can't be used" in message
    assert "--max-broken" in message
    assert str(paths[0]) in message
    assert "and 1 more" in message


def test_a_broken_picture_changes_the_fingerprint_and_mending_it_changes_it_back(
    folder: Path,
) -> None:
    whole = load(str(folder), seed=0).fingerprint
    path = folder / "cats" / "000.png"
    content = path.read_bytes()
    path.write_bytes(content[:50])
    assert load(str(folder), seed=0).fingerprint != whole
    path.write_bytes(content)
    assert load(str(folder), seed=0).fingerprint == whole


def near_copies(image: Image.Image, stem: Path) -> list[Path]:
    """The same picture as other people save it."""
    ways: dict[str, tuple[Image.Image, dict[str, Any]]] = {
        "jpeg.jpg": (image, {"quality": 60}),
        "small.png": (image.resize((60, 60)), {}),
        "large.webp": (image.resize((200, 200)), {"quality": 70}),
        "light.png": (ImageEnhance.Brightness(image).enhance(1.1), {}),
    }
    paths = []
    for suffix, (changed, words) in ways.items():
        paths.append(stem.with_name(f"{stem.name}-{suffix}"))
        changed.save(paths[-1], **words)
    return paths


def plant_copies(folder: Path) -> list[set[str]]:
    """Five exact copies and five pictures with four near copies each; the groups by path."""
    groups = []
    for number in range(5):
        path = folder / "cats" / f"{number:03d}.png"
        shutil.copy(path, folder / "cats" / f"copy-{number}.png")
        groups.append({str(path), str(folder / "cats" / f"copy-{number}.png")})
    for number in range(5, 10):
        path = folder / "dogs" / f"{number:03d}.png"
        with Image.open(path) as image:
            groups.append({str(path), *map(str, near_copies(image, path))})
    return groups


def test_copies_and_near_copies_are_found_and_nothing_else(folder: Path) -> None:
    planted = plant_copies(folder)
    found = [set(group) for group in load(str(folder), seed=0).findings.duplicates]
    assert sorted(map(sorted, found)) == sorted(map(sorted, planted))


def test_copies_stay_on_one_side_of_each_split(folder: Path) -> None:
    plant_copies(folder)
    for seed in range(3):
        data = load(str(folder), seed=seed, options=DataOptions(image_size=32))
        splits = [data.train, data.val, data.open_test()]
        owners = torch.cat([torch.full((len(split),), i) for i, split in enumerate(splits)])
        pixels = torch.cat([split.images for split in splits]).flatten(1).float()
        # planted copies differ by at most 13 of 255 on average, other pictures by 40 at least
        is_near = torch.cdist(pixels, pixels, p=1) / pixels.shape[1] < 20
        assert int(is_near.sum()) == len(pixels) + 5 * 2 + 5 * 20
        assert (owners[:, None] == owners[None])[is_near].all()


def test_without_copies_the_splits_have_their_shares(folder: Path) -> None:
    data = load(str(folder), seed=0)
    assert sizes(data) == [77, 19, 24]
    assert data.findings.duplicates == ()


def test_copies_are_told_in_the_log(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    plant_copies(folder)
    shutil.copy(folder / "cats" / "020.png", folder / "dogs" / "no-dog.png")
    with caplog.at_level(logging.WARNING):
        data = load(str(folder), seed=0)
    assert "37 pictures are there twice or more, the same or nearly so, in 11 groups" in caplog.text
    assert "1 pictures have different labels at different places" in caplog.text
    assert {Path(path).name for path in data.findings.contradictions[0]} == {
        "020.png",
        "no-dog.png",
    }


def test_pictures_with_nothing_on_them_are_not_taken_for_copies(tmp_path: Path) -> None:
    for shade, name in enumerate("ab"):
        (tmp_path / "set" / name).mkdir(parents=True)
        for number in range(10):
            colour = (100 * shade + number, 50, 50)
            Image.new("RGB", (40, 40), colour).save(tmp_path / "set" / name / f"{number}.png")
    assert load(str(tmp_path / "set"), seed=0).findings.duplicates == ()


@pytest.fixture
def parts(folder: Path) -> Path:
    """The same pictures in train and test parts of 40 and 20 a class."""
    for name in ("cats", "dogs"):
        for part, numbers in (("train", range(40)), ("test", range(40, 60))):
            (folder / part / name).mkdir(parents=True, exist_ok=True)
            for number in numbers:
                (folder / name / f"{number:03d}.png").rename(
                    folder / part / name / f"{number:03d}.png"
                )
        (folder / name).rmdir()
    return folder


def test_what_the_users_own_test_part_holds_is_not_trained_on(
    parts: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = load(str(parts), seed=0)
    for number in range(40, 44):
        shutil.copy(parts / "test" / "cats" / f"{number:03d}.png", parts / "train" / "cats")
    with Image.open(parts / "test" / "dogs" / "050.png") as image:
        near_copies(image, parts / "train" / "dogs" / "050")
    with caplog.at_level(logging.WARNING):
        data = load(str(parts), seed=0)
    assert len(data.findings.removed) == 8
    assert all("/train/" in path for path in data.findings.removed)
    assert "8 pictures are not trained on" in caplog.text
    assert sizes(data) == sizes(before) == [64, 16, 40]
    assert data.fingerprint == before.fingerprint


def test_a_class_that_the_users_own_test_part_does_not_hold_is_told(
    parts: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.rmtree(parts / "test" / "dogs")
    with caplog.at_level(logging.WARNING):
        load(str(parts), seed=0)
    assert "no pictures of dogs in test" in caplog.text


def test_a_full_disk_is_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    message = refusal(folder)
    assert "is full: make room there, or set HPO_HOME" in message


def test_a_train_part_that_is_the_test_part_too_is_refused(parts: Path) -> None:
    shutil.rmtree(parts / "train")
    shutil.copytree(parts / "test", parts / "train")
    assert "too few pictures for a split" in refusal(parts)


def test_the_side_is_what_the_option_says(folder: Path) -> None:
    first = load(str(folder), seed=0)
    second = load(str(folder), seed=0, options=DataOptions(image_size=17))
    assert (first.input_size, second.input_size) == ((3, 96, 96), (3, 17, 17))
    assert first.fingerprint == second.fingerprint
    assert torch.equal(first.open_test().labels, second.open_test().labels)


def test_sets_of_one_size_refuse_another() -> None:
    with pytest.raises(ConfigError, match="digits has images of one size"):
        load("digits", seed=0, options=DataOptions(image_size=16))


@pytest.mark.parametrize(
    "options",
    [
        {"image_size": 0},
        {"image_size": 5000},
        {"max_broken": -0.1},
        {"max_broken": 1.0},
        {"max_broken": float("nan")},
        {"max_memory_bytes": 1000},
    ],
)
def test_options_that_can_not_be_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="--"):
        DataOptions(**options)  # type: ignore[arg-type]


def test_a_class_with_one_picture_is_trained_on(folder: Path) -> None:
    write_class(folder / "unicorns", 1, seed=9)
    data = load(str(folder), seed=0)
    assert data.class_names == ("cats", "dogs", "unicorns")
    assert [int((s.labels == 2).sum()) for s in (data.train, data.val, data.open_test())] == [
        1,
        0,
        0,
    ]


def test_names_in_any_alphabet_with_spaces_and_line_breaks_are_read(tmp_path: Path) -> None:
    root = tmp_path / "птицы и звери"
    for seed, name in enumerate(("gray cat", "犬\n(dog)", "'quoted' \"twice\"")):
        write_class(root / name, 10, seed=seed)
        photograph(50 + seed).save(root / name / "new\nline é.png")
    data = load(str(root), seed=0)
    assert set(data.class_names) == {"gray cat", "犬\n(dog)", "'quoted' \"twice\""}
    assert sum(sizes(data)) == 33
    (root / "gray cat" / "new\nline é.png").write_bytes(b"")
    message = refusal(root)
    assert "new\\nline" in message


def test_a_picture_of_one_pixel_and_one_of_108_million_are_read(folder: Path) -> None:
    Image.new("RGB", (1, 1), "red").save(folder / "cats" / "dot.png")
    large = Image.new("L", (12_000, 9_000), 30)
    large.paste(200, (0, 0, 6_000, 9_000))
    large.save(folder / "dogs" / "poster.png", compress_level=1)
    data = load(str(folder), seed=0)
    assert data.findings.unusable == ()
    assert sum(sizes(data)) == 122


@contextlib.contextmanager
def as_a_user_without_rights(tmp_path: Path) -> Iterator[None]:
    """Root may read anything: so as nobody, who may pass to where the test's files are."""
    if os.geteuid() != 0:
        yield
        return
    for path in (tmp_path, *tmp_path.parents):
        path.chmod(path.stat().st_mode | 0o011)
    (tmp_path / "home").mkdir(mode=0o777, exist_ok=True)
    (tmp_path / "home").chmod(0o777)
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_folder_that_can_not_be_read_is_one_line(tmp_path: Path, folder: Path) -> None:
    file = tmp_path / "file"
    file.write_text("no folder")
    assert "no such folder" in refusal(file / "below")
    (folder / "cats").chmod(0o000)
    with as_a_user_without_rights(tmp_path):
        message = refusal(folder)
    assert str(folder / "cats") in message
    assert "Permission denied" in message


def test_a_file_whose_name_is_no_text_is_read(folder: Path) -> None:
    source = folder / "cats" / "000.png"
    odd = str(folder / "cats").encode() + b"/\xff\xfe.png"
    Path(odd.decode(errors="surrogateescape")).write_bytes(source.read_bytes() + b"more")
    assert sum(sizes(load(str(folder), seed=0))) == 121
