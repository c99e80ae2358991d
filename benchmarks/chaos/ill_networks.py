"""Networks of a user's own that do harm at one step of their training; copied beside a study.

Steps are counted in a buffer, so that a training which goes on from a checkpoint counts on.
"""

import os
import signal
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

STEP = 60
"""At which they do it: in the fourth epoch of digits in batches of 64."""

if os.environ.get("WITHOUT_A_PACKAGE"):
    raise ImportError("No module named 'einops'")


class Net(nn.Module):
    """(N,C,H,W) -> (N,classes); `act` is called from the 60th step on."""

    steps: Tensor

    def __init__(
        self,
        input_size: tuple[int, int, int],
        num_classes: int,
        dropout: float,
        act: Callable[[], None],
    ) -> None:
        super().__init__()
        self.act = act
        self.body = nn.Sequential(
            nn.Conv2d(input_size[0], 8, 3, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Dropout(dropout),
        )
        self.head = nn.Linear(8, num_classes)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("ballast", torch.zeros(100_000))  # a checkpoint of 0.4 MB

    def forward(self, images: Tensor) -> Tensor:
        if self.training:
            self.steps += 1
            if int(self.steps) >= STEP:
                self.act()
        logits: Tensor = self.head(self.body(images))
        return logits


def killed(input_size: tuple[int, int, int], num_classes: int, dropout: float) -> Net:
    """As by the kernel when memory is used up, or by a decoder's segmentation fault."""
    return Net(input_size, num_classes, dropout, lambda: os.kill(os.getpid(), signal.SIGKILL))


def leaving(input_size: tuple[int, int, int], num_classes: int, dropout: float) -> Net:
    """A library that ends the process."""
    return Net(input_size, num_classes, dropout, lambda: os._exit(1))


def hanging(input_size: tuple[int, int, int], num_classes: int, dropout: float) -> Net:
    """A deadlock."""
    return Net(input_size, num_classes, dropout, lambda: time.sleep(3600))


def raising(input_size: tuple[int, int, int], num_classes: int, dropout: float) -> Net:
    """An ordinary mistake."""

    def act() -> None:
        raise ValueError(f"broken at its {STEP}th step")

    return Net(input_size, num_classes, dropout, act)


def well(input_size: tuple[int, int, int], num_classes: int, dropout: float) -> Net:
    """Does no harm."""
    return Net(input_size, num_classes, dropout, lambda: None)


well_1 = well_2 = well_3 = well_4 = well_5 = well_6 = well_7 = well
