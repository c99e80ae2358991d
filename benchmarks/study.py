"""The same study by the scripts people write today, by Ray Tune, and by this project.

    python -m benchmarks.study equal  [--rounds 5] [--arms hpo,ray]    the same work
    python -m benchmarks.study pruned [--rounds 1] [--limit 600]       each with its own pruning

Both write benchmarks/study.json arm by arm, and go on where they were cut. The arms take turns on
the same machine. Fashion-MNIST, its first 10,000 training images (9,000 to train on, 1,000 to
validate; --full: all 60,000); smallcnn and resnet8, Adam, a constant learning rate, flips and
shifts. equal: 12 given configurations, one epoch each; every arm must make the same number of
optimizer steps. pruned: 50 trials of up to 8 epochs from each tool's own sampler.

Ray Tune (extra: peers) is left out where it isn't installed, and said so. `--arms "hpo, 2 workers;
hpo, 4 workers"` compares numbers of workers, on one GPU for example.
"""

import argparse
import contextlib
import functools
import gzip
import importlib.util
import json
import math
import os
import random
import re
import signal
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import psycopg2

from benchmarks.study_report import RESULT, report
from hpo.executors.local import num_cores
from hpo.measured import machine
from storage.embedded import EmbeddedPostgres
from trainer.config import TrainConfig
from trainer.data.fashion_mnist import DEBIAN_FOLDER
from trainer.flops import peak_flops, training_flops

BATCHES, LRS = (64, 128, 256), (3e-4, 3e-2)
BACKBONES = ("smallcnn", "resnet8")
NUM_CORES = num_cores()
SHORT, FULL = 10_000, 60_000
_REPORTS = "SELECT number, step FROM trial_intermediate_values JOIN trials USING (trial_id)"
Row = dict[str, Any]


def points() -> list[dict[str, Any]]:
    """The configurations of the equal study: ten of smallcnn, two of resnet8."""
    chance = random.Random(0)
    return [
        {
            "lr": round(math.exp(chance.uniform(*map(math.log, LRS))), 6),
            "batch_size": BATCHES[index % 3],
            "backbone": BACKBONES[index >= 10],
        }
        for index in range(12)
    ]


Kind = Mapping[str, Any]
KINDS: Mapping[str, Kind] = {
    "equal": {"num_trials": 12, "epochs": 1, "prunes": False, "points": points()},
    "pruned": {"num_trials": 50, "epochs": 8, "prunes": True, "points": []},
}


def peer(module: str, **more: Any) -> Callable[[Row, Path], list[str]]:
    """The command of one of benchmarks.peers."""

    def command(task: Row, folder: Path) -> list[str]:
        path = folder / "task.json"
        path.write_text(json.dumps({**task, **more}))
        return [sys.executable, "-m", f"benchmarks.peers.{module}", str(path)]

    return command


def hpo_command(task: Row, folder: Path, workers: str = "auto") -> list[str]:
    """As a user would type it."""
    space = (
        f"[space]\nlr = {{ low = {LRS[0]}, high = {LRS[1]}, log = true }}\n"
        f"batch_size = {list(BATCHES)}\nbackbone = {json.dumps(BACKBONES)}\n"
        'optimizer = "adam"\nweight_decay = 0.0\nschedule = "constant"\n'
        "flip = true\ntranslate = 2\n"
    )
    (folder / "space.toml").write_text(space)
    command = [sys.executable, "-m", "hpo.cli", "launch", "--data", "fashion-mnist", "--json"]
    command += ["--trials", f"{task['num_trials']}", "--epochs", f"{task['epochs']}"]
    command += ["--space", str(folder / "space.toml"), "--seed", f"{task['seed']}"]
    command += ["--workers", workers]
    for point in task["points"]:
        command += ["--try", ",".join(f"{name}={value}" for name, value in point.items())]
    return command if task["prunes"] else [*command, "--pruner", "none"]


ARMS: Mapping[str, Callable[[Row, Path], list[str]]] = {
    "hpo": hpo_command,
    "tutorial, one process": peer("optuna_script", num_threads=1, num_processes=1),
    "tutorial, a process a core": peer("optuna_script", num_threads=1, num_processes=NUM_CORES),
    "optuna, n_jobs": peer("optuna_script", num_threads=NUM_CORES, num_processes=1),
    "ray tune": peer("ray_tune"),
}


