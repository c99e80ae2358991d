"""Networks that kill, hang or raise, workers that can't work, data that take long: by commands."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.chaos import ill_networks
from benchmarks.chaos.__main__ import arena as new_arena
from benchmarks.chaos.rows import findings_of
from benchmarks.chaos.stage import Arena
from tests.parts import Hpo


@pytest.fixture(scope="module")
def arena() -> Iterator[Arena]:
    """A Postgres of its own, over TCP and behind a password."""
    with new_arena(None) as made:
        yield made


def is_as_promised(arena: Arena, row: str) -> None:
    findings = list(findings_of(arena, row, long=False))
    assert findings
    assert {each.done: each.violations for each in findings if each.violations} == {}


def test_a_network_that_always_ends_its_process_fails_and_does_not_end_a_study_of_others(
    arena: Arena,
) -> None:
    is_as_promised(arena, "28")


def test_workers_that_can_not_work_leave_with_their_reason_and_fail_no_trial(arena: Arena) -> None:
    is_as_promised(arena, "29")


def test_a_worker_is_known_while_its_data_take_longer_to_load_than_a_lease(arena: Arena) -> None:
    is_as_promised(arena, "32")


def test_a_training_that_raises_is_tried_in_a_second_process_and_ends_with_its_reason(
    database_url: str, tmp_path: Path
) -> None:
    shutil.copyfile(str(ill_networks.__file__), tmp_path / "networks_of_a_user.py")
    (tmp_path / "home").mkdir()
    sick = Hpo(tmp_path / "home", {"HPO_STORAGE": database_url, "PYTHONPATH": str(tmp_path)})
    launched = sick.run(
        "launch", "--backbone", "networks_of_a_user:raising", "--trials", "4", "--epochs", "8",
        "--set", "batch_size=64", "--workers", "1",
    )  # fmt: skip
    assert launched.returncode == 6, launched.stderr
    last = launched.stderr.splitlines()[-1]
    assert "ValueError: broken at its 60th step" in last
    found = json.loads(sick.run("trials", "--json").stdout)
    assert [(trial["state"], trial["attempts"]) for trial in found] == [("FAIL", 2)] * 3
