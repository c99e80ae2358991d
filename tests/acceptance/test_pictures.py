"""A folder of pictures through the commands: options that stay with the study, exit codes."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.parts import Hpo


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Sixty pictures in two classes, one of them broken."""
    values = np.random.default_rng(0)
    for number in range(60):
        below = tmp_path / "my birds" / ("owl", "wren")[number % 2]
        below.mkdir(parents=True, exist_ok=True)
        pixels = values.integers(0, 256, (24, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(below / f"{number}.png")
        os.utime(below / f"{number}.png", (1e9, 1e9))
    (tmp_path / "my birds" / "owl" / "0.png").write_bytes(b"")
    return tmp_path / "my birds"


def test_data_options_stay_with_the_study_and_reach_its_workers(hpo: Hpo, folder: Path) -> None:
    usual = ("launch", "--data", str(folder), "--trials", "1", "--epochs", "1", "--workers", "1")
    options = ("--image-size", "16", "--max-broken", "0.02", "--max-memory", "1M")
    done = hpo.run(*usual, "--backbone", "smallcnn", *options, "--json")
    assert done.returncode == 0, done.stderr
    assert f"left out: {folder}/owl/0.png" in done.stderr
    status = json.loads(done.stdout)
    assert (status["study"], status["complete"]) == ("my-birds", 1)
    (cached,) = (hpo.home / "cache").glob("images-*/images")
    assert cached.stat().st_size == (37 + 10) * 3 * 16 * 16

    done = hpo.run("launch", "--data", str(folder), "--image-size", "32")
    assert done.returncode == 2
    assert "image_size is 16 there and 32 here" in done.stderr

    done = hpo.run("launch", "--data", str(folder), "--study", "other")
    assert done.returncode == 5
    assert (
        done.stderr.strip()
        .splitlines()[-1]
        .startswith(
            f"hpo: {folder}: 1 of 60 pictures can't be used, more than the share of 0.01 that "
            "--max-broken lets pass"
        )
    )