def command_of(arm: str) -> Callable[[Row, Path], list[str]]:
    """Of one of ARMS, or of `hpo, N workers`."""
    if match := re.fullmatch(r"hpo, (\d+) workers?", arm):
        return functools.partial(hpo_command, workers=match[1])
    return ARMS[arm]


def run(arm: str, kind: Kind, seed: int, num_images: int, limit: float | None = None) -> Row:
    """One arm's study, by the clock of whoever waits for its command.

    limit: seconds after which it is broken off; what it has reported until then counts.
    """
    with tempfile.TemporaryDirectory(prefix="hpo-study", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        folder.chmod(0o711)
        task = {
            **kind, "folder": str(first_images(folder / "data", num_images)), "seed": seed,
            "num_train": num_images - num_images // 10, "num_cores": NUM_CORES, "lr": LRS,
            "batch_size": BATCHES, "backbone": BACKBONES,
            "witness": str(folder / "witness.jsonl"), "journal": str(folder / "journal"),
        }  # fmt: skip
        environment = {
            **os.environ,
            "HPO_HOME": str(folder / "home"),
            "HPO_DATA": task["folder"],
            "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        }
        environment.pop("HPO_STORAGE", None)
        command = command_of(arm)(task, folder)
        watching = Watching(arm, folder)
        started = time.time()
        with (folder / "output").open("wb") as output:
            code = ended_with(command, environment, output, limit)
        seconds = time.time() - started
        if code:
            raise SystemExit(f"{arm}: {(folder / 'output').read_text()[-2000:]}")
        lines = watching.ended(environment)
        row = summary(lines, task, seconds, started) | {"broken_off": code is None}
        if arm.startswith("hpo"):
            row["spent"] = asked("status", environment)["spent"]
        time.sleep(3)  # the embedded server leaves before its folder does
        return row


def ended_with(
    command: list[str], environment: Mapping[str, str], output: IO[bytes], limit: float | None
) -> int | None:
    """The exit code; None if it took longer than the limit, and all of it was killed."""
    with subprocess.Popen(
        command, env=environment, stdout=output, stderr=output, start_new_session=True
    ) as process:
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGTERM)
            time.sleep(5)  # Ray's servers have sessions of their own, and leave by themselves
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            return None


def summary(lines: list[Row], task: Row, seconds: float, started: float) -> Row:
    """What the arm's trials came to. lines: one for each report, with the trial's parameters."""
    last: dict[str, Row] = {}
    for each in lines:
        last[each["trial"]] = each
    num_images = sum(task["num_train"] * each["epoch"] for each in last.values())
    steps = sum(
        math.ceil(task["num_train"] / each["batch_size"]) * each["epoch"] for each in last.values()
    )
    flops = sum(
        task["num_train"] * each["epoch"] * training_flops(
            TrainConfig(backbone=each["backbone"]), input_size=(1, 28, 28), num_classes=10
        )
        for each in last.values()
    )  # fmt: skip
    whole = [each["value"] for each in last.values() if each["epoch"] == task["epochs"]]
    curve, best = [], 0.0
    for each in sorted(lines, key=lambda line: float(line["at"])):
        if each["value"] > best:
            best = each["value"]
            curve.append((round(each["at"] - started, 2), best))
    return {
        "seconds": round(seconds, 2),
        "num_trials": len(last),
        "num_whole": len(whole),
        "optimizer_steps": round(steps),
        "images_per_second": round(num_images / seconds, 1),
        "trials_per_hour": round(3600 * len(last) / seconds, 1),
        "flops": flops,
        "peak_flops": peak_flops("cpu"),
        "mean_value": statistics.fmean(whole) if whole else math.nan,
        "best": best,
        "curve": curve,
    }


def asked(command: str, environment: Mapping[str, str]) -> Any:
    """What a command of ours says of the study."""
    words = [sys.executable, "-m", "hpo.cli", command, "--json"]
    return json.loads(
        subprocess.run(words, env=environment, capture_output=True, check=True).stdout
    )


class Watching:
    """Reads the reports of an arm: of a peer from its witness, of ours from the database."""

    def __init__(self, arm: str, folder: Path) -> None:
        self._arm, self._folder = arm, folder
        self._seen: dict[tuple[int, int], float] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._poll)
        if arm.startswith("hpo"):
            self._thread.start()

    def ended(self, environment: Mapping[str, str]) -> list[Row]:
        """The lines of the study, which has ended."""
        if not self._arm.startswith("hpo"):
            text = (self._folder / "witness.jsonl").read_text()
            return [json.loads(each) for each in text.splitlines()]
        self._over.set()
        self._thread.join()
        lines = []
        for trial in asked("trials", environment):
            for step, value in zip(trial["steps"], trial["values"], strict=True):
                at = self._seen.get((trial["number"], step), time.time())
                lines.append({"at": at, "trial": str(trial["number"]), "epoch": step / 4,
                              "value": value, **trial["params"]})  # fmt: skip
        return lines

    def _poll(self) -> None:
        """When each report is in the table, to a fifth of a second; costs a statement each."""
        server = EmbeddedPostgres(self._folder / "home" / "postgres")
        while not self._over.wait(0.2):
            # the server may not be up yet, the tables not there
            with (
                contextlib.suppress(psycopg2.Error),
                contextlib.closing(psycopg2.connect(**server.parameters)) as connection,
                connection.cursor() as cursor,
            ):
                cursor.execute(_REPORTS)
                for number, step in cursor.fetchall():
                    self._seen.setdefault((number, int(step)), time.time())


