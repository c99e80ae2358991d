"""Label Studio's JSON export, with the folder of its pictures beside it.

A task names its picture in `data` and has `annotations`, each with a `result` of regions; those
of the type `choices` hold the label (Label Studio's documentation, "Export annotations").
"""

import json
import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from trainer.config import DataError
from trainer.data.findings import Unusable, one_line
from trainer.data.listing import Listing, Picture
from trainer.data.pictures import SUFFIXES

_UPLOAD_PREFIX = re.compile(r"^[0-9a-f]{8}-")
"""Label Studio puts it before the name of a file that was uploaded."""
_FOLDERS = ("", "images", "upload")
"""Beside the export, in which its pictures may lie."""
_log = logging.getLogger(__name__)


def list_export(export: Path) -> Listing:
    """The pictures of an export that have one label; their splits are drawn.

    Tasks without a label are passed over and counted; pictures that are missing, or have several
    labels, are unusable ones. Raises DataError if the file is no such export.
    """
    tasks = _read(export)
    labelled: dict[Path, str] = {}
    unusable: list[Unusable] = []
    num_unlabelled = 0
    for task in tasks:
        where = f"{one_line(export)} task {one_line(task.get('id', '?'))}"
        try:
            labels = _labels(task, where)
        except (AttributeError, KeyError, TypeError) as error:
            raise DataError(f"{where}: not as Label Studio exports it ({error!r})") from error
        reference = _reference(task, where)
        path = _find(export.parent, reference)
        if not labels:
            num_unlabelled += 1
        elif len(labels) > 1:
            shown = ", ".join(one_line(label) for label in sorted(labels))
            unusable.append(Unusable(where=where, reason=f"several labels: {shown}"))
        elif path is None:
            reason = f"no file for {one_line(reference)}"
            unusable.append(Unusable(where=where, reason=reason))
        elif labelled.setdefault(path, *labels) not in labels:
            raise DataError(f"{where}: {one_line(path)} has another label in another task")
    if num_unlabelled:
        shown = one_line(export)
        _log.warning("%s: %d tasks without a label passed over", shown, num_unlabelled)
    if not labelled:
        raise DataError(_why_none(export, num_unlabelled, unusable))
    class_names = tuple(sorted(set(labelled.values())))
    pictures = [Picture(path, class_names.index(label)) for path, label in labelled.items()]
    return Listing(
        source=str(export),
        class_names=class_names,
        parts={"train": pictures},
        unusable=tuple(unusable),
    )


def _read(export: Path) -> list[Mapping[str, Any]]:
    try:
        tasks: Any = json.loads(export.read_bytes())
    except ValueError as error:
        raise DataError(f"{one_line(export)}: no JSON: {error}") from error
    is_export = isinstance(tasks, list) and all(
        isinstance(task, dict) and isinstance(task.get("data"), dict) and "annotations" in task
        for task in tasks
    )
    if not is_export:
        raise DataError(
            f"{one_line(export)}: no export of Label Studio with tasks and annotations: export "
            "as JSON there, not as JSON-MIN or another format"
        )
    return list(tasks)


def _labels(task: Mapping[str, Any], where: str) -> set[str]:
    """What the annotations that count say of a task. Raises DataError if they answer questions."""
    labels: set[str] = set()
    questions: set[str] = set()
    for region in _regions(task):
        if region.get("type") == "choices":
            labels.update(str(choice) for choice in region["value"]["choices"])
            questions.add(str(region.get("from_name")))
    if len(questions) > 1:
        raise DataError(
            f"{where}: answers to several questions ({', '.join(sorted(questions))}): export "
            "a project with one"
        )
    return labels


def _regions(task: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    for annotation in task["annotations"]:
        if not annotation.get("was_cancelled"):
            yield from annotation["result"]


def _reference(task: Mapping[str, Any], where: str) -> str:
    """What the task calls its picture: under `image`, or the only value with such a suffix."""
    data = task["data"]
    if isinstance(data.get("image"), str):
        return str(data["image"])
    values = [value for value in data.values() if isinstance(value, str)]
    named = [value for value in values if _path_of(value).suffix.lower() in SUFFIXES]
    if len(named) != 1:
        raise DataError(f"{where}: which of {', '.join(sorted(data)) or 'nothing'} is the picture?")
    return named[0]


def _find(folder: Path, reference: str) -> Path | None:
    """The file of a reference: the longest end of its path that is there, below the folder."""
    path = _path_of(reference)
    names = [part for part in path.parts if part not in ("/", "..")]
    for first in range(len(names)):
        end = names[first:]
        plain = [*end[:-1], _UPLOAD_PREFIX.sub("", end[-1])]
        for below in _FOLDERS:
            for parts in (end, plain):
                if (found := folder.joinpath(below, *parts)).is_file():
                    return found
    return None


def _path_of(reference: str) -> PurePosixPath:
    """The path in an address, or in the query of Label Studio's own for files of its machine."""
    if "://" not in reference and not reference.startswith("/data/"):
        return PurePosixPath(reference)
    address = urlsplit(reference)
    local = parse_qs(address.query).get("d")
    return PurePosixPath(local[0] if local else unquote(address.path))


def _why_none(export: Path, num_unlabelled: int, unusable: list[Unusable]) -> str:
    shown = one_line(export)
    if unusable:
        first = f"{unusable[0].where} ({unusable[0].reason})"
        return f"{shown}: no picture can be used: {first}; put the pictures beside the export"
    return f"{shown}: none of its {num_unlabelled} tasks has a label of the type choices"
