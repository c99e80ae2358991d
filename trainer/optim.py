"""Optimizers and learning rates, as pure functions of a TrainConfig."""

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from trainer.config import TrainConfig
from trainer.heads import head_name

START = 1 / 25
"""Share of the peak at which a warm-up begins."""
END = 1e-4 * START
"""Share of the peak at which onecycle ends (as torch's OneCycleLR)."""


def make_optimizer(config: TrainConfig, model: nn.Module) -> torch.optim.Optimizer:
    """The config's optimizer over what is trained of the model, in one fused kernel a group.

    sgd has Nesterov's momentum (if there is any), adam and adamw take momentum as beta1.
    Parameters with fewer than two dimensions (norms, biases) are not decayed. The learning
    rate is set before each step (set_lr); that of all but the head is config.backbone_lr of it.
    """
    groups = _groups(config, [p for p in model.parameters() if p.requires_grad])
    if config.backbone_lr != 1.0:
        head = {id(p) for p in model.get_submodule(head_name(model)).parameters()}
        groups = [
            {**group, "lr_share": share}
            for share, in_head in ((1.0, True), (config.backbone_lr, False))
            for group in _groups(
                config,
                [p for p in model.parameters() if p.requires_grad and (id(p) in head) == in_head],
            )
        ]
    if config.optimizer == "sgd":
        nesterov = config.momentum > 0
        return _joining_sgd()(
            groups, lr=config.lr, momentum=config.momentum, nesterov=nesterov, fused=True
        )
    kind = torch.optim.Adam if config.optimizer == "adam" else torch.optim.AdamW
    return _uncompiled(kind)(groups, lr=config.lr, betas=(config.momentum, 0.999), fused=True)


@functools.cache
def _uncompiled(kind: type[torch.optim.Optimizer]) -> Callable[..., torch.optim.Optimizer]:
    """torch's optimizer without what tells torch's compiler to let it alone.

    That imports the compiler, which takes two seconds of each start and is not used: its methods
    are the same ones, from inside of their wrappers.
    """
    names = ("add_param_group", "load_state_dict", "state_dict", "step", "zero_grad")
    inner = {name: getattr(kind, name).__wrapped__ for name in names}
    return type(kind.__name__, (kind,), {**inner, "step": torch.no_grad()(inner["step"])})


@functools.cache
def _joining_sgd() -> Callable[..., torch.optim.Optimizer]:
    """SGD in which a parameter may have its first gradient later than others of its group.

    A stage that is thawed does, and so does a layer that a network skips at times. torch's fused
    kernel then fails, for it wants the momentum of all or of none; a momentum of zeros is the one
    with which a parameter's first step is what it is without.
    """

    def init_group(
        self: torch.optim.SGD,
        group: dict[str, Any],
        params: list[Tensor],
        grads: list[Tensor],
        momenta: list[Tensor | None],
    ) -> bool:
        inner: Any = torch.optim.SGD._init_group
        has_sparse: bool = inner(self, group, params, grads, momenta)
        if any(momentum is not None for momentum in momenta):
            momenta[:] = [
                torch.zeros_like(grad) if momentum is None else momentum
                for grad, momentum in zip(grads, momenta, strict=True)
            ]
        return has_sparse

    kind: Any = _uncompiled(torch.optim.SGD)
    return type("SGD", (kind,), {"_init_group": init_group})


def _groups(config: TrainConfig, params: list[nn.Parameter]) -> list[dict[str, Any]]:
    groups: list[dict[str, Any]] = [
        {"params": [p for p in params if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """The learning rate of the steps to come."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_share", 1.0)


def lr_at(config: TrainConfig, progress: float) -> float:
    """The learning rate when this share of all optimizer steps, in [0, 1], is done.

    constant: the peak, throughout.
    step: x 0.1 at 1/2, x 0.1 again at 3/4 (He et al. 2016, section 4.2).
    cosine: linear warm-up from 1/25 over the first 1/20, then half a cosine down to 0
        (Loshchilov & Hutter 2017; warm-up of Goyal et al. 2017).
    onecycle: up from 1/25 over the first 3/10, then down to 1/250,000, each half a cosine
        (Smith & Topin 2018; the constants of torch's OneCycleLR; momentum stays).
    """
    return config.lr * _share_of_peak(config.schedule, progress)


def _share_of_peak(schedule: str, progress: float) -> float:
    if schedule == "step":
        return 1.0 if progress < 0.5 else 0.1 if progress < 0.75 else 0.01
    if schedule == "cosine":
        if progress < 0.05:
            return START + (1 - START) * progress / 0.05
        return _half_cosine(1.0, 0.0, (progress - 0.05) / 0.95)
    if schedule == "onecycle":
        if progress < 0.3:
            return _half_cosine(START, 1.0, progress / 0.3)
        return _half_cosine(1.0, END, (progress - 0.3) / 0.7)
    return 1.0


def _half_cosine(first: float, last: float, share: float) -> float:
    return last + (first - last) * (1 + math.cos(math.pi * share)) / 2


def clip_gradients(parameters: Iterable[nn.Parameter], clip_norm: float) -> None:
    """Scale all gradients down together to this norm at most; 0 leaves them alone."""
    if clip_norm > 0:
        nn.utils.clip_grad_norm_(list(parameters), clip_norm)
