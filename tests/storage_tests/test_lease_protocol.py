"""Workers that claim, train, die and wake up late in any order: storage/ against a model of it."""

import contextlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import optuna
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from optuna.trial import TrialState
from sqlalchemy import text

from storage import leases, studies
from storage.database import Database
from storage.errors import LeaseLost
from storage.leases import MOST_FRUITLESS_ATTEMPTS, Lease, NoWork, fruitless_reason
from storage.studies import OpenStudy
from tests.parts import make_study

SETTINGS = settings(
    max_examples=75,
    stateful_step_count=40,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
LONG, SHORT = 3600.0, 0.001
WORKERS = st.sampled_from("abc")
AGES = st.integers(0, 7)
NAMES = st.sampled_from(["lr", "momentum"])
ENDS = st.sampled_from([TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL])


@dataclass
class ModelTrial:
    """What the database must hold of a trial."""

    state: str = "RUNNING"
    params: dict[str, float] = field(default_factory=dict)
    values: dict[str, float] = field(default_factory=dict)
    attributes: dict[str, Any] = field(default_factory=dict)
    final: float | None = None
    fixed: dict[str, float] = field(default_factory=dict, compare=False)

    @property
    def has_ended(self) -> bool:
        return self.state in ("COMPLETE", "PRUNED", "FAIL")


@dataclass
class ModelLease:
    """What the database must hold of a lease. until: held, past (expired), or free."""

    token: int
    worker_id: str | None
    trial_id: int | None
    until: str = "held"
    attempts: int = 1
    fruitless_attempts: int = 1
    ended: bool = False
    position: int = 0
    errors: int = 0
    last_error: str | None = None
    refused_by: list[str] = field(default_factory=list)


class LeaseProtocol(RuleBasedStateMachine):
    """Three workers and whoever else has a hand in it; any lease ever given may be used again."""

    num_steps = 0

    def __init__(self, database: Database, number: int) -> None:
        super().__init__()
        self.database, self.budget = database, 1
        record = make_study(database, lease_seconds=SHORT, name=f"study-{number}")
        self.study_id = record.study_id
        self.study, other = (OpenStudy(database, record) for _ in range(2))
        self.opened = {"a": self.study, "b": other, "c": other}
        for seed, study in enumerate((self.study, other)):
            study.study.sampler = optuna.samplers.RandomSampler(seed=2 * number + seed)
        self.storage = self.study.study._storage
        self.owners: dict[int, OpenStudy] = {}
        self.numbers = itertools.count(1)
        self.given: list[Lease] = []
        self.leases: dict[int, ModelLease] = {}
        self.trials: dict[int, ModelTrial] = {}
        self.places: dict[str, str] = {}
        """Worker id -> place, of those that are registered."""
        self.sick: set[str] = set()
        self.asked_outside: set[int] = set()
        self.failures: list[bool] = []
        self.stopped = False
        self.just_restarted = False

    @initialize(budget=st.sampled_from([2, 4, 31]))
    def launch(self, budget: int) -> None:
        self.relaunch(budget)

    # what workers do

    @rule(worker=WORKERS)
    def begin_work(self, worker: str) -> None:
        leases.register_worker(
            self.database, self.study_id, self.id_of(worker), host="h", pid=1, device="cpu"
        )
        self.places[self.id_of(worker)] = self.id_of(worker)
        self.sick.discard(self.id_of(worker))

    @rule(worker=WORKERS)
    def claim(self, worker: str) -> None:
        largest_token = max((lease.token for lease in self.given), default=0)
        expected = self.expected_claim(self.id_of(worker))
        found = leases.claim(self.database, self.study_id, self.id_of(worker), lease_seconds=LONG)
        if isinstance(found, NoWork):
            assert found is expected
            return
        assert isinstance(expected, ModelLease)
        assert (found.trial_id, found.attempts) == (expected.trial_id, expected.attempts)
        assert found.token > largest_token
        expected.token = found.token
        assert self.leases.setdefault(found.lease_id, expected) is expected
        self.given.append(found)
        self.owners[found.token] = self.opened[worker]

    @precondition(lambda self: self.given)
    @rule(age=AGES)
    def bind(self, age: int) -> None:
        self.bound(age)

    @precondition(lambda self: self.given)
    @rule(age=AGES, name=NAMES)
    def suggest(self, age: int, name: str) -> None:
        lease, trial_id = self.bound(age)
        if trial_id is None:
            return
        params, suggested = self.trials[trial_id].params, []

        study = self.owners[lease.token]
        study.trial(trial_id)

        def call() -> float:
            return optuna.Trial(study.study, trial_id).suggest_float(name, 0, 1)

        def write() -> None:
            suggested.append(study.write(lease, call))

        if self.holds(lease) and name in params:
            write()
            assert suggested == [params[name]]
        elif name in params:  # of an ended trial Optuna may read it from memory, and writes nothing
            with contextlib.suppress(LeaseLost):
                write()
            assert suggested in ([], [params[name]])
        elif self.may_write(lease, trial_id, write):
            params[name] = suggested[0]
            assert self.trials[trial_id].fixed.get(name, params[name]) == params[name]

    @precondition(lambda self: self.given)
    @rule(age=AGES)
    def note(self, age: int) -> None:
        lease, trial_id = self.bound(age)
        if trial_id is None:
            return
        number = next(self.numbers)

        study = self.owners[lease.token]

        def call() -> None:
            study.study._storage.set_trial_user_attr(trial_id, "note", number)

        if self.may_write(lease, trial_id, lambda: study.write(lease, call)):
            self.trials[trial_id].attributes["note"] = number

    @precondition(lambda self: self.given)
    @rule(age=AGES, step=st.sampled_from([1, 4, 8]))
    def report(self, age: int, step: int) -> None:
        lease, trial_id = self.bound(age)
        if trial_id is None:
            return
        value = next(self.numbers) / 1000

        def call() -> None:
            self.owners[lease.token].report(lease, step, value, images_per_second=1.0)

        values = self.trials[trial_id].values
        is_new = step > max(map(int, values), default=0)
        written = self.may_write(lease, trial_id, call)
        if written:
            values[str(step)] = value
        if written and is_new:  # what an earlier attempt has reported is no progress
            self.leases[lease.lease_id].fruitless_attempts = 0

    @precondition(lambda self: self.given)
    @rule(age=AGES, state=ENDS)
    def end(self, age: int, state: TrialState) -> None:
        lease, trial_id = self.bound(age)
        if trial_id is None:
            return
        trial, number = self.trials[trial_id], next(self.numbers)
        value = None if state == TrialState.FAIL else number / 1000

        def call() -> None:
            self.owners[lease.token].end(lease, state, value=value, reason=f"said {number}")

        model = self.leases[lease.lease_id]
        if model.token == lease.token and model.ended and trial.state == state.name:
            call()  # as after a lost COMMIT: changes nothing
        elif self.may_write(lease, trial_id, call):
            trial.state, trial.final = state.name, value
            trial.attributes["reason"] = f"said {number}"
            self.end_lease(model)

    @precondition(lambda self: self.given)
    @rule(age=AGES, worker=WORKERS)
    def renew(self, age: int, worker: str) -> None:
        lease, worker_id = self.lease_of(age), self.id_of(worker)
        found = leases.renew(self.database, lease, worker_id, lease_seconds=LONG)
        renews = self.holds(lease) and self.leases[lease.lease_id].until != "free"
        assert found.holds_lease is renews
        assert found.study_goes_on is (worker_id in self.places and not self.stopped)
        if renews:
            self.leases[lease.lease_id].until = "held"

    @precondition(lambda self: self.given)
    @rule(age=AGES)
    def release(self, age: int) -> None:
        lease = self.lease_of(age)
        leases.release(self.database, lease)
        if self.holds(lease):
            model = self.leases[lease.lease_id]
            model.until, model.worker_id, model.fruitless_attempts = "free", None, 0
            if model.trial_id is None:
                del self.leases[lease.lease_id]

    @precondition(lambda self: self.given)
    @rule(age=AGES, position=st.integers(1, 3))
    def save_within_an_epoch(self, age: int, position: int) -> None:
        lease = self.lease_of(age)
        leases.advance(self.database, lease, position)
        if self.holds(lease) and self.leases[lease.lease_id].position < position:
            model = self.leases[lease.lease_id]
            model.position, model.fruitless_attempts = position, 0

    @precondition(lambda self: self.given)
    @rule(age=AGES, may_be_the_trials=st.booleans())
    def give_back_after_an_error(self, age: int, may_be_the_trials: bool) -> None:
        lease, error = self.lease_of(age), f"error {next(self.numbers)}"
        leases.give_back(self.database, lease, error, may_be_the_trials=may_be_the_trials)
        if self.holds(lease):
            model = self.leases[lease.lease_id]
            place = self.places.get(model.worker_id or "")
            if place is not None and place not in model.refused_by:
                model.refused_by.append(place)
            model.errors += may_be_the_trials
            model.until, model.worker_id, model.last_error = "free", None, error
            if model.trial_id is None:
                del self.leases[lease.lease_id]

    # what happens to workers

    @rule(worker=WORKERS, cause=st.sampled_from([None, "killed by signal 9"]))
    def die(self, worker: str, cause: str | None) -> None:
        """Where the launcher sees it; elsewhere leases expire."""
        held = leases.forget_worker(self.database, self.id_of(worker), cause=cause)
        if self.id_of(worker) not in self.sick:
            self.places.pop(self.id_of(worker), None)
        assert held is self.freed(worker, cause)

    @rule(worker=WORKERS)
    def fall_sick(self, worker: str) -> None:
        leases.mark_sick(self.database, self.id_of(worker), "no disk")
        if self.id_of(worker) in self.places:
            self.sick.add(self.id_of(worker))
        self.freed(worker, "no disk")

    @precondition(lambda self: self.given)
    @rule(age=AGES)
    def let_expire(self, age: int) -> None:
        lease_id = self.lease_of(age).lease_id
        statement = """
            UPDATE hpo_leases SET expires_at = now() - interval '1 s'
            WHERE lease_id = :lease AND expires_at IS NOT NULL
        """
        self.execute(statement, lease=lease_id)
        if lease_id in self.leases and self.leases[lease_id].until == "held":
            self.leases[lease_id].until = "past"

    # what others do

    @rule()
    def reap(self) -> None:
        leases.reap(self.database, self.study_id)
        self.expect_reaping()

    @rule(just_restarted=st.booleans())
    def restart_database(self, just_restarted: bool) -> None:
        """As if: nothing expires within one lease's time of the database's start."""
        statement = """
            UPDATE hpo_studies SET spec = jsonb_build_object('lease_seconds', :seconds)
            WHERE study_id = :study
        """
        self.execute(statement, seconds=1e9 if just_restarted else SHORT)
        self.just_restarted = just_restarted

    @rule(eighths=st.integers(0, 8))
    def enqueue(self, eighths: int) -> None:
        self.study.study.enqueue_trial({"lr": eighths / 8})
        (new,) = self.trials_found().keys() - self.trials.keys()
        self.trials[new] = ModelTrial(state="WAITING", fixed={"lr": eighths / 8})

    @rule()
    def ask_outside(self) -> None:
        trial_id = self.storage.create_new_trial(self.study_id)
        self.trials[trial_id] = ModelTrial()
        self.asked_outside.add(trial_id)

    @precondition(lambda self: self.given)
    @rule(age=AGES)
    def fail_in_dashboard(self, age: int) -> None:
        model = self.leases.get(self.lease_of(age).lease_id)
        if model is None or model.trial_id is None or self.trials[model.trial_id].has_ended:
            return
        self.storage.set_trial_state_values(model.trial_id, TrialState.FAIL)
        self.trials[model.trial_id].state = "FAIL"

    @rule()
    def stop(self) -> None:
        studies.request_stop(self.database, self.study_id)
        self.stopped = True

    @precondition(lambda self: self.stopped or any(self.failures))
    @rule(more=st.integers(0, 2))
    def launch_again(self, more: int) -> None:
        self.relaunch(self.budget + more if more else None)

    # what holds after each step

    @invariant()
    def all_is_well(self) -> None:
        type(self).num_steps += 1
        trials, found = self.trials_found(), self.leases_found()
        assert trials == self.trials
        assert found == self.leases
        num_finished = sum(trial.state in ("COMPLETE", "PRUNED") for trial in trials.values())
        num_open = sum(not lease.ended for lease in found.values())
        assert num_finished + num_open <= self.budget
        bound = [lease.trial_id for lease in found.values() if lease.trial_id is not None]
        assert len(bound) == len(set(bound))
        running = {trial_id for trial_id, trial in trials.items() if trial.state == "RUNNING"}
        assert running - self.asked_outside <= set(bound)

    def teardown(self) -> None:
        """Drain the study by a worker that never dies. I1 to I5 of FAULTS hold then."""
        self.restart_database(False)
        self.relaunch(min(self.budget, self.num_finished + self.num_open + 2))
        while self.num_finished < self.budget:
            num_given = len(self.given)
            self.claim("a")
            if len(self.given) > num_given:
                self.suggest(0, "lr")
                self.report(0, 8)
                self.end(0, TrialState.COMPLETE)
            else:  # others hold what is left, or several died with nothing reported
                for age in range(num_given):
                    self.let_expire(age)
                self.relaunch(None)
        self.reap()
        self.all_is_well()
        found = list(self.trials_found().values())
        assert self.num_finished == self.budget
        assert {trial.state for trial in found} <= {"COMPLETE", "PRUNED", "FAIL", "WAITING"}
        assert all(lease.ended for lease in self.leases_found().values())
        finals = [trial.final for trial in found if trial.state == "COMPLETE"]
        if finals:
            assert self.study.study.best_value == max(final for final in finals if final)

    # the model

    def expected_claim(self, worker_id: str) -> ModelLease | NoWork:
        """What a claim gives now; the model is changed accordingly, but for the token."""
        if self.stopped:
            return NoWork.STOPPED
        self.expect_reaping()
        num_failed = sum(self.failures)
        if self.failures[-3:] == [True] * 3 or num_failed >= max(3, self.budget / 10 + 1e-9):
            return NoWork.FAILING
        free = {
            lease.trial_id: lease
            for lease in self.leases.values()
            if lease.trial_id is not None
            and self.is_free(lease)
            and not self.is_for_others(lease, worker_id)
        }
        if free:
            lease = free[min(free)]
            lease.worker_id, lease.until = worker_id, "held"
            lease.attempts += 1
            lease.fruitless_attempts += 1
            return lease
        if self.num_finished + self.num_open >= self.budget:
            return NoWork.DONE if self.num_finished >= self.budget else NoWork.BUSY
        points = [key for key, trial in self.trials.items() if trial.state == "WAITING"]
        trial_id = min(points, default=None)
        if trial_id is not None:
            self.trials[trial_id].state = "RUNNING"
        return ModelLease(token=0, worker_id=worker_id, trial_id=trial_id)

    def expect_reaping(self) -> None:
        for lease_id, lease in list(self.leases.items()):
            if lease.trial_id is None and lease.until != "held":
                del self.leases[lease_id]
            elif lease.trial_id is None or lease.ended:
                continue
            elif self.trials[lease.trial_id].has_ended:
                self.end_lease(lease)
            elif self.is_free(lease) and lease.fruitless_attempts >= MOST_FRUITLESS_ATTEMPTS:
                self.expect_failure(lease.trial_id, fruitless_reason(lease.last_error))
                self.end_lease(lease)
        for trial_id in self.asked_outside:
            self.expect_failure(trial_id, "asked for, but never bound to a worker")
        self.asked_outside.clear()

    def expect_failure(self, trial_id: int, reason: str) -> None:
        self.trials[trial_id].state = "FAIL"
        self.trials[trial_id].attributes["reason"] = reason

    def end_lease(self, lease: ModelLease) -> None:
        assert lease.trial_id is not None
        lease.worker_id, lease.until, lease.ended = None, "free", True
        self.failures.append(self.trials[lease.trial_id].state == "FAIL")

    def freed(self, worker: str, cause: str | None) -> bool:
        """Whether the worker held a lease, which nobody holds now."""
        held = [m for m in self.leases.values() if m.worker_id == self.id_of(worker)]
        for model in held:
            model.until, model.worker_id = "free", None
            model.last_error = cause or model.last_error
        return bool(held)

    def is_for_others(self, lease: ModelLease, worker_id: str) -> bool:
        """Whether this worker gave the trial back, and one that did not is there to take it.

        Nobody counts as there for longer than a lease, but just after a restart, as it is made
        here.
        """
        if self.places.get(worker_id) not in lease.refused_by:
            return False
        others = self.places.keys() - self.sick - {worker_id}
        return self.just_restarted and any(
            self.places[other] not in lease.refused_by for other in others
        )

    def is_free(self, lease: ModelLease) -> bool:
        if lease.until == "past":
            return not self.just_restarted
        return lease.until == "free" and not lease.ended

    def holds(self, lease: Lease) -> bool:
        model = self.leases.get(lease.lease_id)
        return model is not None and model.token == lease.token and not model.ended

    @property
    def num_finished(self) -> int:
        return sum(trial.state in ("COMPLETE", "PRUNED") for trial in self.trials.values())

    @property
    def num_open(self) -> int:
        return sum(not lease.ended for lease in self.leases.values())

    # helpers

    def lease_of(self, age: int) -> Lease:
        """One that was given out, 0: the newest."""
        return self.given[-1 - age % len(self.given)]

    def bound(self, age: int) -> tuple[Lease, int | None]:
        """A lease and its trial, None if the lease is lost before it has one."""
        lease = self.lease_of(age)
        model = self.leases.get(lease.lease_id)
        if lease.trial_id is None and (model is None or model.token != lease.token):
            with pytest.raises(LeaseLost):
                self.owners[lease.token].bind(lease)
            return lease, None
        assert model is not None
        trial_id = self.owners[lease.token].bind(lease)
        if model.trial_id is None:
            assert trial_id not in self.trials
            self.trials[trial_id], model.trial_id = ModelTrial(), trial_id
        assert trial_id == model.trial_id
        return lease, trial_id

    def may_write(self, lease: Lease, trial_id: int, write: Callable[[], object]) -> bool:
        """Write, and whether that was to succeed; if not, it must say so."""
        if self.holds(lease) and not self.trials[trial_id].has_ended:
            write()
            return True
        with pytest.raises(LeaseLost):
            write()
        return False

    def relaunch(self, budget: int | None) -> None:
        studies.relaunch(self.database, self.study_id, budget=budget, timeout_seconds=None)
        self.budget = budget or self.budget
        self.stopped, self.failures = False, []
        for worker_id in self.sick:
            del self.places[worker_id]
        self.sick.clear()

    def id_of(self, worker: str) -> str:
        return f"{self.study_id}-{worker}"

    def execute(self, statement: str, **given: Any) -> None:
        with self.database.engine.begin() as connection:
            connection.execute(text(statement), {"study": self.study_id, **given})

    def trials_found(self) -> dict[int, ModelTrial]:
        with self.database.engine.connect() as connection:
            rows = connection.execute(_TRIALS, {"study": self.study_id}).all()
        return {row[0]: ModelTrial(*row[1:]) for row in rows}

    def leases_found(self) -> dict[int, ModelLease]:
        with self.database.engine.connect() as connection:
            rows = connection.execute(_LEASES, {"study": self.study_id}).all()
        return {row[0]: ModelLease(*row[1:]) for row in rows}


_TRIALS = text("""
    SELECT trial_id, state::text,
        coalesce((SELECT json_object_agg(param_name, param_value)
            FROM trial_params p WHERE p.trial_id = t.trial_id), '{}'),
        coalesce((SELECT json_object_agg(step, intermediate_value)
            FROM trial_intermediate_values v WHERE v.trial_id = t.trial_id), '{}'),
        coalesce((SELECT json_object_agg(key, value_json::json)
            FROM trial_user_attributes a WHERE a.trial_id = t.trial_id), '{}'),
        (SELECT value FROM trial_values f WHERE f.trial_id = t.trial_id)
    FROM trials t WHERE study_id = :study
""")

_LEASES = text("""
    SELECT lease_id, token, worker_id, trial_id,
        CASE WHEN expires_at IS NULL THEN 'free' WHEN expires_at < now() THEN 'past'
            ELSE 'held' END,
        attempts, fruitless_attempts, ended_at IS NOT NULL, position, errors, last_error,
        refused_by
    FROM hpo_leases WHERE study_id = :study
""")


def test_any_order_of_what_workers_do_and_suffer_keeps_budget_trials_and_tokens(
    database: Database, record_property: Callable[[str, object], None]
) -> None:
    numbers = itertools.count()

    class OnDatabase(LeaseProtocol):
        def __init__(self) -> None:
            super().__init__(database, next(numbers))

    run_state_machine_as_test(OnDatabase, settings=SETTINGS)
    record_property("steps", OnDatabase.num_steps)
    assert OnDatabase.num_steps > 2000
