import contextlib
import time
from collections.abc import Generator
from types import SimpleNamespace
from typing import Any

import pytest

from hpo.spent import PARTS, Spent


def report(seconds: float, images: int) -> Any:
    return SimpleNamespace(seconds=seconds, images_seen=images, images_per_second=100.0)


def reports(*made: Any, setup: float = 0.0) -> Generator[Any, None, None]:
    time.sleep(setup)
    yield from made


def test_a_report_is_training_and_evaluation_and_what_comes_before_is_setup() -> None:
    spent = Spent(worker_id="w")
    # 100 images a second: 3 s and 1 s of training
    list(
        spent.reports(
            reports(report(3.5, 300), report(5.0, 400), setup=0.0), [], seconds_before=0.0
        )
    )
    assert spent.seconds["training"] == pytest.approx(4.0)
    assert spent.seconds["evaluation"] == pytest.approx(1.0)
    slow = Spent(worker_id="w")
    list(slow.reports(reports(report(0.0, 0), setup=0.2), [], seconds_before=0.0))
    assert 0.15 < slow.seconds["setup"] < 1


def test_what_earlier_attempts_did_is_theirs() -> None:
    spent, history = Spent(worker_id="w"), [{"seconds": 3.5, "images_seen": 300}]
    list(spent.reports(reports(report(5.0, 400)), history, seconds_before=3.5))
    assert spent.seconds["training"] == pytest.approx(1.0)
    assert spent.seconds["evaluation"] == pytest.approx(0.5)


def test_seconds_of_an_attempt_that_ended_within_an_epoch_are_not_counted_again() -> None:
    spent, history = Spent(worker_id="w"), [{"seconds": 3.5, "images_seen": 300}]
    list(spent.reports(reports(report(5.0, 400)), history, seconds_before=4.25))
    assert spent.seconds["training"] + spent.seconds["evaluation"] == pytest.approx(0.75)


def test_a_checkpoint_within_an_epoch_is_no_set_up() -> None:
    spent = Spent(worker_id="w")

    def training() -> Generator[Any, None, None]:
        with spent.on("checkpoints"):
            time.sleep(0.2)
        yield report(0.0, 0)

    list(spent.reports(training(), [], seconds_before=0.0))
    assert spent.seconds["checkpoints"] >= 0.2
    assert spent.seconds["setup"] < 0.1


def test_the_parts_and_the_rest_are_all_the_time_since_the_last_trial() -> None:
    started = time.perf_counter()
    spent = Spent(worker_id="w", since=started)
    time.sleep(0.1)
    spent.begin()
    with spent.on("database"):
        time.sleep(0.05)
    with contextlib.suppress(ValueError), spent.on("checkpoints"):
        time.sleep(0.05)
        raise ValueError
    time.sleep(0.05)
    found = spent.to_json()
    whole = time.perf_counter() - started
    assert found.pop("worker") == "w"
    assert set(found) == {*PARTS, "other"}
    assert sum(found.values()) == pytest.approx(whole, abs=0.02)
    assert found["between"] >= 0.1
    assert found["database"] >= 0.05
    assert found["checkpoints"] >= 0.05
    assert found["other"] >= 0.04
