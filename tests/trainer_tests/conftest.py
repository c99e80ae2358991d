"""Fixtures of the trainer's tests: a cache of pictures for each test alone."""

from pathlib import Path

import pytest

import trainer.device


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where this test's cache of pictures lies."""
    monkeypatch.setenv("HPO_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "cache"


@pytest.fixture
def bf16_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans in bf16 stay so on any CPU: on the networks that these tests train, its emulation
    computes the same each time.
    """
    monkeypatch.setattr(trainer.device, "has_fast_bf16", lambda: True)
