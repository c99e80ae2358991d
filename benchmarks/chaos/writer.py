"""Writes checkpoints until it is killed: python writer.py ROOT TOKEN prints each step it saved."""

import os
import sys
from pathlib import Path

from storage.checkpoints import TrialCheckpoints

MIB = 2**20


def main(root: Path, token: int) -> None:
    """The payload begins with its step, 8 bytes; at most 10,000 steps."""
    checkpoints = TrialCheckpoints(root, study_key=1, trial_number=1, token=token)
    found = checkpoints.take_over()
    first = 0 if found is None else int.from_bytes(found[:8], "big") + 1
    os.write(1, b"ready\n")
    for step in range(first, first + 10_000):
        checkpoints.save(step, step.to_bytes(8, "big") + os.urandom(2 * MIB))
        os.write(1, f"{step}\n".encode())


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
