"""A checkpoint that was written by somebody else, with our header and a right checksum."""

import pickle
from pathlib import Path

import pytest

from storage.checkpoints import TrialCheckpoints, seal
from trainer.state import CheckpointError, read_history


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, witness: Path) -> None:
        self._witness = witness

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self._witness,)


def test_a_hostile_checkpoint_is_handed_over_and_runs_no_code(tmp_path: Path) -> None:
    witness = tmp_path / "witness"
    root = tmp_path / "root"
    TrialCheckpoints(root, study_key=1, trial_number=1, token=1).take_over()
    hostile = pickle.dumps(Trap(witness))
    (root / "1" / "1" / "1" / "4.ckpt").write_bytes(seal(hostile))
    found = TrialCheckpoints(root, study_key=1, trial_number=1, token=2).take_over()
    assert found == hostile
    with pytest.raises(CheckpointError, match="it is broken"):
        read_history(found)
    assert not witness.exists()
    pickle.loads(found)  # noqa: S301
    assert witness.exists()  # the trap was one
