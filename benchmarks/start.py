"""What a user waits for: `hpo --help` beside Python itself, and a launch's first training step.

    python -m benchmarks.start         writes benchmarks/start.json

Each after one run that is not counted; wall-clock seconds. The first step is counted from the
command to the end of the first trial's set-up, by Postgres's clock, which is this machine's; the
embedded server was started before. Beside it, what a script needs that only imports torch and
torchvision.
"""

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psycopg2

from hpo.measured import machine
from storage.embedded import EmbeddedPostgres

ROUNDS = 15
LAUNCHES = 5
COMMANDS = {
    "python -c pass": ["-c", "pass"],
    "hpo --help": ["-m", "hpo.cli", "--help"],
}
IMPORTS = ["-c", "import torch, torchvision"]
_FIRST_STEP = """
    SELECT min(extract(epoch FROM claimed_at) + (value_json::json->>'setup')::float)
    FROM hpo_leases JOIN trial_user_attributes USING (trial_id) JOIN studies USING (study_id)
    WHERE key = 'spent' AND study_name = %s
"""


def seconds(arguments: list[str]) -> float:
    """Of one process."""
    started = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def first_steps() -> dict[str, list[float]]:
    """Seconds to the first step and to the end of a launch of one trial, and of importing torch."""
    found: dict[str, list[float]] = {"first step": [], "whole launch": [], "import": []}
    with tempfile.TemporaryDirectory(prefix="hpo-start", ignore_cleanup_errors=True) as home:
        Path(home).chmod(0o711)
        environment = {**os.environ, "HPO_HOME": home}
        environment.pop("HPO_STORAGE", None)
        server = EmbeddedPostgres(Path(home, "postgres"))
        server.join()
        for index in range(1 + LAUNCHES):
            study = f"s{index}"
            command = [sys.executable, "-m", "hpo.cli", "launch", "--study", study]
            command += ["--trials", "1", "--epochs", "1", "--backbone", "smallcnn"]
            started = time.time()
            subprocess.run(command, env=environment, check=True, capture_output=True)
            ended = time.time()
            with (
                contextlib.closing(psycopg2.connect(**server.parameters)) as connection,
                connection.cursor() as cursor,
            ):
                cursor.execute(_FIRST_STEP, (study,))
                (at,) = cursor.fetchone()
            if index:  # the first one measures the machine
                found["first step"].append(at - started)
                found["whole launch"].append(ended - started)
                found["import"].append(seconds(IMPORTS))
    return found


def main(_arguments: list[str] | None = None) -> None:
    """Measure, print, write."""
    rounds = [
        {name: seconds(arguments) for name, arguments in COMMANDS.items()}
        for _ in range(1 + ROUNDS)
    ][1:]
    rows = {name: [round(each[name], 4) for each in rounds] for name in COMMANDS}
    more = statistics.median(each["hpo --help"] - each["python -c pass"] for each in rounds)
    rows |= {name: [round(each, 3) for each in found] for name, found in first_steps().items()}
    medians = {name: statistics.median(each) for name, each in rows.items()}
    result = {"machine": machine(), "seconds": rows, "median": medians, "difference": more}
    Path(__file__).with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    for name, median in medians.items():
        print(f"{name:15s} {median:.3f} s (median of {len(rows[name])})")
    print(f"hpo --help over Python: {more:.3f} s (median of the rounds' differences)")


if __name__ == "__main__":
    main()
