"""What a device's memory holds: how many images at once, and what it says when it is used up."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from trainer.config import OutOfMemory, TrainConfig
from trainer.foreign import Shape

SMALLEST = 2
"""Images of a micro-batch at least: batch norm can't take one."""
OUT_OF_MEMORY_WORDS = (
    "not enough memory", "allocate memory", "out of memory", "bad alloc", "alloc_failed"
)  # fmt: skip
NO_ENGINE_WORDS = "unable to find an engine"
"""cuDNN's answer where its workspace doesn't fit, but also where it can't do the operation."""


_tried: dict[tuple[object, ...], "_Tried"] = {}


class _Tried(NamedTuple):
    batch_size: int
    fitted: int


def is_probed(device: str) -> bool:
    """Whether trying shows what fits: not on a CPU, whose machine swaps or kills the process."""
    return torch.device(device).type != "cpu"


def memory_share(device: str) -> float:
    """Of the device's memory, what is taken by all processes together; 0 where none can say."""
    if torch.device(device).type != "cuda":
        return 0.0
    free, total = torch.cuda.mem_get_info(device)
    return 1 - free / total


def micro_batch_that_fits(
    config: TrainConfig, input_size: Shape, device: str, attempt: Callable[[int], None]
) -> int | None:
    """The batch size, or a half, a quarter, ..., of it, that fits; None is the whole batch.

    attempt: trains on so many images and keeps nothing. It is asked for one more than the
    answer, as the last batch of an epoch and parts of an odd batch may have. What was found for
    this backbone, size and device is remembered: a batch that is no larger than the largest one
    tried costs nothing, a larger one begins with what fitted. Without is_probed(device), None.
    Raises OutOfMemory if not even SMALLEST images fit.
    """
    if not is_probed(device):
        return None
    batch_size = config.batch_size
    key = (config.backbone, *sorted(config.module.items()), input_size, device)
    tried = _tried.get(key, _Tried(0, 0))
    if batch_size > tried.batch_size:
        micro_batch = batch_size if tried.fitted == tried.batch_size else tried.fitted
        while not _fits(micro_batch, attempt):
            if micro_batch == SMALLEST:
                raise OutOfMemory(
                    f"{config.backbone} on images of {'x'.join(map(str, input_size))} doesn't "
                    f"fit into the memory of {device}: not even {SMALLEST} images at once"
                )
            micro_batch = max(SMALLEST, micro_batch // 2)
        tried = _tried[key] = _Tried(batch_size, micro_batch)
    return None if batch_size <= tried.fitted else tried.fitted


def _fits(micro_batch: int, attempt: Callable[[int], None]) -> bool:
    try:
        attempt(micro_batch + 1)
        fits = True
    except (MemoryError, RuntimeError) as error:
        no_engine = micro_batch > SMALLEST and NO_ENGINE_WORDS in str(error)
        if not no_engine and not is_out_of_memory(error):
            raise
        fits = False
    # not before here: the error's traceback holds the attempt's tensors
    torch.accelerator.empty_cache()
    return fits


@contextmanager
def memory_errors(config: TrainConfig, device: str) -> Iterator[None]:
    """Whatever torch or Python say when memory is used up becomes OutOfMemory."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(
            f"{config.backbone} with batch_size {config.batch_size} doesn't fit into the memory "
            f"of {device}"
        ) from error


def is_out_of_memory(error: MemoryError | RuntimeError) -> bool:
    """Whether this is what torch or Python say when memory is used up."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or any(word in text for word in OUT_OF_MEMORY_WORDS)
