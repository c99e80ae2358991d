"""Pictures are looked at once: what is known of files that are as they were is not read again."""

import os
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from trainer.data import decoding, pictures, survey
from trainer.data.options import DataOptions
from trainer.data.registry import load


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Forty pictures from long ago, and a broken one."""
    values = np.random.default_rng(0)
    for number in range(40):
        below = tmp_path / "set" / "ab"[number % 2]
        below.mkdir(parents=True, exist_ok=True)
        pixels = values.integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(below / f"{number}.png")
    (tmp_path / "set" / "a" / "broken.png").write_bytes(b"none")
    for path in (tmp_path / "set").rglob("*.png"):
        os.utime(path, (1e9, 1e9))
    return tmp_path / "set"


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The pictures that are decoded from now on."""
    paths: list[Path] = []
    decode = pictures.decode_picture

    def noting(path: Path, *, input_size: tuple[int, int, int]) -> object:
        paths.append(path)
        return decode(path, input_size=input_size)

    monkeypatch.setattr(decoding, "decode_picture", noting)
    return paths


OPTIONS = DataOptions(max_broken=0.1)


def test_each_picture_is_decoded_once_and_a_test_picture_again_when_it_is_asked_for(
    folder: Path, decoded: list[Path]
) -> None:
    data = load(str(folder), seed=0, options=OPTIONS)
    assert sorted(decoded) == sorted(folder.rglob("*.png"))
    decoded.clear()
    assert len(data.open_test()) == len(decoded) == 8
    decoded.clear()
    data.open_test()
    assert decoded == []


def test_a_second_launch_decodes_nothing_and_gives_the_same(
    folder: Path, decoded: list[Path]
) -> None:
    first = load(str(folder), seed=0, options=OPTIONS)
    decoded.clear()
    second = load(str(folder), seed=0, options=OPTIONS)
    assert decoded == []
    assert second.findings == first.findings
    assert second.fingerprint == first.fingerprint
    assert second.train.images.equal(first.train.images)


def test_only_what_is_new_or_changed_is_looked_at_again(folder: Path, decoded: list[Path]) -> None:
    before = load(str(folder), seed=0, options=OPTIONS)
    changed, new = folder / "a" / "0.png", folder / "b" / "new.png"
    decoded.clear()
    for shade, path in enumerate((changed, new)):
        pixels = np.random.default_rng(9 + shade).integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    with survey.surveyed(
        str(folder), sorted(folder.rglob("*.png")), set(), OPTIONS, lambda *_: None
    ) as found:
        assert sorted(decoded) == [changed, new]
        assert len(found.seen) == 42
        assert [path for path, seen in found.seen.items() if seen.reason] == [
            folder / "a" / "broken.png"
        ]
    assert load(str(folder), seed=0, options=OPTIONS).fingerprint != before.fingerprint


def test_a_file_that_changed_a_moment_before_it_was_read_is_read_again(
    folder: Path, decoded: list[Path]
) -> None:
    path = folder / "b" / "1.png"
    now = time.time()
    os.utime(path, (now, now))
    load(str(folder), seed=0, options=OPTIONS)
    decoded.clear()
    load(str(folder), seed=0, options=OPTIONS)
    assert decoded == [path]


def test_another_seed_or_size_decodes_again_but_looks_no_more(
    folder: Path, decoded: list[Path]
) -> None:
    load(str(folder), seed=0, options=OPTIONS)
    decoded.clear()
    load(str(folder), seed=1, options=OPTIONS)
    assert len(decoded) == 32


@pytest.mark.parametrize("content", [b"", b"{torn", b"[]", b'{"version": "0", "files": {}}'])
def test_an_index_that_can_not_be_used_is_written_anew(
    folder: Path, cache: Path, decoded: list[Path], content: bytes
) -> None:
    first = load(str(folder), seed=0, options=OPTIONS)
    (index,) = cache.glob("index-*/index.json")
    index.write_bytes(content)
    decoded.clear()
    assert load(str(folder), seed=0, options=OPTIONS).fingerprint == first.fingerprint
    assert len(decoded) == 41
    decoded.clear()
    load(str(folder), seed=0, options=OPTIONS)
    assert decoded == []


def test_progress_is_told_to_the_end(folder: Path) -> None:
    told: list[tuple[str, int, int]] = []
    load(
        str(folder),
        seed=0,
        options=OPTIONS,
        progress=lambda what, done, all_: told.append((what, done, all_)),
    )
    assert told == [("headers", n, 41) for n in range(1, 42)] + [
        ("pictures", n, 41) for n in range(1, 42)
    ]
