"""Formats that need packages beyond the main job's, and how to get them. Imports without torch."""

from collections.abc import Iterable
from importlib.util import find_spec


def is_missing(modules: Iterable[str]) -> bool:
    """Whether one of these modules, of an extra, isn't installed."""
    return any(find_spec(module) is None for module in modules)


def missing_extra(extra: str) -> str:
    """One line: which extra is missing, and how to get it."""
    return (
        f"the format {extra} needs the extra {extra}, which isn't installed: "
        f"pip install 'hpo-vision[{extra}]' (from a checkout: pip install '.[{extra}]')"
    )
