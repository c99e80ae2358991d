"""What a device's memory holds: how many images at once, and what it says when it is used up."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from trainer.config import DeviceBusy, OutOfMemory, TrainConfig
from trainer.foreign import Shape

SMALLEST = 2
"""Images of a micro-batch at least: batch norm can't take one."""
OUT_OF_MEMORY_WORDS = (
    "not enough memory", "allocate memory", "out of memory", "bad alloc", "alloc_failed"
)  # fmt: skip
NO_ENGINE_WORDS = "unable to find an engine"
"""cuDNN's answer where its workspace doesn't fit, but also where it can't do the operation."""

CONTEXT_BYTES = 2**30
"""Of a device's memory, what a process may take beside its tensors: CUDA's context, libraries."""
_TRIED_TO_ALLOCATE = re.compile(r"tried to allocate ([\d.]+) (bytes|kib|mib|gib)", re.IGNORECASE)
_UNITS = {"bytes": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30}

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


class DeviceMemory(NamedTuple):
    """Bytes of a device's memory, and how they are used."""

    total: int
    free: int
    own: int
    """Held by this process's tensors, and kept for them."""

    @property
    def others(self) -> int:
        """Held by other processes; 0 where that may be this process's own context."""
        found = self.total - self.free - self.own
        return found if found > CONTEXT_BYTES else 0


def memory_of(device: str) -> DeviceMemory | None:
    """None where none can say: on CPUs and MPS, and where CUDA isn't."""
    if torch.device(device).type != "cuda" or not torch.cuda.is_available():
        return None
    free, total = torch.cuda.mem_get_info(device)
    return DeviceMemory(total=total, free=free, own=torch.cuda.memory_reserved(device))


def busy_because(error: MemoryError | RuntimeError, device: str) -> str | None:
    """Why memory was short, where that is due to other processes on the device; else None.

    To be called before anything that the error's frames hold is freed. What this process holds and
    what it tried to get then are the least that it needs; more than the device has without the
    others is too much anyway.
    """
    memory = memory_of(device)
    if memory is None or not memory.others:
        return None
    needed = memory.own + _bytes_asked_for(error) + CONTEXT_BYTES
    if needed > memory.total:
        return None
    return (
        f"other processes hold {memory.others / 2**30:.1f} GiB of the {memory.total / 2**30:.1f} "
        f"GiB of {device}"
    )


def _bytes_asked_for(error: MemoryError | RuntimeError) -> int:
    """As torch's message has it; 0 where it has none."""
    found = _TRIED_TO_ALLOCATE.search(str(error))
    return int(float(found[1]) * _UNITS[found[2].lower()]) if found else 0


def micro_batch_that_fits(
    config: TrainConfig, input_size: Shape, device: str, attempt: Callable[[int], None]
) -> int | None:
    """The batch size, or a half, a quarter, ..., of it, that fits; None is the whole batch.

    attempt: trains on so many images and keeps nothing. It is asked for one more than the
    answer, as the last batch of an epoch and parts of an odd batch may have. What was found for
    this backbone, size and device is remembered: a batch that is no larger than the largest one
    tried costs nothing, a larger one begins with what fitted. It is not remembered that less than
    the batch fits beside other processes, which may leave. Without is_probed(device), None. Raises
    OutOfMemory if not even SMALLEST images fit, DeviceBusy if they would without other processes.
    """
    if not is_probed(device):
        return None
    batch_size = config.batch_size
    key = (config.backbone, *sorted(config.module.items()), input_size, device)
    tried = _tried.get(key, _Tried(0, 0))
    if batch_size > tried.batch_size:
        micro_batch = batch_size if tried.fitted == tried.batch_size else tried.fitted
        crowded: str | None = None
        while (failed := _try(micro_batch, attempt, device)) is not None:
            crowded = failed.busy_because or crowded
            if micro_batch == SMALLEST and failed.busy_because:
                raise DeviceBusy(
                    f"{config.backbone} on images of {'x'.join(map(str, input_size))} doesn't fit: "
                    f"{failed.busy_because}"
                )
            if micro_batch == SMALLEST:
                raise OutOfMemory(
                    f"{config.backbone} on images of {'x'.join(map(str, input_size))} doesn't "
                    f"fit into the memory of {device}: not even {SMALLEST} images at once"
                )
            micro_batch = max(SMALLEST, micro_batch // 2)
        tried = _Tried(batch_size, micro_batch)
        if crowded is None:
            _tried[key] = tried
    return None if batch_size <= tried.fitted else tried.fitted


class _Failed(NamedTuple):
    busy_because: str | None


def _try(micro_batch: int, attempt: Callable[[int], None], device: str) -> _Failed | None:
    """None if it fits."""
    failed: _Failed | None = None
    try:
        attempt(micro_batch + 1)
    except (MemoryError, RuntimeError) as error:
        no_engine = micro_batch > SMALLEST and NO_ENGINE_WORDS in str(error)
        if not no_engine and not is_out_of_memory(error):
            raise
        failed = _Failed(busy_because(error, device))
    # not before here: the error's traceback holds the attempt's tensors
    torch.accelerator.empty_cache()
    return failed


@contextmanager
def memory_errors(config: TrainConfig, device: str) -> Iterator[None]:
    """Whatever torch or Python say when memory is used up becomes OutOfMemory.

    Or DeviceBusy, where other processes use it up.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        busy = busy_because(error, device)
        if busy is not None:
            raise DeviceBusy(
                f"{config.backbone} with batch_size {config.batch_size} doesn't fit: {busy}"
            ) from error
        raise OutOfMemory(
            f"{config.backbone} with batch_size {config.batch_size} doesn't fit into the memory "
            f"of {device}"
        ) from error


def is_out_of_memory(error: MemoryError | RuntimeError) -> bool:
    """Whether this is what torch or Python say when memory is used up."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or any(word in text for word in OUT_OF_MEMORY_WORDS)
