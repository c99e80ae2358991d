"""Averages of a model's weights over the last part of a training, beside the model itself."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from trainer.config import ConfigError, unknown_name

FIRST_PROGRESS = 0.75
"""Share of all optimizer steps after which averaging begins."""


class Averages:
    """The averages that a training keeps, by name. Batch norm's statistics are averaged, too.

    ema: exponential, over about an epoch's steps (Polyak & Juditsky 1992, as is usual today).
    tail: equal parts of each epoch's last weights (SWA, Izmailov et al. 2018, on the schedule as
    it is). Both begin when three quarters of the training are done.
    """

    def __init__(self, model: nn.Module, names: Collection[str], *, steps_per_epoch: int) -> None:
        """Raises ConfigError for a name that is none of AVERAGES."""
        for name in names:
            if name not in AVERAGES:
                raise ConfigError(unknown_name("average", name, AVERAGES))
        self._models = {name: AVERAGES[name](model, steps_per_epoch) for name in sorted(names)}

    def after_step(self, model: nn.Module, progress: float) -> None:
        """progress: share of all optimizer steps that are done, in [0, 1]."""
        if "ema" in self._models and progress >= FIRST_PROGRESS:
            self._models["ema"].update_parameters(model)

    def after_epoch(self, model: nn.Module, progress: float) -> None:
        """progress: as for after_step."""
        if "tail" in self._models and progress >= FIRST_PROGRESS:
            self._models["tail"].update_parameters(model)

    def models(self) -> dict[str, nn.Module]:
        """Those that something has been averaged into."""
        return {
            name: averaged.module
            for name, averaged in self._models.items()
            if int(averaged.n_averaged) > 0
        }

    def state_dict(self) -> dict[str, Any]:
        """Tensors, by name."""
        return {name: averaged.state_dict() for name, averaged in self._models.items()}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Of state_dict(). Raises KeyError or RuntimeError if it doesn't fit."""
        for name, averaged in self._models.items():
            averaged.load_state_dict(saved[name])


def soup(models: Sequence[nn.Module]) -> nn.Module:
    """Equal parts of the weights of models that started from the same ones, statistics included.

    Wortsman et al. 2022, "Model soups" (the uniform one). The models stay as they are.
    """
    mixed = AveragedModel(models[0], use_buffers=True)
    for model in models:
        mixed.update_parameters(model)
    return mixed.module


def _ema(model: nn.Module, steps_per_epoch: int) -> AveragedModel:
    decay = 1 - 1 / max(2, steps_per_epoch)
    average = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
    return AveragedModel(model, multi_avg_fn=average, use_buffers=True)


def _tail(model: nn.Module, _steps_per_epoch: int) -> AveragedModel:
    return AveragedModel(model, use_buffers=True)


AVERAGES: dict[str, Callable[[nn.Module, int], AveragedModel]] = {"ema": _ema, "tail": _tail}
