"""Fixtures of the trainer's tests: a cache of pictures for each test alone."""

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where this test's cache of pictures lies."""
    monkeypatch.setenv("HPO_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "cache"
