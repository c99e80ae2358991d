"""Fields of TrainConfig as users write them on a command line: NAME=VALUE."""

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args, get_origin

from hpo.errors import UsageError
from trainer.config import ARGUMENT, Argument, TrainConfig, unknown_name

_TYPES = {field.name: field.type for field in dataclasses.fields(TrainConfig)}
_TRUE_OR_FALSE = {"true": True, "false": False}


def parse_settings(option: str, texts: Sequence[str]) -> Mapping[str, Any]:
    """field -> value of texts like 'lr=1e-3', each typed as its field is.

    module.NAME, an argument of a LightningModule, has the type that it looks like.

    option: the one that the texts were given by, for the message. Raises UsageError or ConfigError.
    """
    values: dict[str, Any] = {}
    for text in texts:
        name, equals, value = (part.strip() for part in text.partition("="))
        if not equals or not name or not value:
            raise UsageError(f"{option} takes FIELD=VALUE, like lr=1e-3, got {text!r}")
        if name not in _TYPES and not name.startswith(ARGUMENT):
            raise UsageError(f"{option}: {unknown_name('field', name, _TYPES)}")
        if name in values:
            raise UsageError(f"{option} sets {name} twice")
        values[name] = _parse(option, name, value)
        TrainConfig.from_dict({name: values[name]})
    return values


def _parse(option: str, name: str, text: str) -> Any:
    if name == "module":
        raise UsageError(f"{option}: arguments of a LightningModule are set by name: module.NAME")
    if name.startswith(ARGUMENT):
        return _as_it_looks(text)
    kind: Any = _TYPES[name]
    try:
        if kind is bool:
            return _TRUE_OR_FALSE[text.lower()]
        if kind is int or kind is float:
            return kind(text)
    except (KeyError, ValueError) as error:
        names: dict[Any, str] = {bool: "true or false", int: "a whole number", float: "a number"}
        raise UsageError(f"{option}: {name} must be {names[kind]}, got {text!r}") from error
    if get_origin(kind) is Literal and text not in get_args(kind):
        raise UsageError(f"{option}: {unknown_name(name, text, get_args(kind))}")
    return text


def _as_it_looks(text: str) -> Argument:
    if text.lower() in _TRUE_OR_FALSE:
        return _TRUE_OR_FALSE[text.lower()]
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text
