"""The fields of a training, as `hpo space` prints them. Imports no torch."""

import ast
import dataclasses
import inspect
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

from hpo.space import default_space
from trainer.config import Argument, TrainConfig

_KINDS: dict[Any, str] = {
    bool: "true or false",
    int: "whole number",
    float: "number",
    str: "word",
    Mapping[str, Argument]: "values by name",
}


@dataclass(frozen=True, kw_only=True)
class FieldDescription:
    """One field of TrainConfig. searched: in a study that was told nothing of its space."""

    name: str
    kind: str
    default: Any
    searched: bool
    text: str

    def to_json(self) -> dict[str, Any]:
        """As `hpo space --json` prints it."""
        return dataclasses.asdict(self)

    def lines(self) -> list[str]:
        """For people."""
        searched = ", searched unless told otherwise" if self.searched else ""
        default = str(self.default).lower() if isinstance(self.default, bool) else self.default
        default = "none" if default == {} else default
        head = f"{self.name}: {self.kind}, default {default}{searched}"
        return [head, *(f"    {line}" for line in textwrap.wrap(self.text, 96))]


def describe_fields() -> list[FieldDescription]:
    """All fields, in their order; the text is what stands below each in trainer/config.py."""
    texts = _docstrings(TrainConfig)
    ordinary = default_space(input_size=(1, 32, 32), num_train=1000, flips=True, num_cores=None)
    return [
        FieldDescription(
            name=field.name,
            kind=_kind(field.type),
            default=getattr(TrainConfig(), field.name),
            searched=field.name in ordinary.searched,
            text=texts.get(field.name, ""),
        )
        for field in dataclasses.fields(TrainConfig)
    ]


def _kind(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return " | ".join(map(str, get_args(kind)))
    return _KINDS.get(kind, str(kind))


def _docstrings(of: type) -> dict[str, str]:
    """name -> the string that follows the field in the class's source."""
    (found,) = ast.parse(textwrap.dedent(inspect.getsource(of))).body
    assert isinstance(found, ast.ClassDef)
    texts = {}
    for statement, following in zip(found.body, found.body[1:], strict=False):
        match statement, following:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=text)):
                texts[name] = " ".join(str(text).split())
    return texts
