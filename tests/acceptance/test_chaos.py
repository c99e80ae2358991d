"""The commands under faults: the short form of benchmarks.chaos, and that its auditor can fail."""

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.chaos.__main__ import arena as new_arena
from benchmarks.chaos.audit import audit
from benchmarks.chaos.faults import FaultPlan
from benchmarks.chaos.rows import SHORT, findings_of
from benchmarks.chaos.stage import Arena, Stage, query
from hpo.status import status_json
from storage.database import Database
from storage.snapshots import snapshot
from storage.studies import find_study
from tests.parts import PASSWORD

BUDGET = 3
Doctor = Callable[[Stage], None]


@pytest.fixture(scope="session")
def arena() -> Iterator[Arena]:
    """A Postgres of its own, over TCP and behind a password."""
    with new_arena(None) as made:
        yield made


@pytest.mark.parametrize("row", SHORT)
def test_a_study_under_faults_ends_exactly(row: str, arena: Arena) -> None:
    findings = list(findings_of(arena, row, long=False))
    assert findings
    assert {each.done: each.violations for each in findings if each.violations} == {}


class Doctored(Stage):
    """A stage that has ended; `hpo status` is asked in this process."""

    def json(self, command: str) -> Any:
        """Of status alone."""
        assert command == "status"
        database = Database(self.url)
        try:
            record = find_study(database, "digits")
            return status_json(record.name, snapshot(database, record.study_id))
        finally:
            database.engine.dispose()

    def note(self, **line: Any) -> None:
        """Add to the witness, in the words of its first line of this kind."""
        like = self.witness(line["kind"])[0]
        with (self.folder / "witness.jsonl").open("a") as log:
            log.write(json.dumps({**like, **line}) + "\n")


@pytest.fixture(scope="session")
def ended(arena: Arena) -> Iterator[Stage]:
    """A stage whose study has ended without a fault."""
    with arena.stage(FaultPlan(folder="", leg_seconds=0.0)) as stage:
        assert stage.launch(trials=BUDGET, workers=1).wait(60) == 0
        yield stage


@pytest.fixture
def doctored(ended: Stage, tmp_path: Path) -> Iterator[Doctored]:
    """A copy of it, to falsify."""
    folder, name = tmp_path / "stage", f"doctored_{tmp_path.name[-40:].lower()}"
    shutil.copytree(ended.folder, folder)
    query(ended.server, "postgres", f'CREATE DATABASE "{name}" TEMPLATE {ended.database}')
    given = {each.name: getattr(ended, each.name) for each in dataclasses.fields(ended)}
    yield Doctored(**{**given, "folder": folder, "database": name})
    query(ended.server, "postgres", f'DROP DATABASE "{name}" WITH (FORCE)')


def sql(*statements: str) -> Doctor:
    def doctor(stage: Stage) -> None:
        for statement in statements:
            stage.query(statement)

    return doctor


def told(**line: Any) -> Doctor:
    def doctor(stage: Stage) -> None:
        assert isinstance(stage, Doctored)
        stage.note(**line)

    return doctor


def logged(text: str) -> Doctor:
    def doctor(stage: Stage) -> None:
        (stage.folder / "err-999.txt").write_text(text)

    return doctor


COMPLETE = "(SELECT min(trial_id) FROM trials WHERE state = 'COMPLETE')"
"""The first trial is never stopped at a rung."""
FALSIFIED: dict[str, tuple[Doctor, str]] = {
    "a trial that was lost": (sql("UPDATE trials SET state = 'FAIL' WHERE number = 1"),
                              "I1: 2 of 3 trials have ended"),
    "a trial too many": (sql("INSERT INTO trials (number, study_id, state) SELECT 3, study_id,"
                             " 'COMPLETE' FROM studies"), "I1: 4 of 3 trials have ended"),
    "a trial that ended twice": (told(kind="ended", token=10_000), "were ended twice"),
    "a trial left behind": (sql("UPDATE trials SET state = 'RUNNING' WHERE number = 1"),
                            "I2: 1 left RUNNING"),
    "a trial left waiting": (sql("UPDATE trials SET state = 'WAITING' WHERE number = 1"),
                             "I2: 1 left RUNNING"),
    "a lease left open": (sql("UPDATE hpo_leases SET ended_at = NULL WHERE token = 1"),
                          "I2: 1 leases left open"),
    "a trial that failed": (sql("UPDATE trials SET state = 'FAIL' WHERE number = 1"),
                            "I2: 1 trials failed, not 0"),
    "an orphan without a fault": (sql("INSERT INTO trials (number, study_id, state) SELECT 3,"
                                      " study_id, 'FAIL' FROM studies"),
                                  "I2: 1 trials swept in 0 faults"),
    "a report that is missing": (sql(f"DELETE FROM trial_intermediate_values WHERE step = 4 AND"
                                     f" trial_id = {COMPLETE}"), "I3: trial 0 reported"),
    "a report of another value": (sql(f"UPDATE trial_intermediate_values SET intermediate_value ="
                                      f" 0.125 WHERE step = 4 AND trial_id = {COMPLETE}"),
                                  "I3: trial 0 has reports that nobody made"),
    "a report that stands twice": (
        sql("ALTER TABLE trial_intermediate_values DROP CONSTRAINT"
            " trial_intermediate_values_trial_id_step_key",
            "INSERT INTO trial_intermediate_values SELECT 10000, trial_id, step,"
            " intermediate_value, intermediate_value_type FROM trial_intermediate_values"
            " ORDER BY 2, 3 LIMIT 1"),
        "I3: 1 reports stand twice"),
    "a trial cut short": (sql(f"DELETE FROM trial_intermediate_values WHERE step = 12 AND"
                              f" trial_id = {COMPLETE}"), "I3: trial 0 reported"),
    "a parameter that changed": (told(kind="param", name="lr", value=0.5), "I4: parameters"),
    "a best value that nobody reached": (sql(f"UPDATE trial_values SET value = 0.999 WHERE"
                                             f" trial_id = {COMPLETE}"), "I5: the best is 0.999"),
    "a part of an epoch begun again": (told(kind="begin"), "I6: 1 parts of an epoch"),
    "an epoch that came to another value": (told(kind="leg", value=0.125), "came to ["),
    "a password in a log": (logged(f"postgresql://postgres:{PASSWORD}@host"), "the password"),
    "a traceback": (logged("Traceback (most recent call last)\n  File\nValueError: x"),
                    "a traceback in err-999.txt: ValueError: x"),
}  # fmt: skip


def test_the_auditor_finds_nothing_where_nothing_went_wrong(doctored: Doctored) -> None:
    assert audit(doctored, "0", done="nothing", budget=BUDGET).violations == []


@pytest.mark.parametrize("what", FALSIFIED)
def test_the_auditor_finds(what: str, doctored: Doctored) -> None:
    doctor, said = FALSIFIED[what]
    doctor(doctored)
    after = audit(doctored, "0", done=what, budget=BUDGET)
    assert any(said in violation for violation in after.violations), after.violations
