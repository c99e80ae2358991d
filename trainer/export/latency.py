"""How long a file's own runtime takes for a batch, on this machine."""

import time
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from trainer.export.model import Classifier

_BATCHES = (1, 32)
_MOST_REPEATS = 50
_SECONDS = 0.4
"""For each size of batch, after the first call: one that takes longer is called once more."""


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Medians, in milliseconds, from an array of images to an array of logits."""

    latency_ms_1: float
    latency_ms_32: float
    num_threads: int


def measure(classify: Classifier, images: Tensor) -> Latency:
    """images: uint8 (N,C,H,W), N >= 1, repeated where there are fewer than 32."""
    medians = []
    for size in _BATCHES:
        copies = -(-size // len(images))
        batch = images.repeat(copies, 1, 1, 1)[:size].contiguous().numpy()
        classify(batch)
        seconds: list[float] = []
        while not seconds or (sum(seconds) < _SECONDS and len(seconds) < _MOST_REPEATS):
            start = time.perf_counter()
            classify(batch)
            seconds.append(time.perf_counter() - start)
        medians.append(1000 * median(seconds))
    return Latency(
        latency_ms_1=medians[0], latency_ms_32=medians[1], num_threads=torch.get_num_threads()
    )
