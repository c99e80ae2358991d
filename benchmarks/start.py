"""What a user waits for before anything is trained: `hpo --help` beside Python itself.

    python -m benchmarks.start         writes benchmarks/start.json

The two in turn, after one run of each that is not counted; wall-clock seconds.
"""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from hpo.measured import machine

ROUNDS = 15
COMMANDS = {"python -c pass": ["-c", "pass"], "hpo --help": ["-m", "hpo.cli", "--help"]}


def seconds(arguments: list[str]) -> float:
    """Of one process."""
    started = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def main(_arguments: list[str] | None = None) -> None:
    """Measure, print, write."""
    rounds = [
        {name: seconds(arguments) for name, arguments in COMMANDS.items()}
        for _ in range(1 + ROUNDS)
    ][1:]
    rows = {name: [round(each[name], 4) for each in rounds] for name in COMMANDS}
    medians = {name: statistics.median(each) for name, each in rows.items()}
    more = statistics.median(each["hpo --help"] - each["python -c pass"] for each in rounds)
    result = {"machine": machine(), "seconds": rows, "median": medians, "difference": more}
    Path(__file__).with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    for name, median in medians.items():
        print(f"{name:15s} {median:.3f} s (median of {ROUNDS})")
    print(f"difference      {more:.3f} s (median of the rounds' differences)")


if __name__ == "__main__":
    main()
