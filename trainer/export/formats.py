"""FORMATS: what a model can be exported to."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from trainer.export import onnx, safetensors, torch_export, torchscript
from trainer.export.model import Classifier, ExportModel


@dataclass(frozen=True, kw_only=True)
class Format:
    """One way of writing a model to a file, and of running that file again."""

    file: str
    """Its name in the export folder."""
    to_bytes: Callable[[ExportModel, Tensor], bytes]
    """The file's content, from the model and example images (2,C,H,W) to trace it with."""
    load: Callable[[Path, Mapping[str, Any]], Classifier]
    """The file in the format's own runtime; the mapping is the export's manifest."""
    safe_to_load: str
    """What somebody should know who gets the file from somebody else."""


FORMATS: dict[str, Format] = {
    "torchscript": Format(
        file="model.ts.pt",
        to_bytes=torchscript.to_bytes,
        load=torchscript.load,
        safe_to_load="from people you trust: it is a program that torch runs",
    ),
    "onnx": Format(
        file="model.onnx",
        to_bytes=onnx.to_bytes,
        load=onnx.load,
        safe_to_load="yes: it holds numbers and known operations, no code",
    ),
    "torch-export": Format(
        file="model.pt2",
        to_bytes=torch_export.to_bytes,
        load=torch_export.load,
        safe_to_load="from people you trust: torch's loader unpickles parts of it",
    ),
    "safetensors": Format(
        file="model.safetensors",
        to_bytes=safetensors.to_bytes,
        load=safetensors.load,
        safe_to_load="yes: it holds numbers only",
    ),
}
