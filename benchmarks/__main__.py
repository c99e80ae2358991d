"""python -m benchmarks: the short form of the quick ones, in under a quarter of an hour."""

from benchmarks import start, study, train

if __name__ == "__main__":
    start.main([])
    train.main(["--seconds", "5"])
    study.main(["equal", "--rounds", "1", "--arms", "hpo;tutorial, one process"])
