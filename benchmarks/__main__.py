"""python -m benchmarks: all of them, in their short form."""

from benchmarks import worker

if __name__ == "__main__":
    worker.main()
