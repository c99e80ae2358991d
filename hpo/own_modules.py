"""A user's own networks and DataModules: the folders they are found in, for a study to keep."""

import os
from collections.abc import Iterable
from importlib.machinery import ModuleSpec, PathFinder

from hpo.import_path import append_folders, is_installed
from trainer.config import MODULE

_INSTALLED = ("site-packages", "dist-packages")
"""Names of folders of installed packages, those of another environment included."""


def find_own_folders(names: Iterable[str]) -> tuple[str, ...]:
    """The folders of the user's own modules among these names; Python looks there from now on.

    names: of backbones and data; package.module:name and lightning:package.module:name are the
    user's own. A module is looked for where Python would find it, then in the folder that the user
    stands in; the folders of installed packages are left out. A module that isn't found is left to
    its import, which raises ConfigError.
    """
    found = [_folder(name) for name in names if is_own(name)]
    folders = tuple(dict.fromkeys(each for each in found if each and _is_users(each)))
    append_folders(folders)
    return folders


def is_own(name: str) -> bool:
    """Whether this backbone, or data, is code of the user's own."""
    return name.startswith(MODULE) or (":" in name and not name.startswith("timm:"))


def _folder(name: str) -> str | None:
    package = name.removeprefix(MODULE).partition(":")[0].partition(".")[0]
    found = PathFinder.find_spec(package)
    if found is None and package.isidentifier():
        found = PathFinder.find_spec(package, _current_folder())
    return None if found is None else _parent(found)


def _is_users(folder: str) -> bool:
    return not is_installed(folder) and os.path.basename(folder) not in _INSTALLED


def _current_folder() -> list[str]:
    try:
        return [os.getcwd()]
    except FileNotFoundError:  # it was deleted
        return []


def _parent(found: ModuleSpec) -> str | None:
    """The folder that the module or package lies in."""
    inside = list(found.submodule_search_locations or [])
    place = inside[0] if inside else found.origin
    return None if place is None else os.path.dirname(os.path.abspath(place))
