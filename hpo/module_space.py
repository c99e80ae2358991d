"""A space with LightningModules in it: what of it reaches them, and what they can't have."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hpo.space import SearchSpace
from trainer.config import ARGUMENT, TrainConfig, is_module

if TYPE_CHECKING:
    from trainer.data.dataset import ImageDataset


def settled_for_modules(space: SearchSpace, fields: Mapping[str, Any]) -> SearchSpace:
    """The default space without what the user's modules don't take; theirs are their defaults.

    fields: of the space, as options give them. Beside a backbone of ours all fields are kept. What
    one module alone takes with a default of its own has that, unless it is searched.
    """
    from trainer.modules import idle_names, own_defaults

    named = fields.get("backbone", ())
    backbones = named if isinstance(named, tuple) else (named,)
    if not backbones or not all(map(is_module, backbones)):
        return space
    space = space.without(idle_names(tuple(space.fields), backbones))
    defaults = own_defaults(backbones[0]) if len(backbones) == 1 else {}
    decided = {*space.searched, *fields, *(f"{ARGUMENT}{name}" for name in fields)}
    return space.replace(**{n: v for n, v in defaults.items() if n not in decided})


def check_modules(space: SearchSpace, data: "ImageDataset") -> None:
    """Raises ConfigError for what a module of the space can't have, or isn't."""
    from trainer.backbones import build
    from trainer.modules import check_module_fields

    for backbone in filter(is_module, space.choices("backbone")):
        for name in space.fields:
            for value in space.choices(name):
                check_module_fields(TrainConfig.from_dict({name: value, "backbone": backbone}))
        config = TrainConfig.from_dict({**space.middle(), "backbone": backbone})
        build(config, input_size=data.input_size, num_classes=data.num_classes)


def unheard(space: SearchSpace) -> list[str]:
    """Fields of the space that reach none of its networks, which are the user's own, in words."""
    from trainer.modules import idle_names

    backbones = space.choices("backbone")
    names = idle_names(tuple(space.fields), backbones)
    return [f"{name} is no argument of {' or '.join(backbones)}" for name in names]
