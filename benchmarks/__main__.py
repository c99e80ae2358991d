"""python -m benchmarks: the short form of the quick ones, in under a quarter of an hour."""

from pathlib import Path

from benchmarks import start, study, train

SHORT = Path(__file__).with_name("study-short.json")
"""Measured anew each time; the long form goes on with what it has."""

if __name__ == "__main__":
    start.main([])
    train.main(["--seconds", "5"])
    SHORT.unlink(missing_ok=True)
    arms = "hpo;tutorial, one process;ray tune"
    study.main(["equal", "--rounds", "1", "--arms", arms, "--out", str(SHORT)])
