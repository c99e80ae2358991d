"""Fields that count only with certain values of another field.

A search proposes them all the same: a flat space serves TPE better than one with branches. What
doesn't count in a trial is not shown with it, and said where it never counts.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from trainer.config import ARGUMENT, is_module

CONDITIONS: Mapping[str, tuple[str, Sequence[Any]]] = {
    "momentum": ("optimizer", ("sgd", "adam", "adamw")),
    "backbone_lr": ("trainable", ("all", "last1", "last2", "last3", "gradual")),
    "policy_magnitude": ("policy", ("randaugment",)),
}
"""field -> the field that it depends on, and the values of that one with which it counts."""


def idle_because(name: str, values: Mapping[str, Any]) -> str | None:
    """Why the field doesn't count beside these values of other fields, None if it does.

    values: each a value, or a tuple of those that it may have.
    """
    if name.startswith(ARGUMENT):
        named = values.get("backbone", "")
        if any(is_module(each) for each in (named if isinstance(named, tuple) else (named,))):
            return None
        return f"{name} counts only with a LightningModule as backbone"
    if name not in CONDITIONS:
        return None
    other, counts_with = CONDITIONS[name]
    if other not in values:
        return None
    value = values[other]
    possible = value if isinstance(value, tuple) else (value,)
    if any(each in counts_with for each in possible):
        return None
    return f"{name} counts only with {other} = {' or '.join(map(str, counts_with))}"
