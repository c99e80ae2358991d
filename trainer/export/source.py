"""ExportSource: what the exporters draw on, each costly part made once."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.export import ExportedProgram

from trainer.data.dataset import Split
from trainer.export.model import ExportModel, example_images

_MOST_CALIBRATION_IMAGES = 512


@dataclass(frozen=True, kw_only=True, eq=False)
class ExportSource:
    """A model and the images that it is traced and calibrated with."""

    model: ExportModel
    example: Tensor
    """uint8 (2,C,H,W), to trace the model with."""
    calibration: Tensor
    """uint8 (N,C,H,W), N >= 1, of the training split: they show which values occur."""

    @cached_property
    def program(self) -> ExportedProgram:
        """torch.export's graph, with a dynamic number of images."""
        shapes = ({0: torch.export.Dim("num_images")},)
        program = torch.export.export(self.model, (self.example,), dynamic_shapes=shapes)
        for node in program.graph.nodes:
            # The names of source files on this machine are nobody else's business.
            node.meta.pop("stack_trace", None)
        return program

    @cached_property
    def onnx(self) -> bytes:
        """The ONNX file in float32."""
        return _to_onnx(self.program, self.example)


def _to_onnx(program: ExportedProgram, example: Tensor) -> bytes:
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


def export_source(model: ExportModel, train: Split, *, seed: int) -> ExportSource:
    """The source of a model that takes images like these; a seed chooses the calibration images."""
    chosen = calibration_images(train, seed=seed)
    return ExportSource(
        model=model, example=example_images(train.images.shape[1:]), calibration=chosen
    )


def calibration_images(train: Split, *, seed: int, most: int = _MOST_CALIBRATION_IMAGES) -> Tensor:
    """At most so many images, uint8 (N,C,H,W): as many of each class as there are, in turn."""
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(len(train), generator=generator)
    labels = train.labels[shuffled]
    turn = torch.empty(len(train), dtype=torch.int64)
    for label in range(int(labels.max()) + 1):
        mine = labels == label
        turn[mine] = torch.arange(int(mine.sum()))
    return train.images[shuffled[turn.argsort(stable=True)[:most]]]
