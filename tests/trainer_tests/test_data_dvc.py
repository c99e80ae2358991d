"""Data under DVC: pulled where it is missing, and its hash in the fingerprint."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from trainer.config import DataError
from trainer.data.registry import load, settled_source

_NOTE = """outs:
- md5: {md5}.dir
  size: 12345
  nfiles: 20
  hash: md5
  path: birds
"""
_DVC = """#!/bin/sh
# what dvc does with "pull --quiet birds.dvc": the folder comes from where it is kept
echo "$@" > "{called}"
if [ -e "{kept}" ]; then cp -r "{kept}" birds; else echo "ERROR: no remote" >&2; exit 255; fi
"""


@pytest.fixture
def birds(tmp_path: Path) -> Path:
    """A folder that isn't there, with DVC's note beside it; it lies in `kept`."""
    values = np.random.default_rng(0)
    for name in ("owl", "wren"):
        (tmp_path / "kept" / name).mkdir(parents=True)
        for number in range(10):
            pixels = values.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "kept" / name / f"{number}.png")
    (tmp_path / "birds.dvc").write_text(_NOTE.format(md5="a" * 32))
    return tmp_path / "birds"


@pytest.fixture
def dvc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program called dvc that fetches what is kept; the file where it notes its words."""
    program = tmp_path / "bin" / "dvc"
    program.parent.mkdir()
    called = tmp_path / "called"
    program.write_text(_DVC.format(kept=tmp_path / "kept", called=called))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    return called


def test_what_is_missing_is_pulled_once(birds: Path, dvc: Path) -> None:
    assert load(str(birds), seed=0).class_names == ("owl", "wren")
    assert dvc.read_text() == "pull --quiet birds.dvc\n"
    dvc.unlink()
    load(str(birds), seed=0)
    assert not dvc.exists()


@pytest.mark.usefixtures("dvc")
def test_dvcs_hash_is_in_the_fingerprint_and_does_not_move_the_splits(birds: Path) -> None:
    data = load(str(birds), seed=0)
    note = birds.with_name("birds.dvc")
    note.write_text(_NOTE.format(md5="b" * 32))
    other = load(str(birds), seed=0)
    note.unlink()
    plain = load(str(birds), seed=0)
    assert len({d.fingerprint for d in (data, other, plain)}) == 3
    tests = [d.open_test().images.numpy().tobytes() for d in (data, other, plain)]
    assert tests[0] == tests[1] == tests[2]


def test_without_dvc_one_line_says_what_to_do(
    birds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DataError) as caught:
        load(str(birds), seed=0)
    assert f"{birds} is kept by DVC and isn't here" in str(caught.value)
    assert "dvc pull birds.dvc" in str(caught.value)
    assert str(caught.value).isprintable()


@pytest.mark.usefixtures("dvc")
def test_what_dvc_can_not_fetch_is_one_line(birds: Path, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "kept")
    with pytest.raises(DataError, match=r"dvc pull birds\.dvc in .*: ERROR: no remote"):
        load(str(birds), seed=0)


def test_a_note_without_a_hash_is_refused(birds: Path) -> None:
    birds.with_name("birds.dvc").write_text("outs: []\n")
    with pytest.raises(DataError, match=r"birds\.dvc: no md5 in it"):
        load(str(birds), seed=0)


def test_a_name_beside_which_a_note_lies_is_a_path(
    birds: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(birds.parent)
    assert settled_source("birds") == str(birds)
