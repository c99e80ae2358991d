import dataclasses
from typing import Any

import pytest

from hpo.utilisation import Work, mfu, peak_of, seconds_spent
from storage.snapshots import StudySnapshot
from tests.hpo_tests.test_status import study, trial


def with_work(number: int, steps: tuple[int, ...], **fields: Any) -> Any:
    work = Work(
        **{"flops_per_epoch": 4e9, "host": "h", "device": "cpu", "peak_flops": 1e9, **fields}
    )
    attributes = {"work": dataclasses.asdict(work)}
    return dataclasses.replace(trial(number, steps=steps), attributes=attributes)


def lasting(seconds: float, *trials: Any) -> StudySnapshot:
    return dataclasses.replace(study(*trials), seconds=seconds)


def test_the_mfu_is_what_was_trained_by_what_the_device_could_have_done() -> None:
    # 2.25 epochs of 4e9 operations in 36 s of 1e9 a second
    assert mfu(lasting(36.0, with_work(0, (1, 4, 8)), with_work(1, (1,)))) == pytest.approx(0.25)


def test_each_device_counts_once_whatever_the_number_of_its_workers() -> None:
    one = mfu(lasting(8.0, with_work(0, (4,)), with_work(1, (4,))))
    two = mfu(lasting(8.0, with_work(0, (4,)), with_work(1, (4,), host="another")))
    assert one is not None
    assert two == pytest.approx(one / 2)
    assert mfu(lasting(8.0, with_work(0, (4,)), with_work(1, (4,), device="cuda:0"))) == two


def test_before_a_report_and_of_older_studies_there_is_no_mfu() -> None:
    assert mfu(lasting(0.0)) is None
    assert mfu(lasting(5.0, with_work(0, ()))) is None
    assert mfu(lasting(5.0, trial(0))) is None
    assert mfu(lasting(5.0, with_work(0, (4,), flops_per_epoch=0.0))) is None


def test_seconds_are_summed_for_each_worker() -> None:
    spent = [
        {"worker": "b", "training": 1.0, "other": 0.5},
        {"worker": "a", "training": 2.0, "other": 0.0},
        {"worker": "b", "training": 3.0, "other": 0.25},
    ]
    trials = [
        dataclasses.replace(trial(number), attributes={"spent": each})
        for number, each in enumerate(spent)
    ]
    assert seconds_spent([*trials, trial(3)]) == [
        {"worker": "a", "num_trials": 1, "training": 2.0, "other": 0.0},
        {"worker": "b", "num_trials": 2, "training": 4.0, "other": 0.75},
    ]


def test_the_peak_of_a_cpu_is_that_of_all_cores_its_workers_may_use(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("hpo.utilisation.measured_once", lambda *_: 5.0)
    monkeypatch.setenv("HPO_WORKER_CORES", "16")
    assert peak_of("cpu") == 80.0
    assert peak_of("cuda:0") == 5.0
