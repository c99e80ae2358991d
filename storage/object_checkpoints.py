"""Checkpoints of trials in an object store, with a table that says which there may be.

    PREFIX/STUDY_KEY/TRIAL_NUMBER/TOKEN/STEP.ckpt

A store can't rename a folder in one step, and Optuna's artifact stores can't list. So a row is
written under the fence of the lease before its object is, and goes after it: an object without a
row is one that nobody reads, a row without an object is passed over. What an old attempt still
uploads after a take-over lies under a name of its own, whose row is not kept any more.
"""

from collections.abc import Sequence
from typing import Any, Protocol

from sqlalchemy import Row, text

from storage.checkpoints import KEPT, seal, unseal
from storage.database import Database
from storage.errors import LeaseLost
from storage.leases import Lease


class Objects(Protocol):
    """Bytes by name. OSError from any method."""

    def read(self, name: str, *, most_bytes: int) -> bytes | None:
        """The first `most_bytes` of the object; None if there is none."""

    def write(self, name: str, content: bytes) -> None:
        """All of it or nothing."""

    def remove(self, name: str) -> None:
        """Also one that isn't there."""


class ObjectCheckpoints:
    """The checkpoints of one attempt at a trial, as storage.checkpoints.Checkpoints has it."""

    def __init__(
        self, store: Objects, database: Database, lease: Lease, *, trial_id: int, study_key: int
    ) -> None:
        self._store, self._database, self._key = store, database, study_key
        self._given = {
            "lease": lease.lease_id,
            "token": lease.token,
            "study": lease.study_id,
            "trial": trial_id,
        }

    def take_over(self) -> bytes | None:
        """The newest valid checkpoint; newer ones that are not whole are never looked at again."""
        self._hold()
        for row in self._rows(_KEPT_ROWS):
            content = self._store.read(self._name(row), most_bytes=row.num_bytes)
            payload = None if content is None else unseal(content)
            if payload is not None:
                return payload
            self._hold(_DISCARD, row)
            self._store.remove(self._name(row))
        return None

    def save(self, step: int, payload: bytes) -> None:
        """Keep the state at `step` and the one before it. Raises LeaseLost after a take-over."""
        content = seal(payload)
        (row,) = self._hold(_NOTE, step=step, bytes=len(content))
        try:
            self._store.write(self._name(row), content)
        except OSError:
            self._hold(_DISCARD, row)
            raise
        try:
            self._hold()
        except LeaseLost:
            if not self._rows(_IS_KEPT, step=step):
                self._store.remove(self._name(row))
            raise
        self._remove(self._rows(_SURPLUS, kept=KEPT))

    def remove(self) -> None:
        """The trial has ended for good."""
        self._rows(_DISCARD_ALL)
        self._remove(self._rows(_TO_GO))

    def _name(self, row: Any) -> str:
        return f"{self._key:d}/{row.number:d}/{row.token:d}/{row.step:d}.ckpt"

    def _remove(self, rows: Sequence[Any]) -> None:
        """Objects, then their rows: whoever is killed in between leaves it to the next."""
        for row in rows:
            self._store.remove(self._name(row))
            self._rows(_FORGET, of_trial=row.trial_id, of_token=row.token, step=row.step)

    def _hold(self, statement: Any = None, row: Any = None, **more: Any) -> Sequence[Row[Any]]:
        """The rows of a statement in a transaction in which the lease holds. Raises LeaseLost."""
        if row is not None:
            more |= {"of_token": row.token, "step": row.step}

        def transaction() -> Sequence[Row[Any]]:
            with self._database.engine.begin() as connection:
                if connection.execute(_HOLD, self._given).one_or_none() is None:
                    raise LeaseLost("the checkpoints were taken over")
                if statement is None:
                    return []
                return connection.execute(statement, {**self._given, **more}).all()

        return self._database.patiently(transaction)

    def _rows(self, statement: Any, **more: Any) -> Sequence[Row[Any]]:
        def transaction() -> Sequence[Row[Any]]:
            with self._database.engine.begin() as connection:
                return connection.execute(statement, {**self._given, **more}).all()

        return self._database.patiently(transaction)


_ROW = "c.trial_id, t.number, c.token, c.step, c.num_bytes"

# The fence, as in storage/leases.py: the row is locked and its token compared.
_HOLD = text("""
    SELECT lease_id FROM hpo_leases
    WHERE lease_id = :lease AND token = :token AND ended_at IS NULL FOR UPDATE
""")

_KEPT_ROWS = text(f"""
    SELECT {_ROW} FROM hpo_checkpoints c JOIN trials t USING (trial_id)
    WHERE c.trial_id = :trial AND c.is_kept ORDER BY c.token DESC, c.step DESC
""")

_NOTE = text(f"""
    WITH c AS (
        INSERT INTO hpo_checkpoints (trial_id, token, step, num_bytes)
        VALUES (:trial, :token, :step, :bytes)
        ON CONFLICT (trial_id, token, step) DO UPDATE SET is_kept = true,
            num_bytes = excluded.num_bytes
        RETURNING *)
    SELECT {_ROW} FROM c JOIN trials t USING (trial_id)
""")

# Not deleted: the attempt whose it is may still be uploading it.
_DISCARD = text("""
    UPDATE hpo_checkpoints SET is_kept = false
    WHERE trial_id = :trial AND token = :of_token AND step = :step RETURNING step
""")

_IS_KEPT = text("""
    SELECT step FROM hpo_checkpoints
    WHERE trial_id = :trial AND token = :token AND step = :step AND is_kept
""")

_SURPLUS = text(f"""
    SELECT {_ROW} FROM hpo_checkpoints c JOIN trials t USING (trial_id)
    WHERE c.trial_id = :trial AND c.is_kept
    ORDER BY c.token DESC, c.step DESC OFFSET :kept
""")

# Only for the attempt that the trial ended with.
_DISCARD_ALL = text("""
    UPDATE hpo_checkpoints SET is_kept = false
    WHERE trial_id = :trial AND :token = (
        SELECT token FROM hpo_leases WHERE lease_id = :lease)
    RETURNING step
""")

# Also what those left behind who died between the end of a trial and the removal.
_TO_GO = text(f"""
    SELECT {_ROW} FROM hpo_checkpoints c JOIN trials t USING (trial_id)
    WHERE t.study_id = :study AND (t.state IN ('COMPLETE', 'PRUNED', 'FAIL')
        OR (NOT c.is_kept AND c.trial_id = :trial))
""")

_FORGET = text("""
    DELETE FROM hpo_checkpoints
    WHERE trial_id = :of_trial AND token = :of_token AND step = :step RETURNING step
""")