def first_images(root: Path, number: int) -> Path:
    """A folder with the first of the training images and all test images."""
    folder = root / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    for name, num_axes in (("images-idx3-ubyte", 3), ("labels-idx1-ubyte", 1)):
        for part, most in (("train", number), ("t10k", 10_000)):
            content = gzip.decompress((DEBIAN_FOLDER / f"{part}-{name}.gz").read_bytes())
            shape = struct.unpack_from(f">{num_axes}I", content, 4)
            head, size = 4 + 4 * num_axes, math.prod(shape[1:])
            cut = content[:4] + struct.pack(f">{num_axes}I", most, *shape[1:])
            (folder / f"{part}-{name}").write_bytes(cut + content[head : head + most * size])
    return root


def main(arguments: list[str] | None = None) -> None:
    """The arms in turn, round by round."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study")
    parser.add_argument("kind", choices=sorted(KINDS))
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--arms", help=f"of {'; '.join(ARMS)}, with ; between", default=None)
    parser.add_argument("--limit", type=float, help="seconds after which an arm is broken off")
    parser.add_argument("--full", action="store_true", help="all images; hours")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args(arguments)
    arms = [name.strip() for name in options.arms.split(";")] if options.arms else list(ARMS)
    if "ray tune" in arms and importlib.util.find_spec("ray") is None:
        print("Ray Tune is not installed (pip install '.[peers]'): left out")
        arms.remove("ray tune")
    kind, size = KINDS[options.kind], FULL if options.full else SHORT
    name = options.kind + (" full" if options.full else "")
    found = json.loads(options.out.read_text()) if options.out.exists() else {}
    rounds = found.setdefault(name, {"machine": machine(), "images": size, "rounds": []})["rounds"]
    for index in range(options.rounds or (5 if options.kind == "equal" else 1)):
        if index == len(rounds):
            rounds.append({})
        # whoever comes first has the coolest machine: each in turn
        for arm in [*arms[index % len(arms) :], *arms[: index % len(arms)]]:
            if arm not in rounds[index]:
                rounds[index][arm] = run(arm, kind, index, size, options.limit)
                options.out.write_text(json.dumps(found, indent=1) + "\n")
                shown = {key: value for key, value in rounds[index][arm].items() if key != "curve"}
                print(f"round {index + 1}, {arm}: {json.dumps(shown)}", flush=True)
        if not kind["prunes"]:
            steps = {row["optimizer_steps"] for row in rounds[index].values()}
            assert len(steps) == 1, f"the arms did not do the same work: {steps}"
    print(report(options.out))


if __name__ == "__main__":
    main()
