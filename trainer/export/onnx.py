"""ONNX by way of torch.export, with a dynamic number of images: for any ONNX runtime."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.export.model import Classifier, ExportModel
from trainer.export.onnx_session import open_session


def to_bytes(model: ExportModel, example: Tensor) -> bytes:
    """The file's content, weights inside. example: uint8 (N,C,H,W), N >= 2."""
    program = torch.onnx.export(
        model,
        (example,),
        dynamo=True,
        verbose=False,
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("num_images")},),
    )
    assert program is not None
    for node in program.model.graph.all_nodes():
        # The names of source files on this machine are nobody else's business.
        node.metadata_props.clear()
    content: bytes = program.model_proto.SerializeToString()
    return content


def load(path: Path, _manifest: Mapping[str, Any]) -> Classifier:
    """The file, run by ONNX Runtime. The manifest isn't needed."""
    return open_session(path, num_threads=torch.get_num_threads())
