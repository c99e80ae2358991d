"""Listing: which pictures a source has, with what labels, before any is read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.config import DataError, unknown_name
from trainer.data.findings import Unusable, one_line

PARTS = ("train", "val", "test")


@dataclass(frozen=True)
class Picture:
    """A picture file of a source, and its label."""

    path: Path
    label: int


@dataclass(frozen=True, kw_only=True)
class Listing:
    """The pictures of a source. Raises DataError if there are no two classes to train on."""

    source: str
    """What the user named, for messages."""
    class_names: tuple[str, ...]
    parts: Mapping[str, Sequence[Picture]]
    """train, and val and test where the source has its own."""
    unusable: tuple[Unusable, ...] = ()
    """What the source names but doesn't hold."""
    flips: bool = True
    """Whether a picture mirrored left to right keeps its label."""
    identity: str = ""
    """Of the source's version, where somebody keeps one; joins the fingerprint."""

    def __post_init__(self) -> None:
        if len(self.class_names) == 1:
            raise DataError(
                f"{self.source}: one class only ({one_line(self.class_names[0])}), at least two "
                "are needed"
            )
        for part, pictures in self.parts.items():
            if not pictures:
                raise DataError(f"{self.source}: no pictures in {part}")


def label_of(name: str, class_names: Sequence[str], where: str) -> int:
    """The class's number. Raises DataError where it is not among the classes of train."""
    if name not in class_names:
        shown = unknown_name("class", name, class_names[:50])
        raise DataError(f"{where}: {shown}; each class needs pictures to train on")
    return class_names.index(name)
