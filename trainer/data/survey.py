"""What a source's picture files are, found out once and remembered. Imports without torch."""

import base64
import contextlib
import dataclasses
import hashlib
import json
import math
import os
import secrets
import statistics
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import PIL

from trainer.data.cache import kept_folder, locked_folder, make_room
from trainer.data.decoding import Decoders, Header, Look, Task, decode, decoders, look_at_header
from trainer.data.options import DataOptions, Progress

SMALLEST_SIDE, LARGEST_SIDE = 32, 224
_VERSION = f"1 {PIL.__version__}"
"""Another decoder may judge a file otherwise."""
_SETTLED_NS = 2_000_000_000
"""A file that was changed a moment before it was read may change again in the same tick."""
_INDEX = "index.json"


@dataclass(frozen=True)
class Seen:
    """What a picture file is. reason: why it can't be used, else None."""

    header: Header
    look: Look

    @property
    def reason(self) -> str | None:
        return self.header.reason or self.look.reason


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What the pictures of a source are, and the pixels of those that were decoded for it."""

    seen: Mapping[Path, Seen]
    input_size: tuple[int, int, int]
    """(C,H,W)."""
    decoders: Decoders
    rows: Path | None = None
    """A file with a row of pixels for each picture of row_of."""
    row_of: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """By the digest of a picture's bytes."""


@contextlib.contextmanager
def surveyed(
    source: str,
    pictures: Sequence[Path],
    test: Collection[Path],
    options: DataOptions,
    progress: Progress,
) -> Iterator[Survey]:
    """What the pictures are, test pictures too, of which no pixels are kept.

    Files whose size, time of change and inode are as they were are not read again. While there
    are others, one process reads them, and other processes that want the same wait for it.
    """
    folder = kept_folder(f"index-{hashlib.sha256(os.fsencode(source)).hexdigest()[:32]}")
    stats = {path: _stat(path) for path in pictures}
    known = _read_index(folder, stats)
    with contextlib.ExitStack() as stack:
        working = stack.enter_context(decoders())
        if len(known) < len(stats):
            stack.enter_context(locked_folder(folder))
            known = _read_index(folder, stats)
        new = [path for path in stats if path not in known]
        num_bytes = sum(stats[path].num_bytes for path in new)
        told = working.map(
            look_at_header, new, num_bytes=num_bytes, progress=partial(progress, "headers")
        )
        headers = {path: seen.header for path, seen in known.items()}
        headers |= zip(new, told, strict=True)
        input_size = _input_size([headers[path] for path in stats if path not in test], options)
        survey = Survey(seen=known, input_size=input_size, decoders=working)
        if new:
            rows = stack.enter_context(_rows_file(folder, len(new) * math.prod(input_size)))
            tasks = [
                Task(path, input_size, None if path in test else rows, row)
                for row, path in enumerate(new)
            ]
            looks = list(
                working.map(
                    decode, tasks, num_bytes=num_bytes, progress=partial(progress, "pictures")
                )
            )
            seen = {p: Seen(headers[p], look) for p, look in zip(new, looks, strict=True)}
            _write_index(folder, stats, known | seen)
            row_of = {
                look.sha256: task.row
                for task, look in zip(tasks, looks, strict=True)
                if task.rows is not None and look.reason is None
            }
            survey = dataclasses.replace(survey, seen=known | seen, rows=rows, row_of=row_of)
        yield survey


def _input_size(headers: Sequence[Header], options: DataOptions) -> tuple[int, int, int]:
    readable = [header for header in headers if header.reason is None]
    side = options.image_size
    if side is None:
        sides = [header.shorter_side for header in readable] or [SMALLEST_SIDE]
        side = min(max(statistics.median_low(sides), SMALLEST_SIDE), LARGEST_SIDE)
    return 1 if readable and all(header.is_gray for header in readable) else 3, side, side


@dataclass(frozen=True)
class _Stat:
    """By what a file is known to be as it was; read_ns: when that was found out."""

    num_bytes: int
    changed_ns: int
    inode: int
    read_ns: int


def _stat(path: Path) -> _Stat:
    try:
        found = path.stat()
    except OSError:
        return _Stat(0, 0, 0, 0)  # decoding says what is wrong with it
    return _Stat(found.st_size, found.st_mtime_ns, found.st_ino, time.time_ns())


def _read_index(folder: Path, stats: Mapping[Path, _Stat]) -> dict[Path, Seen]:
    """What is known of those files that are as they were."""
    try:
        index = json.loads((folder / _INDEX).read_bytes())
    except (OSError, ValueError):
        return {}
    if not isinstance(index, dict) or index.get("version") != _VERSION:
        return {}
    known = {}
    for path, stat in stats.items():
        if (entry := index["files"].get(str(path))) is None:
            continue
        then = _Stat(*entry[0])
        is_settled = then.read_ns - then.changed_ns > _SETTLED_NS
        if is_settled and then == dataclasses.replace(stat, read_ns=then.read_ns):
            header, look = Header(*entry[1]), Look(*entry[2])
            thumbnail = base64.b64decode(entry[2][2])
            known[path] = Seen(header, dataclasses.replace(look, thumbnail=thumbnail))
    return known


def _write_index(folder: Path, stats: Mapping[Path, _Stat], seen: Mapping[Path, Seen]) -> None:
    files = {}
    for path, stat in stats.items():
        header, look = seen[path].header, seen[path].look
        shown = dataclasses.replace(look, thumbnail=b"")
        thumbnail = base64.b64encode(look.thumbnail).decode()
        files[str(path)] = [
            dataclasses.astuple(stat),
            dataclasses.astuple(header),
            [shown.sha256, shown.hash, thumbnail, shown.reason],
        ]
    new = folder / f"{_INDEX}-{secrets.token_hex(4)}"
    new.write_text(json.dumps({"version": _VERSION, "files": files}), encoding="utf-8")
    new.replace(folder / _INDEX)


@contextlib.contextmanager
def _rows_file(folder: Path, num_bytes: int) -> Iterator[Path]:
    """A file for rows, gone afterwards; what a killed process left goes before."""
    for left in folder.glob("rows-*"):
        left.unlink()
    make_room(num_bytes)
    # a name of its own: processes that outlive a killed parent for a moment write to theirs
    path = folder / f"rows-{secrets.token_hex(8)}"
    with path.open("xb") as file:
        file.truncate(num_bytes)
    try:
        yield path
    finally:
        path.unlink()
