"""A data set made of a listing: pictures looked at, split, and kept as images in a cache."""

import dataclasses
import hashlib
import itertools
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.config import DataError
from trainer.data.cache import full_disks_told, held_folder
from trainer.data.dataset import ImageDataset, Split
from trainer.data.decoding import Task, decode, decoders
from trainer.data.findings import Findings, Unusable, one_line
from trainer.data.listing import Listing, Picture
from trainer.data.mapped import are_whole, map_images, note_whole, write_whole
from trainer.data.options import DataOptions, Progress, no_progress
from trainer.data.prepared import IMAGES
from trainer.data.similarity import group_duplicates
from trainer.data.splits import draw, draw_test, make_dataset, validation_share
from trainer.data.survey import Seen, Survey, surveyed

_FORMAT = 2
"""Of the cache's files and of the pixels in them: another number, another cache."""


@dataclass(frozen=True)
class _Known:
    """A usable picture: its label, the digest of its bytes, its group of duplicates."""

    path: Path
    label: int
    sha256: str
    group: int


def load_pictures(
    listing: Listing,
    *,
    name: str,
    seed: int,
    options: DataOptions,
    progress: Progress = no_progress,
) -> ImageDataset:
    """The pictures of a listing, as squares of one size.

    The side is options.image_size or the median of the shorter sides outside a test part, in
    32..224 pixels; there is one channel if all those pictures are gray, else three. The
    fingerprint is that of the files' bytes, labels and class names outside a test part: neither
    file names nor sizes change it. Of a test split no pixel is kept before open_test is called:
    what the survey finds out of its pictures is whether they can be read and which they repeat.
    Raises DataError if too many pictures can't be used, or too few are left.
    """
    paths = [picture.path for pictures in listing.parts.values() for picture in pictures]
    test_paths = {picture.path for picture in listing.parts.get("test", ())}
    with (
        full_disks_told(),
        surveyed(listing.source, paths, test_paths, options, progress) as survey,
    ):
        findings, parts = _sort_out(listing, survey.seen, options)
        findings.log(name)
        identity, parts = _identify(parts, listing.class_names)
        test = parts.pop("test", [])
        if not test:
            parts["train"], test = _draw(parts["train"], int(identity, 16), None)
        if "val" not in parts:
            share = validation_share(len(parts["train"]))
            parts["train"], parts["val"] = _draw(parts["train"], seed, share)
        train, val = parts["train"], parts["val"]
        if not train or not val or not test:
            num_pictures = len(train) + len(val) + len(test)
            raise DataError(f"{listing.source}: too few pictures for a split ({num_pictures})")
        images, kept_in = _images([*train, *val], survey, options, progress)

    def open_test() -> Split:
        with full_disks_told(), decoders() as working:
            later = Survey(seen={}, input_size=survey.input_size, decoders=working)
            return Split(_images(test, later, options, progress)[0], _labels(test))

    data = make_dataset(
        name=name,
        training=Split(images[: len(train)], _labels(train)),
        val=Split(images[len(train) :], _labels(val)),
        class_names=listing.class_names,
        fingerprint=_joined(identity, listing.identity),
        flips=listing.flips,
        open_test=open_test,
        seed=seed,
        findings=findings,
    )
    groups = torch.tensor([picture.group for picture in (*train, *val)])
    return dataclasses.replace(data, groups=groups, kept_in=kept_in)


def _sort_out(
    listing: Listing, seen: Mapping[Path, Seen], options: DataOptions
) -> tuple[Findings, dict[str, list[_Known]]]:
    """What is odd, and the pictures of each part without what is held back for another.

    Raises DataError if more pictures than options.max_broken can't be used.
    """
    unusable, usable = list(listing.unusable), []
    for part, pictures in listing.parts.items():
        for picture in pictures:
            reason = seen[picture.path].reason
            if reason is None:
                usable.append((part, picture))
            else:
                unusable.append(Unusable(where=str(picture.path), reason=reason))
    _check_broken(listing, unusable, len(usable), options)
    looks = [seen[picture.path].look for _, picture in usable]
    groups = group_duplicates(
        [look.sha256 for look in looks],
        [look.hash for look in looks],
        [look.thumbnail for look in looks],
    )
    kept_apart = _groups_kept_apart(usable, groups)
    parts: dict[str, list[_Known]] = {part: [] for part in listing.parts}
    removed = []
    for (part, picture), look, group in zip(usable, looks, groups.tolist(), strict=True):
        if group in kept_apart[part]:
            removed.append(str(picture.path))
        else:
            parts[part].append(_Known(picture.path, picture.label, look.sha256, group))
    duplicates = _members(usable, groups)
    counts = np.bincount([p.label for _, p in usable], minlength=len(listing.class_names))
    findings = Findings(
        num_pictures=len(usable) + len(unusable),
        unusable=tuple(unusable),
        duplicates=tuple(tuple(str(p.path) for p in group) for group in duplicates),
        removed=tuple(removed),
        contradictions=tuple(
            tuple(str(p.path) for p in group)
            for group in duplicates
            if len({p.label for p in group}) > 1
        ),
        absences=tuple(
            f"{listing.class_names[label]} in {part}"
            for part, pictures in parts.items()
            for label in sorted(set(range(len(counts))) - {p.label for p in pictures})
        ),
        class_counts=dict(zip(listing.class_names, counts.tolist(), strict=True)),
    )
    return findings, parts


