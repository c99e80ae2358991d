"""The doctor's forecast of a study's end beside the truth, for three studies.

    python -m benchmarks.forecast      writes benchmarks/forecast.json

By the commands: hpo doctor, then hpo launch with the same options, on an embedded Postgres.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from hpo.measured import machine

STUDIES = (
    ("--data", "digits", "--trials", "30"),
    ("--data", "digits", "--trials", "8", "--backbone", "resnet20", "--epochs", "12"),
    ("--data", "fashion-mnist", "--trials", "8", "--backbone", "smallcnn", "--epochs", "2"),
)
_SECONDS = {"s": 1, "min": 60, "h": 3600}


def compare(options: tuple[str, ...]) -> dict[str, Any]:
    """Seconds forecast and seconds taken, by the clock of whoever waits for the command."""
    with tempfile.TemporaryDirectory(prefix="hpo-forecast") as home:
        Path(home).chmod(0o711)
        environment = {**os.environ, "HPO_HOME": home}
        environment.pop("HPO_STORAGE", None)

        def hpo(*words: str) -> str:
            command = [sys.executable, "-m", "hpo.cli", *words, "--json"]
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, check=True
            )
            return done.stdout

        findings = json.loads(hpo("doctor", *options))
        (end,) = [finding["text"] for finding in findings if finding["about"] == "end"]
        match = re.search(r"about ([\d.]+) (s|min|h) on", end)
        assert match is not None, end
        started = time.perf_counter()
        status = json.loads(hpo("launch", *options))
        taken = time.perf_counter() - started
        time.sleep(5)  # the embedded server leaves before its folder does
    forecast = float(match[1]) * _SECONDS[match[2]]
    return {
        "options": " ".join(options),
        "said": end,
        "forecast_seconds": forecast,
        "seconds": round(taken, 1),
        "ratio": round(forecast / taken, 2),
        "epochs": status["num_epochs"],
    }


def main() -> None:
    """Each study in turn."""
    rows = []
    for options in STUDIES:
        rows.append(compare(options))
        print(json.dumps(rows[-1]), flush=True)
    result = {"machine": machine(), "rows": rows}
    Path(__file__).with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
