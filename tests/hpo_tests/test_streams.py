"""Closed and full standard streams: what can be done is done, else it is one line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.parts import Hpo

CLOSED = {"input": "<&-", "output": ">&-", "error": "2>&-", "all": "<&- >&- 2>&-"}


def in_shell(hpo: Hpo, redirection: str, *args: str) -> subprocess.CompletedProcess[str]:
    """The command with its streams as a shell makes them."""
    command = [sys.executable, "-P", "-m", "hpo", *args]
    return subprocess.run(
        ["sh", "-c", f'exec "$@" {redirection}', "sh", *command],
        capture_output=True,
        text=True,
        cwd=hpo.home,
        env=hpo.environment,
        timeout=200,
    )


@pytest.mark.parametrize("closed", CLOSED)
def test_a_search_with_a_closed_stream_ends_as_ever_and_its_files_get_no_output(
    closed: str, hpo: Hpo
) -> None:
    small = ("--trials", "1", "--epochs", "1", "--workers", "1")
    done = in_shell(hpo, CLOSED[closed], "launch", *small)
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr
    assert ("1/1 trials" in done.stdout) == (closed in ("input", "error"))
    out = str(hpo.home / "out")
    export = ("best", "--export", "--top-k", "1", "--seeds", "0", "--formats", "onnx", "--out", out)
    done = in_shell(hpo, CLOSED[closed], *export)
    assert done.returncode == 0, done.stderr
    (trial,) = json.loads(hpo.run("trials", "--json").stdout)
    assert trial["state"] == "COMPLETE"
    studies = [folder for folder in (hpo.home / "logs").iterdir() if folder.is_dir()]
    assert len(studies) == 2  # the search and the retraining
    for folder in studies:
        log = "".join(path.read_text() for path in folder.glob("worker-*.log"))
        assert log.count("trial 0: COMPLETE") == 1


@pytest.mark.parametrize("command", [("space",), ("--help",), ("--version",), ("space", "--json")])
@pytest.mark.parametrize("closed", CLOSED)
def test_a_command_with_a_closed_stream_ends_well(
    closed: str, command: tuple[str, ...], tmp_path: Path
) -> None:
    done = in_shell(Hpo(tmp_path), CLOSED[closed], *command)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("command", [("space",), ("--help",), ("studies", "--json")])
def test_output_to_a_full_disk_is_one_line(command: tuple[str, ...], hpo: Hpo) -> None:
    done = in_shell(hpo, "> /dev/full", *command)
    assert done.returncode == 1
    assert done.stderr == "hpo: standard output: No space left on device\n"


def test_messages_to_a_full_disk_end_neither_a_search_nor_an_export(hpo: Hpo) -> None:
    small = ("--trials", "1", "--epochs", "1", "--workers", "1")
    assert in_shell(hpo, "2> /dev/full", "launch", *small).returncode == 0
    export = ("best", "--export", "--top-k", "1", "--seeds", "0", "--out", str(hpo.home / "out"))
    assert in_shell(hpo, "2> /dev/full", *export).returncode == 0
    assert (hpo.home / "out" / "manifest.json").exists()
