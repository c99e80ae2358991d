"""A table of pictures: FILE.csv with the columns path, label and, if wanted, split."""

import csv
import io
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.config import DataError, unknown_name
from trainer.data.findings import Unusable, one_line
from trainer.data.listing import PARTS, Listing, Picture, label_of

_DELIMITERS = ",;\t"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Row:
    """where: for messages; path: relative to the table's folder, or absolute."""

    where: str
    path: str
    label: str
    part: str


def list_table(table: Path) -> Listing:
    """The pictures that a table names; those that are missing are unusable ones.

    The first line names the columns, in any order; more columns don't matter. Paths are relative
    to the table. Without a split column the splits are drawn; with one its words are train, val
    and test. Raises DataError if a column, a label or a split is missing or mixed up.
    """
    rows = _distinct(table, _read(table))
    missing = [row for row in rows if not (table.parent / row.path).is_file()]
    if len(missing) == len(rows):
        raise DataError(_why_all_are_missing(table, rows))
    unusable = tuple(Unusable(where=row.where, reason="no such file") for row in missing)
    gone = {row.where for row in missing}
    class_names = tuple(sorted({row.label for row in rows if row.part == "train"}))
    parts: dict[str, list[Picture]] = {part: [] for part in PARTS}
    for row in rows:
        label = label_of(row.label, class_names, row.where)
        if row.where not in gone:
            parts[row.part].append(Picture(table.parent / row.path, label))
    named = {row.part for row in rows}
    if "train" not in named:
        raise DataError(f"{one_line(table)}: no row has the split train")
    return Listing(
        source=str(table),
        class_names=class_names,
        parts={part: pictures for part, pictures in parts.items() if part in named},
        unusable=unusable,
    )


def _read(table: Path) -> list[_Row]:
    shown = one_line(table)
    try:
        text = table.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{shown}: not in UTF-8 ({error.reason}): save it as CSV UTF-8") from error
    header = text.partition("\n")[0]
    delimiter = max(_DELIMITERS, key=header.count)
    try:
        lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        cells = [(lines.line_num, [cell.strip() for cell in line]) for line in lines]
    except csv.Error as error:
        raise DataError(f"{shown}: line {lines.line_num} can't be read: {error}") from error
    named = [cell.lower() for cell in cells[0][1]] if cells else []
    for column in ("path", "label"):
        if named.count(column) != 1:
            raise DataError(
                f"{shown}: the first line must name the columns path,label[,split], it is "
                f"{one_line(header.strip()[:80]) or 'empty'}"
            )
    if len(cells) == 1:
        raise DataError(f"{shown}: no rows below the first line")
    return [_row(f"{shown} line {number}", named, line) for number, line in cells[1:] if any(line)]


def _row(where: str, named: Sequence[str], cells: Sequence[str]) -> _Row:
    if len(cells) != len(named):
        raise DataError(f"{where}: {len(cells)} cells where the first line names {len(named)}")
    row = dict(zip(named, cells, strict=True))
    for column in ("path", "label"):
        if not row[column]:
            raise DataError(f"{where}: no {column}")
    part = row.get("split", "train")
    if part not in PARTS:
        raise DataError(f"{where}: {unknown_name('split', part, PARTS)}")
    return _Row(where, row["path"], row["label"], part)


def _distinct(table: Path, rows: Sequence[_Row]) -> list[_Row]:
    """The rows without those that say the same again."""
    first: dict[str, _Row] = {}
    for row in rows:
        before = first.setdefault(row.path, row)
        if (before.label, before.part) != (row.label, row.part):
            raise DataError(
                f"{row.where}: {one_line(row.path)} is {one_line(row.label)} in {row.part} here "
                f"and {one_line(before.label)} in {before.part} in {before.where}"
            )
    if len(first) < len(rows):
        _log.warning("%s: %d rows say the same again", one_line(table), len(rows) - len(first))
    return list(first.values())


def _why_all_are_missing(table: Path, rows: Sequence[_Row]) -> str:
    if any((table.parent / row.label).is_file() for row in rows):
        return f"{one_line(table)}: the columns path and label are mixed up: labels name the files"
    return (
        f"{rows[0].where}: no such file {one_line(rows[0].path)}, nor any other: paths are "
        f"relative to {one_line(table.parent)}"
    )
