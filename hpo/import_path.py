"""Where Python looks for modules: its own library, this project, what is installed; users' last.

A folder that a user stands in, or has in PYTHONPATH, may hold a torch.py, a json.py, a storage/ or
a trainer/: no process of ours imports one of them in place of the real one. This module imports
only what every interpreter has loaded, for it runs before all else is imported.
"""

import os
import sys
from collections.abc import Iterable

_FOLDERS = "HPO_IMPORT_PATH"
"""The variable by which processes of ours hand on the folders of PYTHONPATH."""


def isolate() -> None:
    """Reorder sys.path: the folders of PYTHONPATH come last, the script's and Python's "" go.

    The environment is changed, too, so that every Python process that is started from here begins
    without them, however it is started; it calls isolate() to have PYTHONPATH's folders, last.
    """
    given = [] if sys.flags.ignore_environment else _entries("PYTHONPATH")
    given += _entries(_FOLDERS)
    users = list(dict.fromkeys(_absolute(entry) for entry in given if entry))
    users = [folder for folder in users if not is_installed(folder)]
    left_out = {*users, *map(_absolute, given)}
    if not sys.flags.safe_path:  # the folder of the script, or the one that the user stands in
        left_out.add(_absolute(sys.path[0]))
    root = _root()
    own = [each for each in sys.path if is_installed(each) or _absolute(each) not in left_out]
    standard = [each for each in own if _is_standard(each)]
    installed = [each for each in own if each not in standard and each != root]
    sys.path[:] = [*standard, root, *installed, *users]
    os.environ["PYTHONSAFEPATH"] = "1"
    _set("PYTHONPATH", [root] if root in left_out else [])
    _set(_FOLDERS, users)


def append_folders(folders: Iterable[str]) -> None:
    """Look for modules there, too: after everything else."""
    sys.path.extend(folder for folder in folders if folder not in sys.path)


def is_installed(folder: str) -> bool:
    """Whether Python's library lies there, or what is installed beside it, or this project."""
    site = sys.modules.get("site")  # not there under python -S
    packages = [] if site is None else [*site.getsitepackages(), site.getusersitepackages()]
    return folder in packages or folder == _root() or _is_standard(folder)


def _is_standard(folder: str) -> bool:
    library = os.path.dirname(os.__file__)
    major, minor = sys.version_info[:2]
    archive = os.path.join(os.path.dirname(library), f"python{major}{minor}.zip")
    return folder in (library, archive, os.path.join(library, "lib-dynload"))


def _root() -> str:
    return os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def _entries(variable: str) -> list[str]:
    text = os.environ.get(variable)
    return text.split(os.pathsep) if text else []


def _set(variable: str, folders: list[str]) -> None:
    if folders:
        os.environ[variable] = os.pathsep.join(folders)
    else:
        os.environ.pop(variable, None)


def _absolute(entry: str) -> str:
    try:
        return os.path.abspath(entry)
    except OSError:  # relative, and the folder that the user stands in was deleted
        return entry
