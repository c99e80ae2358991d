import io

import pytest

from hpo.progress import ProgressView, duration
from hpo.status import best_trial, num_epochs, status_json, trials_json
from storage.snapshots import StudySnapshot, TrialSnapshot, WorkerSnapshot


def trial(
    number: int,
    state: str = "COMPLETE",
    value: float | None = 0.5,
    steps: tuple[int, ...] = (1, 4, 8),
    is_feasible: bool = True,
) -> TrialSnapshot:
    return TrialSnapshot(
        trial_id=number,
        number=number,
        state=state,
        value=value,
        params={"lr": 0.1},
        attributes={"reason": "said"},
        steps=steps,
        values=tuple(0.1 * index for index, _ in enumerate(steps)),
        is_feasible=is_feasible,
        attempts=1,
        seconds=2.0,
        images_per_second=100.0,
    )


def study(*trials: TrialSnapshot) -> StudySnapshot:
    worker = WorkerSnapshot(
        id="w", host="h", pid=1, device="cpu", trial=0, step=4, images_per_second=100.0
    )
    return StudySnapshot(
        budget=5, stop_requested=False, seconds=9.0, trials=trials, workers=(worker,)
    )


def number_of_best(*trials: TrialSnapshot) -> int | None:
    best = best_trial(trials)
    return None if best is None else best.number


def test_the_best_trial_got_farthest_then_is_most_accurate_then_earliest() -> None:
    assert number_of_best(trial(0, value=0.8), trial(1, value=0.9)) == 1
    assert number_of_best(trial(0, value=0.9), trial(1, value=0.9)) == 0
    assert number_of_best(trial(0, "PRUNED", 0.99), trial(1, value=0.6)) == 1
    assert number_of_best(trial(0, "PRUNED", 0.9, (1,)), trial(1, "PRUNED", 0.8, (1, 4))) == 1


def test_a_trial_that_broke_a_constraint_or_failed_is_never_the_best() -> None:
    assert number_of_best(trial(0, "PRUNED", None), trial(1, "FAIL", 0.9)) is None
    assert number_of_best(trial(0, "PRUNED", 0.9, is_feasible=False)) is None
    assert number_of_best(trial(0, "RUNNING", None)) is None


def test_status_has_the_keys_of_the_contract() -> None:
    found = status_json("s", study(trial(0), trial(1, "PRUNED"), trial(2, "RUNNING", None)))
    assert list(found) == [
        "study", "budget", "complete", "pruned", "failed", "running", "waiting", "num_epochs",
        "seconds", "mfu", "spent", "best", "workers", "sick",
    ]  # fmt: skip
    assert found["best"] == {"number": 0, "value": 0.5, "params": {"lr": 0.1}}
    assert list(found["workers"][0]) == [
        "id", "host", "pid", "device", "state", "trial", "epoch",
    ]  # fmt: skip
    assert found["workers"][0]["epoch"] == 1.0
    assert status_json("s", study())["best"] is None


def test_trials_have_the_keys_of_the_contract() -> None:
    found = trials_json(study(trial(0)))[0]
    assert list(found) == [
        "number", "state", "value", "params", "steps", "values", "attempts", "reason", "seconds",
    ]  # fmt: skip
    assert found["steps"] == [1, 4, 8]


def test_epochs_of_all_trials_are_added_up() -> None:
    assert num_epochs(study(trial(0), trial(1, steps=(1,)), trial(2, steps=()))) == 2.25


def test_where_there_is_no_terminal_a_line_tells_how_it_goes() -> None:
    stream = io.StringIO()
    with ProgressView("s", num_epochs=3, stream=stream) as view:
        view.show(study(trial(0), trial(1, "PRUNED"), trial(2, "RUNNING", None)))
        view.show(study(trial(0)))  # too soon for another line
    assert stream.getvalue() == (
        "s: 2/5 trials, 1 running, 1 pruned, best 0.5000 (trial 0), 100 images/s\n"
    )


class Terminal(io.StringIO):
    """A stream that says it is one."""

    def isatty(self) -> bool:
        """Yes."""
        return True


@pytest.mark.parametrize(("columns", "shows_table"), [(120, True), (20, False)])
def test_a_terminal_has_a_table_where_there_is_room_for_one(
    columns: int, shows_table: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    with ProgressView("s", num_epochs=3, stream=stream) as view:
        view.show(study(trial(0, "RUNNING")))
    assert "s: 0/5 trials" in stream.getvalue()
    assert ("images/s" in stream.getvalue().replace("100 images/s", "")) == shows_table
    assert "\u2026" not in stream.getvalue()


def test_a_dumb_terminal_has_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    stream = Terminal()
    with ProgressView("s", num_epochs=3, stream=stream) as view:
        view.show(study(trial(0)))
    assert stream.getvalue() == (
        "s: 1/5 trials, 0 running, 0 pruned, best 0.5000 (trial 0), 100 images/s\n"
    )


def test_trainings_for_an_export_have_no_best_of_a_search() -> None:
    stream = io.StringIO()
    with ProgressView("s:retrain-1", num_epochs=3, stream=stream, shows_best=False) as view:
        view.show(study(trial(0, value=-1.5)))
    assert stream.getvalue() == "s:retrain-1: 1/5 trials, 0 running, 0 pruned, 100 images/s\n"


@pytest.mark.parametrize(
    ("seconds", "words"), [(5, "5 s"), (600, "10 min"), (7200, "2.0 h"), (89, "89 s")]
)
def test_a_duration_is_told_in_the_unit_that_suits_it(seconds: float, words: str) -> None:
    assert duration(seconds) == words
