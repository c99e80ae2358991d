"""How much arithmetic a training is, and how much of it a device can do: their ratio is the MFU.

Model FLOPs utilisation (Chowdhery et al. 2022, PaLM, appendix B): what the model's steps need, by
what the hardware could have done in that time. Nothing that is done again, or beside the model,
counts.
"""

import functools
import logging
import time
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from trainer.backbones import build
from trainer.config import Argument, TrainConfig, trains_on_features
from trainer.device import has_fast_bf16
from trainer.features import on_features
from trainer.foreign import Shape, one_line
from trainer.heads import head_name
from trainer.seeds import own_randomness

logger = logging.getLogger(__name__)
_SIDE = {"cpu": 512, "mps": 2048, "cuda": 8192}
"""Rows of the square matrices that are multiplied; larger ones are no faster on a core."""
_ROUNDS = 16


def training_flops(config: TrainConfig, *, input_size: Shape, num_classes: int) -> int:
    """Floating-point operations of one image in an optimizer step: three times the forward's.

    torch's counter is wrong on the backward pass of depthwise convolutions, so that isn't counted
    itself. Of head-only training on features, those of the head. A frozen part counts as if it
    were trained. 0 where torch's counter doesn't know the operations, or fails.
    """
    return 3 * _forward_flops(
        config.backbone,
        tuple(sorted(config.module.items())),
        config.head_hidden,
        input_size,
        num_classes,
        trains_on_features(config),
    )


@functools.lru_cache(maxsize=256)
def _forward_flops(
    backbone: str,
    arguments: tuple[tuple[str, Argument], ...],
    head_hidden: int,
    input_size: Shape,
    num_classes: int,
    head_only: bool,
) -> int:
    config = TrainConfig(backbone=backbone, module=dict(arguments), head_hidden=head_hidden)
    with own_randomness("flops", 0), torch.no_grad():
        model = build(config, input_size=input_size, num_classes=num_classes).eval()
        image = torch.zeros(1, *input_size)
        if head_only:
            head = model.get_submodule(head_name(model))
            num_features = next(head.parameters()).shape[1]
            model, image = on_features(model).eval(), torch.zeros(1, num_features, 1, 1)
        try:
            with _Counter() as counter:
                model(image)
        except Exception as error:  # other people's networks do what they like
            logger.warning("the operations of %s can't be counted: %s", backbone, one_line(error))
            return 0
    total: int = counter.total
    return total


class _Counting:
    """Adds up what torch's formulas say of the operations that it knows."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.total += int(formula(*args, **kwargs, out_val=result))
        return result


class _Counter(_Counting, TorchDispatchMode):  # type: ignore[no-untyped-call]
    """torch.utils.flop_counter's own mode imports torch's compiler, two seconds of a start: what
    stands in the body of a TorchDispatchMode is wrapped to do so, what it inherits is not.
    """


def peak_flops(device: str) -> float:
    """Floating-point operations a second of a matrix product: the fastest of a few rounds.

    In bf16 where the hardware has it, else in fp32. Of one thread on a CPU, by its own clock, so
    that a neighbour doesn't count; takes a tenth of a second there.
    """
    kind = torch.device(device).type
    bf16 = has_fast_bf16() if kind == "cpu" else kind == "cuda" and torch.cuda.is_bf16_supported(
        including_emulation=False
    )  # fmt: skip
    side, dtype = _SIDE[kind], torch.bfloat16 if bf16 else torch.float32
    matrix = torch.full((side, side), 0.5, device=device, dtype=dtype)
    clock = time.thread_time if kind == "cpu" else time.perf_counter
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        seconds = []
        for _ in range(1 + _ROUNDS):
            started = clock()
            product = matrix @ matrix
            float(product[0, 0])  # waits for the device
            seconds.append(clock() - started)
    finally:
        torch.set_num_threads(num_threads)
    return 2 * side**3 / min(seconds[1:])
