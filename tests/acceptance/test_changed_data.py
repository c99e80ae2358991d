"""A data set that changes, or vanishes, between two launches of a study."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from tests.parts import Hpo


def pictures(folder: Path, *, num_each: int) -> None:
    """Two classes of noise, one of them darker."""
    chance = np.random.default_rng(0)
    for name, top in (("dark", 120), ("light", 250)):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for index in range(num_each):
            pixels = chance.integers(0, top, (12, 12), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{index}.png")


def test_data_that_changed_or_vanished_is_one_line_and_no_worker_is_started_again(
    hpo: Hpo, tmp_path: Path
) -> None:
    folder = tmp_path / "pictures"
    pictures(folder, num_each=40)
    common = ("launch", "--study", "study", "--backbone", "smallcnn", "--epochs", "1",
              "--workers", "2")  # fmt: skip
    made = hpo.run(*common, "--data", str(folder), "--trials", "2")
    assert made.returncode == 0, made.stderr
    pictures(folder, num_each=41)
    changed = hpo.run(*common, "--trials", "3")
    assert changed.returncode == 2, changed.stderr
    assert "its fingerprint differs" in changed.stderr.splitlines()[-1]
    shutil.rmtree(folder)
    vanished = hpo.run(*common, "--trials", "3")
    assert vanished.returncode == 5, vanished.stderr
    assert str(folder) in vanished.stderr.splitlines()[-1]
    for refused in (changed, vanished):
        assert "starting another" not in refused.stderr
        assert "Traceback" not in refused.stderr
    shown = json.loads(hpo.run("status", "--json").stdout)
    assert (shown["complete"] + shown["pruned"], shown["failed"]) == (2, 0)
    assert shown["sick"] == []  # the launch itself has looked: no worker was started
    nothing_left = hpo.run(*common, "--trials", "2")
    assert nothing_left.returncode == 0, nothing_left.stderr


def test_the_files_are_listed_by_the_launch_and_by_none_of_its_workers(
    hpo: Hpo, tmp_path: Path
) -> None:
    """The folder is moved away once the study is there: its workers have what they need."""
    folder = tmp_path / "pictures"
    pictures(folder, num_each=40)
    common = ("--study", "study", "--workers", "2")
    launch = ("launch", *common, "--backbone", "smallcnn", "--epochs", "1", "--data", str(folder))
    made = hpo.run(*launch, "--trials", "1")
    assert made.returncode == 0, made.stderr
    os.rename(folder, tmp_path / "elsewhere")
    joined = hpo.run("worker", "--study", "study")
    assert joined.returncode == 0, joined.stderr
    replayed = hpo.run("replay", "--study", "study", "--trial", "0")
    assert replayed.returncode == 0, replayed.stderr
