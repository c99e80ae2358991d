"""CUDA graphs: the kernels of a training step, recorded once and from then on started together.

A small network's kernels are shorter than it takes to start them one by one.
"""

import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from trainer.mixing import Partners

logger = logging.getLogger(__name__)
WARM_UP_STEPS = 3
"""Of a shape before it is recorded: cuDNN searches in them, and the optimizer makes its state."""

Step = Callable[[Tensor, Tensor, Partners | None], Tensor]
"""Trains on images (N,C,H,W), labels (N,) and what they were mixed with; the sum of losses, 0-d."""


class Recording(NamedTuple):
    """Recorded work. replay: does it; loss: 0-d, where each replay leaves the step's."""

    replay: Callable[[], None]
    loss: Tensor


class _Shape(NamedTuple):
    """What one recording is for."""

    size: torch.Size
    is_mixed: bool
    trained: tuple[bool, ...]
    """Of the model's parameters."""


class GraphedStep:
    """A Step that is recorded once its shape has come a few times, and replayed for that shape.

    It is right only for steps that do the same with each batch of a shape: without chance or
    counting in Python (dropout is fine, it draws on the device), and without waiting for the
    device. Other shapes, like an epoch's last batch, are stepped as usual. What is thawed meanwhile
    is recorded anew. Of what the optimizer is told, only the learning rates may change.
    """

    def __init__(self, step: Step, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """model, optimizer: what step trains."""
        self._step, self._model, self._optimizer = step, model, optimizer
        self._seen = Counter[_Shape]()
        self._recorded: _Recorded | None = None
        self._gives_up = False

    def __call__(self, images: Tensor, labels: Tensor, partners: Partners | None = None) -> Tensor:
        """As Step; the loss is overwritten by the next call."""
        trained = tuple(parameter.requires_grad for parameter in self._model.parameters())
        shape = _Shape(images.shape, partners is not None, trained)
        if self._recorded is not None and self._recorded.shape.trained != trained:
            self._recorded = None  # its memory is free before another one is made
        if self._recorded is None and self._seen[shape] >= WARM_UP_STEPS and not self._gives_up:
            self._try_to_record(shape, images, labels, partners)
        if self._recorded is not None and self._recorded.shape == shape:
            return self._recorded.replay(images, labels, partners)
        self._seen[shape] += 1
        return self._step(images, labels, partners)

    def _try_to_record(
        self, shape: _Shape, images: Tensor, labels: Tensor, partners: Partners | None
    ) -> None:
        """If it can't be recorded, that is said, and not tried again."""
        try:
            self._recorded = _Recorded(shape, self._step, self._optimizer, images, labels, partners)
        except RuntimeError as error:
            self._gives_up = True
            reason = " ".join(str(error).split())[:200]
            logger.warning("this training goes on without CUDA graphs: %s", reason)


class _Recorded:
    """A recording and the memory that it reads: the batch and the learning rates."""

    def __init__(
        self,
        shape: _Shape,
        step: Step,
        optimizer: torch.optim.Optimizer,
        images: Tensor,
        labels: Tensor,
        partners: Partners | None,
    ) -> None:
        self.shape = shape
        self._images, self._labels = images.clone(), labels.clone()
        self._share, self._partners = images.new_zeros(()), None
        if partners is not None:
            self._partners = Partners(labels=partners.labels.clone(), share=self._share)
        self._groups = optimizer.param_groups
        self._rates = [images.new_zeros(()) for _ in self._groups]

        def work() -> Tensor:
            with rates_from(self._rates, optimizer):
                return step(self._images, self._labels, self._partners)

        self._recording = record_on_cuda(work)

    def replay(self, images: Tensor, labels: Tensor, partners: Partners | None) -> Tensor:
        """The step, on this batch."""
        self._images.copy_(images)
        self._labels.copy_(labels)
        if self._partners is not None and partners is not None:
            self._partners.labels.copy_(partners.labels)
            self._share.fill_(partners.share)
        for rate, group in zip(self._rates, self._groups, strict=True):
            rate.fill_(group["lr"])
        self._recording.replay()
        return self._recording.loss


@contextlib.contextmanager
def rates_from(rates: Sequence[Tensor], optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """In here the optimizer reads its groups' learning rates from these, each 0-d, on its device.

    The fused kernels can; and torch's Adam wants to be told that it may be recorded.
    """
    before = [dict(group) for group in optimizer.param_groups]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
        if "capturable" in group:
            group["capturable"] = rate.device.type == "cuda"
    try:
        yield
    finally:
        for group, old in zip(optimizer.param_groups, before, strict=True):
            group.update(old)


def record_on_cuda(work: Callable[[], Tensor]) -> Recording:
    """Notes what work does to the device, without doing it.

    Raises RuntimeError if work waits for the device, or memory is used up.
    """
    graph = torch.cuda.CUDAGraph()
    # other threads may use the device meanwhile
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        loss = work()
    return Recording(replay=graph.replay, loss=loss)
