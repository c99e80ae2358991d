"""Tables of pictures: what they say is read, and what is wrong with them is one line."""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from trainer.config import DataError
from trainer.data.registry import load, settled_source, source_name


def _write_pictures(folder: Path, num_pictures: int = 40) -> list[str]:
    """Half of them dark; their names, relative to the folder above."""
    folder.mkdir(parents=True)
    values = np.random.default_rng(0)
    names = []
    for number in range(num_pictures):
        low = 128 * (number % 2)
        pixels = values.integers(low, low + 128, (32, 32, 3), dtype=np.uint8)
        names.append(f"{folder.name}/{number}.png")
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return names


@pytest.fixture
def names(tmp_path: Path) -> list[str]:
    return _write_pictures(tmp_path / "my pictures")


def _shade(number: int) -> str:
    return ("dark", "light")[number % 2]


def _table(tmp_path: Path, *lines: str) -> Path:
    table = tmp_path / "labels.csv"
    table.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return table


def _refusal(table: Path) -> str:
    with pytest.raises(DataError) as caught:
        load(str(table), seed=0)
    message = str(caught.value)
    assert message.isprintable(), "one line"
    return message


def test_a_table_names_its_pictures_and_their_labels(tmp_path: Path, names: list[str]) -> None:
    lines = [f"{name},{_shade(number)}" for number, name in enumerate(names)]
    data = load(str(_table(tmp_path, "path,label", *lines)), seed=0)
    assert data.name == "labels"
    assert data.class_names == ("dark", "light")
    test = data.open_test()
    assert [len(data.train), len(data.val), len(test)] == [26, 6, 8]
    for split in (data.train, data.val, test):
        is_light = split.images.float().mean(dim=(1, 2, 3)) > 128
        assert torch.equal(is_light.long(), split.labels)


def test_a_table_reads_as_the_same_data_as_a_folder(tmp_path: Path, names: list[str]) -> None:
    for number, name in enumerate(names):
        folder = tmp_path / "folder" / _shade(number)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.png").write_bytes((tmp_path / name).read_bytes())
    lines = [f"{_shade(number)};{name};x" for number, name in enumerate(names)]
    table = _table(tmp_path, "\ufeffLabel;Path;more", *reversed(lines))
    by_table, by_folder = (load(str(p), seed=0) for p in (table, tmp_path / "folder"))
    assert by_table.fingerprint == by_folder.fingerprint
    assert torch.equal(by_table.train.images, by_folder.train.images)


def test_a_tables_own_splits_are_used_as_they_are(tmp_path: Path, names: list[str]) -> None:
    parts = ["train"] * 20 + ["val"] * 8 + ["test"] * 12
    lines = [
        f"{name},{_shade(n)},{part}"
        for n, (name, part) in enumerate(zip(names, parts, strict=True))
    ]
    data = load(str(_table(tmp_path, "path,label,split", *lines)), seed=0)
    assert [len(data.train), len(data.val), len(data.open_test())] == [20, 8, 12]


def test_names_with_commas_and_line_breaks_are_quoted(tmp_path: Path, names: list[str]) -> None:
    odd = 'my pictures/a, "b"\nч\u2028.png'
    (tmp_path / names[0]).rename(tmp_path / odd)
    names[0] = odd
    lines = []
    for number, name in enumerate(names):
        quoted = name.replace('"', '""')
        lines.append(f'"{quoted}","{_shade(number)}, 犬"')
    data = load(str(_table(tmp_path, "path,label", *lines)), seed=0)
    assert data.class_names == ("dark, 犬", "light, 犬")
    assert data.findings.num_pictures == 40


def test_missing_files_count_as_broken_pictures(tmp_path: Path, names: list[str]) -> None:
    lines = [f"{name},{_shade(number)}" for number, name in enumerate(names)]
    table = _table(tmp_path, "path,label", *lines, "my pictures/gone.png,dark")
    message = _refusal(table)
    assert "1 of 41 pictures can't be used" in message
    assert "labels.csv line 42 (no such file)" in message


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ([], "the first line must name the columns path,label[,split], it is empty"),
        (["my pictures/0.png,dark"], "must name the columns"),
        (["file,class", "my pictures/0.png,dark"], "must name the columns"),
        (["path,label,label", "a,b,c"], "must name the columns"),
        (["path,label"], "no rows"),
        (["label,path", "my pictures/0.png,dark"], "the columns path and label are mixed up"),
        (["path,label", "elsewhere/0.png,dark"], "nor any other: paths are relative to"),
        (["path,label", "my pictures/0.png"], "line 2: 1 cells where the first line names 2"),
        (["path,label", "my pictures/0.png,"], "line 2: no label"),
        (["path,label", ",dark"], "line 2: no path"),
        (["path,label", '"my pictures/0.png,dark'], "can't be read"),
        (["path,label", "my pictures/0.png,dark", "my pictures/2.png,dark"], "one class only"),
        (
            ["path,label", "my pictures/0.png,dark", "my pictures/0.png,light"],
            "line 3: my pictures/0.png is light in train here and dark in train in",
        ),
        (["path,label,split", "my pictures/0.png,dark,training"], "did you mean train?"),
        (["path,label,split", "my pictures/0.png,dark,test"], "unknown class 'dark'"),
        (
            [
                "path,label,split",
                "my pictures/0.png,dark,train",
                "my pictures/1.png,light,train",
                "my pictures/2.png,gray,test",
            ],
            "line 4: unknown class 'gray'",
        ),
    ],
)
@pytest.mark.usefixtures("names")
def test_a_table_that_can_not_be_is_one_line(tmp_path: Path, lines: list[str], says: str) -> None:
    assert says in _refusal(_table(tmp_path, *lines))


def test_a_table_in_another_encoding_is_one_line(tmp_path: Path) -> None:
    table = tmp_path / "labels.csv"
    table.write_bytes("path,label\nkäse.png,süß\n".encode("latin-1"))
    assert "not in UTF-8" in _refusal(table)


def test_rows_that_say_the_same_again_are_passed_over(
    tmp_path: Path, names: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    lines = [f"{name},{_shade(number)}" for number, name in enumerate(names)]
    with caplog.at_level(logging.WARNING):
        data = load(str(_table(tmp_path, "path,label", *lines, *lines[:5])), seed=0)
    assert data.findings.num_pictures == 40
    assert "5 rows say the same again" in caplog.text


def test_a_missing_table_is_one_line(tmp_path: Path) -> None:
    assert "labels.csv" in _refusal(tmp_path / "labels.csv")


def test_a_table_is_a_source_in_any_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert settled_source("My labels.CSV") == str(tmp_path / "My labels.CSV")
    assert source_name("My labels.CSV") == "My-labels"
