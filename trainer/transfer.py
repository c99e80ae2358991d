"""Small tensors on their way from the CPU to where the images are."""

import torch
from torch import Tensor


def sent(values: Tensor, device: torch.device | str) -> Tensor:
    """values on the device; a GPU is not waited for.

    A plain copy to a GPU waits until all that it was given before is done, so the host could not
    run ahead of it. From pinned memory it doesn't; torch keeps that memory until it was read.
    """
    if torch.device(device).type != "cuda" or values.device.type != "cpu":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)
