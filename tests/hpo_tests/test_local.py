"""The executor's choice of devices, and the server that workers are forked from."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hpo.errors import UsageError
from hpo.executors.local import num_cores, worker_devices
from tests.parts import Hpo


def test_auto_is_one_worker_on_each_core_without_a_gpu_and_one_on_each_gpu() -> None:
    assert worker_devices(["cpu"], None, "auto") == ["cpu"] * num_cores()
    assert worker_devices(["cuda:0", "cuda:1"], None, "auto") == ["cuda:0", "cuda:1"]


def test_n_means_n_also_beyond_the_devices() -> None:
    assert worker_devices(["cpu"], None, "9") == ["cpu"] * 9
    assert worker_devices(["cuda:0", "cuda:1"], None, "3") == ["cuda:0", "cuda:1", "cuda:0"]


def test_devices_can_be_chosen() -> None:
    assert worker_devices(["cuda:0", "cuda:1"], "cuda:1", "auto") == ["cuda:1"]
    assert worker_devices(["cuda:0"], "cpu", "2") == ["cpu", "cpu"]


@pytest.mark.parametrize("workers", ["0", "-1", "many", "1.5", ""])
def test_a_number_of_workers_that_is_none_is_refused(workers: str) -> None:
    with pytest.raises(UsageError, match="--workers"):
        worker_devices(["cpu"], None, workers)


def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(UsageError, match="no device 'cuda:7'"):
        worker_devices(["cuda:0"], "cuda:7", "auto")


def test_the_server_of_workers_loads_all_they_need_without_the_compiler_and_collects_again() -> (
    None
):
    program = """
import gc, sys
import hpo.executors.preloaded
print([name for name in ("hpo.worker", "torch", "pydantic.main") if name not in sys.modules])
print([name for name in ("torch._dynamo", "torchvision", "sympy") if name in sys.modules])
print(gc.isenabled(), gc.get_freeze_count() > 100_000)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[]\n[]\nTrue True\n", "")


@pytest.mark.parametrize("seconds", [0, 1, 2])
def test_ctrl_c_while_workers_are_awaited_leaves_no_traceback_and_no_process(
    hpo: Hpo, seconds: float
) -> None:
    launcher = hpo.start("launch", "--trials", "1", own_session=True)
    wait_for_the_server(launcher.pid)
    time.sleep(seconds)
    os.killpg(launcher.pid, signal.SIGINT)  # as a terminal does, to all of them
    _, err = launcher.communicate(timeout=60)  # whoever holds the pipes has ended
    assert launcher.returncode == 130
    assert "Traceback" not in err
    assert "leaked" not in err
    assert processes_of(launcher.pid) == []


def test_a_refused_launch_leaves_no_process_behind(hpo: Hpo) -> None:
    launcher = hpo.start("launch", "--trials", "0", own_session=True)
    _, err = launcher.communicate(timeout=60)
    assert launcher.returncode == 2
    assert err.startswith("hpo: --trials must be")
    assert processes_of(launcher.pid) == []


def test_the_server_of_a_killed_launcher_ends_quietly(hpo: Hpo) -> None:
    launcher = hpo.start("launch", "--trials", "1", own_session=True)
    wait_for_the_server(launcher.pid)
    launcher.kill()
    _, err = launcher.communicate(timeout=60)
    assert err == ""
    assert processes_of(launcher.pid) == []


def wait_for_the_server(session: int) -> None:
    deadline = time.monotonic() + 60
    while not any("multiprocessing.forkserver" in each for each in running(session)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def processes_of(session: int) -> list[str]:
    """What still runs in this session, when those that are about to end have had their time."""
    deadline = time.monotonic() + 10
    while (found := running(session)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return found


def running(session: int) -> list[str]:
    """The command lines of this session's processes."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[3]) == session and fields[0] != "Z":
                found.append((stat.parent / "cmdline").read_text().replace("\0", " "))
        except OSError:  # it has just ended
            continue
    return found
