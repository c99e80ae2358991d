"""How many cores this process may use: by its affinity, and by the quotas of its cgroups."""

import math
import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

_PROC = Path("/proc/self")
_ESCAPED = re.compile(r"\\([0-7]{3})")
"""A blank, say, in a path in mountinfo."""


def num_cores() -> int:
    """Cores that this process may use at once; at least one.

    A container with a quota of CPU time (docker run --cpus 1.5, a limit of Kubernetes) sees all
    cores of its machine. More threads than its quota, rounded up, are only stopped in turn.
    """
    quota = cpu_quota()
    return len(cores()) if quota is None else max(1, min(len(cores()), math.ceil(quota)))


def cores() -> list[int]:
    """Numbers of the cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def cpu_quota(proc: Path = _PROC) -> float | None:
    """Seconds of CPU time in a second, the least of this process's cgroups and those above them.

    None where there is no limit, or no Linux. proc: /proc/self. What can't be read is no limit: a
    container may hide its cgroups.
    """
    quotas = [quota for folder in _folders(proc) if (quota := _quota_of(folder)) is not None]
    return min(quotas, default=None)


def _folders(proc: Path) -> Iterator[Path]:
    """Where quotas may stand: this process's cgroups of either version, and all above them."""
    try:
        memberships = (proc / "cgroup").read_text(errors="replace").splitlines()
        mounts = (proc / "mountinfo").read_text(errors="replace").splitlines()
    except OSError:
        return
    for root, point, controllers in _mounts(mounts):
        for line in memberships:
            _, named, path = [*line.split(":", 2), "", ""][:3]
            if (set(named.split(",")) & controllers) if named else not controllers:
                yield from _upwards(root, point, PurePosixPath(path))


def _mounts(lines: list[str]) -> Iterator[tuple[PurePosixPath, Path, set[str]]]:
    """What of a hierarchy is mounted, where, and the controllers: {"cpu"}; version 2 has no names.

    lines: of mountinfo (proc(5)).
    """
    for line in lines:
        before, _, after = line.partition(" - ")
        fields, kinds = before.split(), after.split()
        if len(fields) < 5 or len(kinds) < 3 or kinds[0] not in ("cgroup", "cgroup2"):
            continue
        controllers = set(kinds[2].split(",")) & {"cpu"}
        if controllers or kinds[0] == "cgroup2":
            yield PurePosixPath(_unescaped(fields[3])), Path(_unescaped(fields[4])), controllers


def _upwards(root: PurePosixPath, point: Path, path: PurePosixPath) -> Iterator[Path]:
    """The folder of a cgroup and those above it, up to the mount point.

    A container often sees its own cgroup at the mount point, under the path that the machine has
    for it: so what lies outside of what is mounted is looked for at the point itself.
    """
    inside = path.is_relative_to(root) and ".." not in path.parts
    below = path.relative_to(root) if inside else PurePosixPath()
    yield from (point / part for part in (below, *below.parents))


def _quota_of(folder: Path) -> float | None:
    """Version 2 has cpu.max, "150000 100000" or "max 100000", version 1 a file each (-1: none)."""
    for names in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        try:
            words = " ".join((folder / name).read_text() for name in names).split()
            quota, period = float(words[0]), float(words[1])
        except (OSError, ValueError, IndexError):
            continue
        if 0 < quota < math.inf and period > 0:
            return quota / period
    return None


def _unescaped(path: str) -> str:
    return _ESCAPED.sub(lambda found: chr(int(found[1], 8)), path)
