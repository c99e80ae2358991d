"""What was measured of this machine, kept in HPO_HOME so that each thing is measured once.

Workers that begin together measure once, too, and so use the machine alike.
"""

import contextlib
import fcntl
import functools
import hashlib
import json
import logging
import os
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from storage.folders import PrivateFolder, private_folder
from storage.home import home
from storage.locks import lock

logger = logging.getLogger(__name__)
MOST_DAYS = 30
"""After which it is measured again: machines get new kernels and new neighbours."""

Check = Callable[[Any], object]

_known: dict[Path, Any] = {}


def measured_once(what: str, measure: Callable[[], Any], check: Check = bool) -> Any:
    """The JSON value that `measure` gave when it was last called for this on such a machine.

    check: raises ValueError for a value that can't be one. What can't be read or kept is measured.
    """
    here = json.dumps({"what": what, **machine()}, sort_keys=True)
    path = home() / "measured" / (hashlib.sha256(here.encode()).hexdigest()[:32] + ".json")
    if path not in _known:
        _known[path] = _kept(path, here, measure, check)
    return _known[path]


def _kept(path: Path, here: str, measure: Callable[[], Any], check: Check) -> Any:
    found = None
    try:
        with _locked(path.parent) as folder:
            found = _read(folder, path.name, here, check)
            if found is None:
                found = measure()
                folder.write(path.name, json.dumps({"machine": here, "value": found}).encode())
    except OSError as error:
        logger.warning("what is measured can't be kept: %s", error)
    return measure() if found is None else found


def _read(folder: PrivateFolder, name: str, here: str, check: Check) -> Any:
    """None if there is no such file, or none that is new and ours."""
    try:
        written, file = folder.read(name)
        if time.time() - file.st_mtime > MOST_DAYS * 86_400:
            return None
        content = json.loads(written)
        if content["machine"] != here:
            return None
        check(content["value"])
        return content["value"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[PrivateFolder]:
    """With no other process in it; the kernel unlocks it, however this one ends."""
    folder = private_folder(path)
    try:
        lock(folder.descriptor, fcntl.LOCK_EX, path)
        yield folder
    finally:
        folder.close()


@functools.cache
def machine() -> dict[str, Any]:
    """What a measurement depends on. Imports torch."""
    import torch

    model = platform.processor()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.partition(": ")[2] for line in lines if line.startswith("model name"))
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {"cpu": model, "cores": os.cpu_count(), "gpus": gpus, "torch": torch.__version__}
