"""FORMATS: what a model can be exported to."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trainer.config import ConfigError, unknown_name
from trainer.export import (
    network,
    onnx,
    onnx_reduced,
    safetensors,
    snippets,
    tensorrt,
    tflite,
    torch_export,
    torchscript,
)
from trainer.export.extras import is_missing, missing_extra
from trainer.export.model import Classifier
from trainer.export.snippets import snippet
from trainer.export.source import ExportSource

OTHER_FILES = frozenset({
    "manifest.json", "metrics.json", "model_card.md", "confusion_matrix.png", "curves.png",
    network.FILE,
})  # fmt: skip
"""What an export folder holds beside the formats' files."""
_NUMBERS_ONLY = "yes: it holds numbers and known operations, no code"


@dataclass(frozen=True, kw_only=True)
class Format:
    """One way of writing a model to a file, and of running that file again."""

    file: str
    """Its name in the export folder."""
    methods: Mapping[str, Callable[[ExportSource], bytes]]
    """How it is made, in words, and what gives the file's content: the first that holds is kept."""
    load: Callable[[Path, Mapping[str, Any]], Classifier]
    """The file in the format's own runtime; the mapping is the export's manifest."""
    safe_to_load: str
    """What somebody should know who gets the file from somebody else."""
    program: str
    """Of the model card: it loads the file and defines logits_of(images) (see snippets.py)."""
    exact: bool = True
    """Whether it holds the model's own numbers, so that its logits must be the model's."""
    extra: str | None = None
    """Of pyproject.toml, if the main job's packages don't do; made only when named then."""
    modules: tuple[str, ...] = ()
    """Of the extra: what must be importable to write and check a file."""
    needs_gpu: bool = False

    def __post_init__(self) -> None:
        """Raises ValueError for an entry that an export would stumble over."""
        if not self.methods:
            raise ValueError(f"the format of {self.file} has no method")
        if Path(self.file).name != self.file or self.file in OTHER_FILES:
            raise ValueError(f"the format's file can't be called {self.file!r}")
        if bool(self.modules) != (self.extra is not None):
            raise ValueError(f"the format of {self.file}: an extra has modules, no extra has none")
        snippet(self.program, file=self.file, input_size=(1, 1, 1), num_classes=2)


FORMATS: dict[str, Format] = {
    "torchscript": Format(
        file="model.ts.pt",
        methods={"torch.jit.trace": torchscript.to_bytes},
        load=torchscript.load,
        safe_to_load="from people you trust: it is a program that torch runs",
        program=snippets.TORCHSCRIPT,
    ),
    "onnx": Format(
        file="model.onnx",
        methods={"torch.onnx.export": onnx.to_bytes},
        load=onnx.load,
        safe_to_load=_NUMBERS_ONLY,
        program=snippets.ONNX,
    ),
    "onnx-fp16": Format(
        file="model.fp16.onnx",
        methods={"weights and arithmetic in float16": onnx_reduced.float16},
        load=onnx.load,
        safe_to_load=_NUMBERS_ONLY,
        program=snippets.ONNX,
        exact=False,
    ),
    "onnx-int8": Format(
        file="model.int8.onnx",
        methods={
            "static: weights and activations in 8 bits": onnx_reduced.int8_static,
            "weights only: arithmetic in float32": onnx_reduced.int8_weights,
        },
        load=onnx.load,
        safe_to_load=_NUMBERS_ONLY,
        program=snippets.ONNX,
        exact=False,
    ),
    "torch-export": Format(
        file="model.pt2",
        methods={"torch.export": torch_export.to_bytes},
        load=torch_export.load,
        safe_to_load="from people you trust: torch's loader unpickles parts of it",
        program=snippets.TORCH_EXPORT,
    ),
    "safetensors": Format(
        file="model.safetensors",
        methods={"the weights alone": safetensors.to_bytes},
        load=safetensors.load,
        safe_to_load="yes: it holds numbers only",
        program=snippets.SAFETENSORS,
    ),
    "tflite": Format(
        file="model.tflite",
        methods={"litert-torch, one image a call": tflite.to_bytes},
        load=tflite.load,
        safe_to_load=_NUMBERS_ONLY,
        program=snippets.TFLITE,
        extra="tflite",
        modules=("litert_torch", "ai_edge_litert"),
    ),
    "tensorrt": Format(
        file="model.engine",
        methods={"TensorRT, from the ONNX file": tensorrt.to_bytes},
        load=tensorrt.load,
        safe_to_load="from people you trust: it is a program for the GPU",
        program=snippets.TENSORRT,
        extra="tensorrt",
        modules=("tensorrt",),
        needs_gpu=True,
    ),
}

DEFAULT_FORMATS = tuple(name for name, fmt in FORMATS.items() if fmt.extra is None)
"""Those that any machine can write; the others are made when named."""


def check_formats(names: Iterable[str]) -> tuple[str, ...]:
    """The names, each once, if all of them can be exported to on this machine.

    Raises ConfigError if there are none, if one is unknown, or if it needs an extra that isn't
    installed or a GPU that isn't there.
    """
    chosen = tuple(dict.fromkeys(names))
    if not chosen:
        raise ConfigError(f"no format is named (known: {', '.join(FORMATS)})")
    for name in chosen:
        if name not in FORMATS:
            raise ConfigError(unknown_name("format", name, FORMATS))
        fmt = FORMATS[name]
        if fmt.extra is not None and is_missing(fmt.modules):
            raise ConfigError(missing_extra(fmt.extra))
        if fmt.needs_gpu and not torch.cuda.is_available():
            raise ConfigError(f"the format {name} needs an NVIDIA GPU, and torch finds none")
    return chosen
