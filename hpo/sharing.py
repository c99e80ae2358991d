"""How many workers share a GPU: as many as its memory holds, while together they train more.

A small network's training leaves most of a GPU idle, since its kernels are short and are started
one by one; other workers' kernels run meanwhile. How much that is worth depends on the networks,
the GPU and whether CUDA's MPS runs, so it is measured, once for each of these.
"""

import itertools
import os
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hpo.executors.local import num_cores
from hpo.measured import measured_once
from hpo.spec import StudySpec
from hpo.speeds import Crew
from trainer.config import DeviceBusy, TrainingFailure

PROBE_SECONDS = 1.0
"""Of training for each backbone and number of workers."""
LEAST_GAIN = 1.1
"""What one more worker must make of the images per second of all, to be kept."""
MOST_MEMORY = 0.85
"""Share of the device's memory that may be taken."""
MOST_WORKERS = 8

Say = Callable[[str], None]


def shared(spec: StudySpec, devices: Sequence[str], say: Say) -> list[str]:
    """The devices, each GPU as often as workers on it train more together.

    say: is told what is measured and found. Nothing is measured without a GPU.
    """
    devices = list(dict.fromkeys(devices))
    most = min(MOST_WORKERS, num_cores() // len(devices))
    numbers = {device: _number_on(spec, device, most, say) for device in devices}
    return [
        device
        for index in range(max(numbers.values()))
        for device, number in numbers.items()
        if index < number
    ]


def _number_on(spec: StudySpec, device: str, most: int, say: Say) -> int:
    if not device.startswith("cuda") or most < 2:
        return 1
    what = _what(spec, device, most)
    rows = measured_once(what, lambda: measure(spec, device, most, say), _check)
    number = best_number(rows)
    if rows:
        speeds = ", ".join(f"{row['images_per_second']:,.0f}" for row in rows)
        ending = "s" * (number > 1)
        say(f"{device}: {number} worker{ending} (images/s by 1, 2, ... of them: {speeds})")
    return number


def _what(spec: StudySpec, device: str, most: int) -> str:
    import torch

    fields = spec.space.middle()
    about = [
        f"{name}={value}" for name, value in sorted(fields.items()) if name not in ("lr", "epochs")
    ]
    backbones = ",".join(map(str, spec.space.choices("backbone")))
    name = torch.cuda.get_device_name(device)
    mps = " under MPS" if mps_runs() else ""
    return (
        f"up to {most} workers of a {name}{mps} for {backbones} on {spec.fingerprint}, "
        f"{' '.join(about)}"
    )


def measure(spec: StudySpec, device: str, most: int, say: Say) -> list[dict[str, float]]:
    """What 1, 2, ... workers on the device come to: images_per_second of all together, over an even
    mix of the space's backbones, and memory_share. Ends with the first that isn't worth it.

    No more are tried than memory would hold. Empty if not even one can train.
    """
    say(f"measuring how many workers train most on {device}")
    rows: list[dict[str, float]] = []
    while len(rows) < most:
        number = len(rows) + 1
        if rows and rows[-1]["memory_share"] * number / len(rows) > MOST_MEMORY:
            break
        try:
            rows.append(_together(spec, [device] * number))
        except (DeviceBusy, TrainingFailure):  # of one: the trials will say it
            break
        if best_number(rows) < number:
            break
    return rows


def best_number(rows: Sequence[dict[str, float]]) -> int:
    """The last number of workers that was worth it. rows: as `measure` gives them."""
    number = 1
    for before, after in itertools.pairwise(rows):
        gain = after["images_per_second"] / before["images_per_second"]
        if gain < LEAST_GAIN or after["memory_share"] > MOST_MEMORY:
            break
        number += 1
    return number


def _together(spec: StudySpec, devices: list[str]) -> dict[str, float]:
    largest = int(spec.space.largest("batch_size"))
    seconds_an_image = []
    with Crew(spec, devices) as crew:
        for backbone in spec.space.choices("backbone"):
            crew.speeds(backbone, seconds=0, batch_size=largest)  # fills the memory
            speeds = crew.speeds(backbone, seconds=PROBE_SECONDS)
            seconds_an_image.append(1 / sum(speed.train for speed in speeds))
        share = crew.memory_share()
    return {
        "images_per_second": 1 / statistics.fmean(seconds_an_image),
        "memory_share": share,
    }


def _check(rows: Any) -> None:
    if not all(row["images_per_second"] > 0 and 0 <= row["memory_share"] <= 1 for row in rows):
        raise ValueError(rows)


def mps_runs() -> bool:
    """Whether CUDA's Multi-Process Service runs here; CUDA uses it then by itself."""
    folder = os.environ.get("CUDA_MPS_PIPE_DIRECTORY", "/tmp/nvidia-mps")
    return Path(folder, "control").exists()
