"""python -m benchmarks: the quick ones, in a few minutes."""

from benchmarks import start, worker

if __name__ == "__main__":
    start.main()
    worker.main()