def _check_broken(
    listing: Listing, unusable: Sequence[Unusable], num_usable: int, options: DataOptions
) -> None:
    num_pictures = num_usable + len(unusable)
    if len(unusable) <= options.max_broken * num_pictures:
        return
    first = "; ".join(f"{one_line(p.where)} ({p.reason})" for p in unusable[:3])
    more = f"; and {len(unusable) - 3} more" if len(unusable) > 3 else ""
    raise DataError(
        f"{listing.source}: {len(unusable)} of {num_pictures} pictures can't be used, more than "
        f"the share of {options.max_broken:g} that --max-broken lets pass: {first}{more}"
    )


def _groups_kept_apart(
    usable: Sequence[tuple[str, Picture]], groups: NDArray[np.int64]
) -> dict[str, set[int]]:
    """For each part the groups of those parts that must not be known from it."""
    of_part: dict[str, set[int]] = {"train": set(), "val": set(), "test": set()}
    for (part, _), group in zip(usable, groups.tolist(), strict=True):
        of_part[part].add(group)
    return {"train": of_part["val"] | of_part["test"], "val": of_part["test"], "test": set()}


def _members(
    usable: Sequence[tuple[str, Picture]], groups: NDArray[np.int64]
) -> list[list[Picture]]:
    """The pictures of each group that has more than one."""
    order = np.argsort(groups, kind="stable").tolist()
    runs = itertools.groupby(order, key=lambda index: int(groups[index]))
    together = [[usable[index][1] for index in run] for _, run in runs]
    return [pictures for pictures in together if len(pictures) > 1]


def _identify(
    parts: Mapping[str, Sequence[_Known]], class_names: Sequence[str]
) -> tuple[str, dict[str, list[_Known]]]:
    """The fingerprint, and the pictures in an order that their labels and content decide."""
    ordered = {
        part: sorted(pictures, key=lambda p: (p.label, p.sha256, p.path))
        for part, pictures in parts.items()
    }
    content = {
        part: [(p.label, p.sha256) for p in pictures]
        for part, pictures in ordered.items()
        if part != "test"
    }
    document = json.dumps([list(class_names), content], sort_keys=True)
    return hashlib.sha256(document.encode(errors="surrogateescape")).hexdigest(), ordered


def _joined(identity: str, version: str) -> str:
    """The fingerprint with a version of the source in it, if there is one."""
    return hashlib.sha256(f"{identity} {version}".encode()).hexdigest() if version else identity


def _draw(
    pictures: Sequence[_Known], number: int, share: float | None
) -> tuple[list[_Known], list[_Known]]:
    """The rest and what is drawn from it; without a share it is a test split's."""
    labels = _labels(pictures)
    groups = np.array([picture.group for picture in pictures], dtype=np.int64)
    if share is None:
        rest, drawn = draw_test(labels, f"{number:x}", groups)
    else:
        rest, drawn = draw(labels, share, number, groups)
    return [pictures[i] for i in rest.tolist()], [pictures[i] for i in drawn.tolist()]


def _labels(pictures: Sequence[_Known]) -> Tensor:
    return torch.tensor([picture.label for picture in pictures], dtype=torch.int64)


def _images(
    pictures: Sequence[_Known], survey: Survey, options: DataOptions, progress: Progress
) -> tuple[Tensor, str]:
    """The pictures as images, uint8 (N,C,H,W), and the folder of the cache that holds them.

    Its name is that of the pictures' bytes in their order, and of their size.
    """
    shape = (len(pictures), *survey.input_size)
    content = json.dumps([_FORMAT, shape, [picture.sha256 for picture in pictures]])

    def build(folder: Path) -> None:
        path = folder / IMAGES
        write_whole(path, math.prod(shape))
        _copy_rows(pictures, survey, path)
        _decode_rows(pictures, survey, path, progress)
        with path.open("rb") as file:
            os.fsync(file.fileno())
        note_whole(path)

    name = f"images-{hashlib.sha256(content.encode()).hexdigest()[:32]}"
    held = held_folder(
        name,
        build,
        num_bytes=math.prod(shape),
        is_whole=lambda folder: are_whole(folder / IMAGES),
    )
    return map_images(held, IMAGES, shape, max_memory_bytes=options.max_memory_bytes), name


def _copy_rows(pictures: Sequence[_Known], survey: Survey, path: Path) -> None:
    """Fill in what the survey has decoded."""
    if survey.rows is None:
        return
    num_bytes = math.prod(survey.input_size)
    with survey.rows.open("rb") as source, path.open("r+b") as target:
        for number, picture in enumerate(pictures):
            if (row := survey.row_of.get(picture.sha256)) is not None:
                source.seek(row * num_bytes)
                target.seek(number * num_bytes)
                target.write(source.read(num_bytes))


def _decode_rows(
    pictures: Sequence[_Known], survey: Survey, path: Path, progress: Progress
) -> None:
    """Decode what the survey has not."""
    tasks = [
        Task(picture.path, survey.input_size, path, number)
        for number, picture in enumerate(pictures)
        if picture.sha256 not in survey.row_of
    ]
    looks = survey.decoders.map(
        decode,
        tasks,
        num_bytes=sum(task.path.stat().st_size for task in tasks),
        progress=lambda done, all_: progress("pictures", done, all_),
    )
    for task, look in zip(tasks, looks, strict=True):
        if look.sha256 != pictures[task.row].sha256:
            why = look.reason or "it is another picture now"
            raise DataError(
                f"{one_line(task.path)} has changed since it was first looked at ({why})"
            )
