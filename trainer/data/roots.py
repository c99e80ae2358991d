"""Where data sets and what is made of them lie, and how one gets there whole or not at all."""

import contextlib
import os
import shutil
import socket
import stat
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import platformdirs

from trainer.config import DataError

_SILENCE_SECONDS = 30.0


def data_root() -> Path:
    """The folder of data sets: HPO_DATA, else the platform's cache folder for hpo."""
    if named := os.environ.get("HPO_DATA"):
        return Path(os.path.abspath(os.path.expanduser(named)))
    return _of_the_user() / "data"


def cache_root() -> Path:
    """The folder of what can be made again: HPO_HOME/cache, else the platform's cache for hpo."""
    if named := os.environ.get("HPO_HOME"):
        return Path(os.path.abspath(os.path.expanduser(named))) / "cache"
    return _of_the_user() / "pictures"


def _of_the_user() -> Path:
    """The platform's cache folder; for users without a home, as in containers, one in /var/tmp."""
    if os.path.expanduser("~") not in ("~", "/") or os.geteuid() == 0:
        return Path(platformdirs.user_cache_dir("hpo"))
    if os.environ.get("XDG_CACHE_HOME"):
        return Path(platformdirs.user_cache_dir("hpo"))
    folder = Path(f"/var/tmp/hpo-{os.geteuid()}")
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        raise DataError(f"{folder} is not ours: set HPO_HOME to a folder that can be written")
    return folder / "cache"


def cache_bytes() -> int:
    """How large that folder may grow: HPO_CACHE_BYTES, else 50 GB. Raises DataError."""
    named = os.environ.get("HPO_CACHE_BYTES", str(50 * 10**9))
    if not named.isascii() or not named.isdigit():
        raise DataError(f"HPO_CACHE_BYTES must be a number of bytes, got {named!r}")
    return int(named)


def fetch(name: str, download: Callable[[Path], Path], target: str, way_out: str) -> None:
    """Download a data set into a folder of the data root, each file in one step.

    download: gets an empty folder and returns the one below it that holds the files.
    Raises DataError, one line that ends with the way out, if the network or the disk refuses.
    """
    root = data_root()
    silence = socket.getdefaulttimeout()
    try:
        root.mkdir(parents=True, exist_ok=True)
        socket.setdefaulttimeout(_SILENCE_SECONDS)
        # torchvision prints; stdout belongs to results
        with (
            tempfile.TemporaryDirectory(prefix=".download-", dir=root) as folder,
            contextlib.redirect_stdout(sys.stderr),
        ):
            files = sorted(download(Path(folder)).iterdir())
            (root / target).mkdir(parents=True, exist_ok=True)
            for file in files:
                if file.is_dir():  # what another attempt left there
                    shutil.rmtree(root / target / file.name, ignore_errors=True)
                os.replace(file, root / target / file.name)
    except Exception as error:  # urllib, tarfile and torchvision have a dozen kinds
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"{name} is not whole under {root} and can't be downloaded ({reason}): {way_out}"
        ) from error
    finally:
        socket.setdefaulttimeout(silence)
