"""torch.export's .pt2: the graph and its weights, with a dynamic number of images."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from trainer.export.model import Classifier, as_classifier
from trainer.export.source import ExportSource


def to_bytes(source: ExportSource) -> bytes:
    """The file's content."""
    buffer = io.BytesIO()
    torch.export.save(source.program, buffer)
    return buffer.getvalue()


def load(path: Path, _manifest: Mapping[str, Any]) -> Classifier:
    """The file, run by PyTorch. The manifest isn't needed.

    Only for a file of one's own: torch's loader unpickles parts of it.
    """
    return as_classifier(torch.export.load(path).module())
