"""What reading a data set has shown of it. Imports without torch."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field

_log = logging.getLogger(__name__)
_SHOWN = 40
"""Lines of a list in the log."""


def one_line(text: object) -> str:
    """The text as it is, or, where it holds what would break a line, as Python writes it."""
    words = str(text)
    return words if words.isprintable() else repr(words)


@dataclass(frozen=True, kw_only=True)
class Unusable:
    """A picture that is left out."""

    where: str
    """Its path, or its place in a table."""
    reason: str


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What is odd in a data set's pictures. Empty for sources that hold no picture files."""

    num_pictures: int = 0
    """Usable or not, of all parts."""
    unusable: tuple[Unusable, ...] = ()
    duplicates: tuple[tuple[str, ...], ...] = ()
    """Groups of paths with the same or nearly the same picture; each has two at least."""
    removed: tuple[str, ...] = ()
    """Left out of training or validation, for a part that is kept apart holds them too."""
    contradictions: tuple[tuple[str, ...], ...] = ()
    """Those groups of duplicates whose pictures have different labels."""
    absences: tuple[str, ...] = ()
    """Classes of which a part that the source has holds no usable picture, and that part."""
    class_counts: Mapping[str, int] = field(default_factory=dict)
    """Usable pictures of each class, of all parts."""

    def log(self, name: str) -> None:
        """Say it in the log, in lines."""
        for picture in self.unusable[:_SHOWN]:
            _log.warning("left out: %s (%s)", one_line(picture.where), picture.reason)
        if len(self.unusable) > _SHOWN:
            _log.warning("left out: %d more", len(self.unusable) - _SHOWN)
        if self.duplicates:
            num_pictures = sum(len(group) for group in self.duplicates)
            first = " = ".join(one_line(path) for path in self.duplicates[0][:3])
            _log.warning(
                "%s: %d pictures are there twice or more, the same or nearly so, in %d groups, "
                "each kept on one side of the split (%s)",
                name,
                num_pictures,
                len(self.duplicates),
                first,
            )
        if self.removed:
            _log.warning(
                "%s: %d pictures are not trained on, for the test or validation part holds them "
                "too (%s)",
                name,
                len(self.removed),
                ", ".join(one_line(path) for path in self.removed[:3]),
            )
        if self.absences:
            _log.warning("%s: no pictures of %s", name, one_line(", ".join(self.absences[:10])))
        if self.contradictions:
            first = " = ".join(one_line(path) for path in self.contradictions[0][:3])
            _log.warning(
                "%s: %d pictures have different labels at different places (%s)",
                name,
                len(self.contradictions),
                first,
            )


NOTHING_FOUND = Findings()
