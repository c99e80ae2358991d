"""ExportModel: the trained network as it is handed over, with the normalisation inside."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

Classifier = Callable[[npt.NDArray[np.uint8]], npt.NDArray[np.float32]]
"""Images, uint8 (N,C,H,W), to logits, float32 (N,classes), for any N >= 1."""


class ExportModel(nn.Module):
    """A frozen copy of a backbone on the CPU, in float32, that takes raw images.

    mean, std: of the training images / 255, a channel each. The backbone itself is left as it is.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, backbone: nn.Module, *, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.backbone = copy.deepcopy(backbone)
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))
        self.to("cpu", torch.float32)
        self.to(memory_format=torch.contiguous_format)
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """images: uint8 (N,C,H,W). Logits, float32 (N,classes)."""
        pixels = images.to(torch.float32)
        logits: Tensor = self.backbone((pixels - 255 * self.mean) / (255 * self.std))
        return logits


def example_images(input_size: Sequence[int]) -> Tensor:
    """uint8 (2,C,H,W) to trace a model with.

    Zeros, for TorchScript and torch.export keep them in the file, where no picture of the user's
    belongs. Two of them, for torch.export takes a batch of one for a constant.
    """
    return torch.zeros(2, *input_size, dtype=torch.uint8)


def as_classifier(module: Callable[[Tensor], Any]) -> Classifier:
    """A torch module that takes uint8 images, as a function of numpy arrays."""

    def classify(images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        with torch.inference_mode():
            logits: npt.NDArray[np.float32] = module(torch.from_numpy(images)).numpy()
        return logits

    return classify
