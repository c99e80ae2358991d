"""Which formats need packages beyond the main job's, and how to get them. Imports without torch."""

from importlib.util import find_spec

_MODULES: dict[str, tuple[str, ...]] = {
    "tflite": ("litert_torch", "ai_edge_litert"),
    "tensorrt": ("tensorrt",),
}
"""Of each extra, what must be importable to write and check a file."""


def is_missing(extra: str) -> bool:
    """Whether a package of this extra isn't installed."""
    return any(find_spec(module) is None for module in _MODULES[extra])


def missing_extra(extra: str) -> str:
    """One line: which extra is missing, and how to get it."""
    return (
        f"the format {extra} needs the extra {extra}, which isn't installed: "
        f"pip install 'hpo-vision[{extra}]' (from a checkout: pip install '.[{extra}]')"
    )
