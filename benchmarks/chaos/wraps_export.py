"""The fault points of an export: each of its files, each fsync, before and after it."""

import os
from pathlib import Path
from types import ModuleType
from typing import Any

from benchmarks.chaos.around import around
from benchmarks.chaos.faults import here, point


def wrap_export(module: ModuleType) -> None:
    """trainer.export.folder."""
    around(module, "export_model", before=_before_export, after=_after_export)
    for name in ("write_bytes", "write_text"):
        around(Path, name, after=_in_export)
    around(os, "fsync", before=_in_sync)


def _before_export(*_: Any, **__: Any) -> None:
    here.exporting = True
    point("before export")


def _after_export(*_: Any, **__: Any) -> None:
    here.exporting = False
    point("after export")


def _in_export(*_: Any, **__: Any) -> None:
    if here.exporting:
        point("in export")  # one more file is written, and not yet checked


def _in_sync(*_: Any, **__: Any) -> None:
    if here.exporting:
        point("in sync")
