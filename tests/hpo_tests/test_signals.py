"""Ctrl-C and SIGTERM before a command works and after it: no traceback."""

import signal
import subprocess
import sys

import pytest

WHILE_IT_IMPORTS = """
import os, sys

class Signaller:
    def find_spec(self, name, path=None, target=None):
        if name == "typer":
            os.kill(os.getpid(), int(os.environ["SIGNAL"]))

sys.meta_path.insert(0, Signaller())
from hpo.__main__ import run
run()
"""
WHILE_IT_ENDS = """
import atexit, os
from hpo.__main__ import run

atexit.register(lambda: os.kill(os.getpid(), int(os.environ["SIGNAL"])))
run()
"""


def signalled(
    program: str, number: signal.Signals, *, is_ignored: bool = False
) -> subprocess.CompletedProcess[str]:
    ignoring = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
    return subprocess.run(
        [sys.executable, "-c", (ignoring if is_ignored else "") + program, "--version"],
        capture_output=True,
        text=True,
        env={"SIGNAL": str(int(number))},
        timeout=120,
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("program", [WHILE_IT_IMPORTS, WHILE_IT_ENDS], ids=["start", "end"])
def test_a_signal_before_or_after_a_command_s_work_ends_it_without_a_word(
    program: str, number: signal.Signals
) -> None:
    done = signalled(program, number)
    assert (done.returncode, done.stderr) == (130, "")
    assert done.stdout.startswith("hpo ") == (program == WHILE_IT_ENDS)


@pytest.mark.parametrize("program", [WHILE_IT_IMPORTS, WHILE_IT_ENDS], ids=["start", "end"])
def test_a_background_job_of_a_script_goes_on_ignoring_ctrl_c(program: str) -> None:
    done = signalled(program, signal.SIGINT, is_ignored=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("hpo ")
