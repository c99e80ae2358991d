"""Data under DVC: fetched when it is missing, and known by DVC's hash. Imports without torch."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from trainer.config import DataError
from trainer.data.findings import one_line

_HASH = re.compile(r"^[ \-]*md5:\s*'?([0-9a-f]{32}(?:\.dir)?)'?\s*$", re.MULTILINE)


def has_note(path: Path) -> bool:
    """Whether a file beside the path says that DVC keeps it."""
    return os.path.isfile(_note(path))  # unlike Path's, it is calm about names that can't be


def pulled(path: Path) -> str:
    """DVC's hash of what it keeps under this path, "" of any other; fetched if it isn't there.

    Raises DataError, one line, where DVC isn't installed or can't fetch it.
    """
    if not has_note(path):
        return ""
    note = _note(path)
    found = _HASH.search(note.read_text(encoding="utf-8", errors="replace"))
    if found is None:
        raise DataError(f"{one_line(note)}: no md5 in it: dvc add {path.name} writes one")
    if not path.exists():
        _pull(path, note)
    return found[1]


def _note(path: Path) -> Path:
    return path.with_name(f"{path.name}.dvc")


def _pull(path: Path, note: Path) -> None:
    program = shutil.which("dvc")
    if program is None:
        raise DataError(
            f"{one_line(path)} is kept by DVC and isn't here: install DVC, or run dvc pull "
            f"{one_line(note.name)} where it is installed"
        )
    ended = subprocess.run(
        [program, "pull", "--quiet", note.name],
        cwd=note.parent,
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        check=False,
    )
    if ended.returncode or not path.exists():
        lines = ended.stderr.strip().splitlines() or [f"exit code {ended.returncode}"]
        raise DataError(f"dvc pull {one_line(note.name)} in {one_line(note.parent)}: {lines[-1]}")
