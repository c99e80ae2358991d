"""Commands of the product forked from one process that has everything imported.

    python -m benchmarks.chaos.zygote     reads lines of JSON, writes lines of JSON

Sixteen workers arrive at one moment, where sixteen interpreters on two cores would take half a
minute to import torch. Each runs hpo.cli's main, in a process and a session of its own.
"""

import contextlib
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.chaos.stage import Overdue, Stage

_TICK_SECONDS = 0.05


@dataclass(eq=False)
class Forked:
    """A command that the zygote has forked."""

    name: str
    pid: int
    out: Path
    err: Path
    _codes: dict[int, int]
    _changed: threading.Condition

    @property
    def code(self) -> int | None:
        """None while it runs; negative for the signal that ended it."""
        with self._changed:
            return self._codes.get(self.pid)

    def send(self, number: signal.Signals) -> None:
        """Unless it has ended."""
        if self.code is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def wait(self, seconds: float) -> int:
        """Its exit code. Raises Overdue."""
        with self._changed:
            if not self._changed.wait_for(lambda: self.pid in self._codes, seconds):
                raise Overdue(f"{self.name} has not ended within {seconds:.0f} s")
            return self._codes[self.pid]


@dataclass
class Zygote:
    """Starts the commands of a stage."""

    stage: Stage
    _codes: dict[int, int] = field(default_factory=dict)
    _pids: list[int] = field(default_factory=list)
    _changed: threading.Condition = field(default_factory=threading.Condition)

    def __post_init__(self) -> None:
        with (self.stage.folder / "zygote.txt").open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "benchmarks.chaos.zygote"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**self.stage.environment, "OMP_NUM_THREADS": "1"},
                cwd=self.stage.home,
            )
        threading.Thread(target=self._read, daemon=True).start()

    def start(self, *args: str, **variables: str) -> Forked:
        """Returns when the process is there."""
        out, err = self.stage.output_files()
        request = {"args": args, "variables": variables, "out": str(out), "err": str(err)}
        assert self._process.stdin is not None
        self._process.stdin.write(f"{json.dumps(request)}\n".encode())
        self._process.stdin.flush()
        with self._changed:
            if not self._changed.wait_for(lambda: bool(self._pids), 60):
                raise Overdue("the zygote has not forked within 60 s")
            pid = self._pids.pop(0)
        return Forked(f"hpo {args[0]}", pid, out, err, self._codes, self._changed)

    def close(self) -> None:
        """Its commands are the stage's to end."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as answers:
            for line in answers:
                answer = json.loads(line)
                with self._changed:
                    if "code" in answer:
                        self._codes[answer["pid"]] = answer["code"]
                    else:
                        self._pids.append(answer["pid"])
                    self._changed.notify_all()


def main() -> None:
    """Serve until stdin is closed."""
    from hpo.executors.local import PRELOADED
    from trainer.data.registry import load

    importlib.import_module(PRELOADED)

    load("digits", seed=0)
    buffer = b""
    while True:
        if select.select([0], [], [], _TICK_SECONDS)[0]:
            received = os.read(0, 65536)
            if not received:
                return
            buffer += received
        *lines, buffer = buffer.split(b"\n")
        for line in lines:
            _say({"pid": _fork(json.loads(line))})
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                _say({"pid": ended[0], "code": os.waitstatus_to_exitcode(ended[1])})


def _say(answer: Mapping[str, int]) -> None:
    os.write(1, f"{json.dumps(answer)}\n".encode())


def _fork(request: Mapping[str, Any]) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setsid()
        for number, path in ((1, request["out"]), (2, request["err"])):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.environ.update(request["variables"])
        sys.argv = ["hpo", *request["args"]]
        from hpo.cli import main as command
        from hpo.executors.local import cool_down

        try:
            command()
        finally:
            cool_down()  # what os._exit leaves out
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 0 if ended.code is None else 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
