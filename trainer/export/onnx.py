"""ONNX by way of torch.export, with a dynamic number of images: for any ONNX runtime."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from trainer.export.model import Classifier
from trainer.export.onnx_session import open_session
from trainer.export.source import ExportSource


def to_bytes(source: ExportSource) -> bytes:
    """The file's content, weights inside."""
    return source.onnx


def convert(program: ExportedProgram, example: Tensor) -> bytes:
    """The program as an ONNX model. example: uint8 (N,C,H,W), N >= 2."""
    found = torch.onnx.export(
        program,
        (example,),
        dynamo=True,
        verbose=False,
        input_names=["images"],
        output_names=["logits"],
    )
    assert found is not None
    graph = found.model.graph
    # What torch notes of the program is of no use to a runtime.
    for node in graph.all_nodes():
        node.metadata_props.clear()
    for value in (*graph.inputs, *graph.outputs):
        value.metadata_props.clear()
    content: bytes = found.model_proto.SerializeToString()
    return content


def load(path: Path, _manifest: Mapping[str, Any]) -> Classifier:
    """The file, run by ONNX Runtime. The manifest isn't needed."""
    return open_session(path, num_threads=torch.get_num_threads())
