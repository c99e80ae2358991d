"""Row 19: no room for checkpoints."""

import contextlib
import os
import re
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path

from benchmarks.chaos.audit import Finding, audit
from benchmarks.chaos.faults import FaultPlan
from benchmarks.chaos.stage import Arena, Command

DISK = "1m"
"""Room for two or three checkpoints of the smallest backbone, 0.35 MB each."""
MOST_FILE_BYTES = 300_000
"""Less than one of them, more than any other file here comes to."""
SAID = re.compile(r"without checkpoints \((.*)\)")


def full_disk(arena: Arena, _long: bool) -> Iterator[Finding]:
    """Row 19."""
    budget = 12
    with arena.stage(FaultPlan(folder="", leg_seconds=0.1)) as stage:
        with small_disk(stage.folder / "disk") as mounted:
            launcher = stage.launch(
                trials=budget, workers=2, HPO_CHECKPOINTS=str(stage.folder / "disk")
            )
            if not mounted:
                _limit_files(launcher)
            code = launcher.wait(240)
            how = f"a disk of {DISK}" if mounted else f"files of at most {MOST_FILE_BYTES} bytes"
            finding = audit(stage, "19", done=f"checkpoints on {how}; simulated", budget=budget)
        finding.check(code == 0, f"launch ended with {code}")
        assert finding.counts is not None
        finding.check(finding.counts.attempts == budget, "a trial was begun again")
        said = {
            log.name: SAID.findall(log.read_text())
            for log in (stage.home / "logs").rglob("worker-*.log")
        }
        finding.check(any(said.values()), "the disk never was full: nothing was tried")
        often = {name: reasons for name, reasons in said.items() if len(reasons) > 1}
        finding.check(not often, f"said more than once: {often}")
        finding.notes.append(f"{len(stage.witness('saved'))} checkpoints found room")
        yield finding


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """A file system of its own where that is allowed: whether it is."""
    folder.mkdir()
    options = f"size={DISK},mode=0777"
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    mounted = os.geteuid() == 0 and subprocess.run(mount, capture_output=True).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


def _limit_files(command: Command) -> None:
    """Of it and all that it starts: writing more is an error, as on a full disk."""
    resource.prlimit(command.pid, resource.RLIMIT_FSIZE, (MOST_FILE_BYTES, MOST_FILE_BYTES))
