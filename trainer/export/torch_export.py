"""torch.export's .pt2: the graph and its weights, with a dynamic number of images."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.export.model import Classifier, ExportModel, as_classifier


def to_bytes(model: ExportModel, example: Tensor) -> bytes:
    """The file's content. example: uint8 (N,C,H,W), N >= 2."""
    shapes = ({0: torch.export.Dim("num_images")},)
    program = torch.export.export(model, (example,), dynamic_shapes=shapes)
    for node in program.graph.nodes:
        # The names of source files on this machine are nobody else's business.
        node.meta.pop("stack_trace", None)
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    return buffer.getvalue()


def load(path: Path, _manifest: Mapping[str, Any]) -> Classifier:
    """The file, run by PyTorch. The manifest isn't needed.

    Only for a file of one's own: torch's loader unpickles parts of it.
    """
    return as_classifier(torch.export.load(path).module())
