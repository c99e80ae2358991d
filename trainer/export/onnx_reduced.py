"""The ONNX file with smaller numbers: float16, or integers of 8 bits.

Both are made by ONNX Runtime's own tools from the float32 file. Weights only, the way out where
activations don't bear 8 bits, is ours: those tools have no such mode for convolutions.
"""

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch

from trainer.export.onnx_runtime import onnx_runtime
from trainer.export.source import ExportSource

_CALIBRATION_BATCH = 64
_QUANTIZED = ("Add", "Clip", "Conv", "Gemm", "GlobalAveragePool", "MatMul", "MaxPool", "Relu")
"""Where the time goes, and what lies between: the rest stays in float32."""
_INT8_LARGEST = 127


@contextmanager
def _unchanged_path() -> Iterator[None]:
    """Leaves sys.path as it was: ONNX Runtime's tools find each other there, by bare names."""
    before = list(sys.path)
    sys.path.append(str(Path(onnx_runtime("transformers").__file__).parent))
    try:
        yield
    finally:
        sys.path[:] = before


@_unchanged_path()
def float16(source: ExportSource) -> bytes:
    """Weights and arithmetic in float16; images stay uint8, logits float32.

    Normalisation can't overflow: no normalised pixel is larger than 255, for std >= 1/255.
    """
    tool = onnx_runtime("transformers.float16")
    model = tool.convert_float_to_float16(onnx.load_from_string(source.onnx), keep_io_types=True)
    onnx.checker.check_model(model)
    content: bytes = model.SerializeToString()
    return content


@_unchanged_path()
def int8_static(source: ExportSource) -> bytes:
    """Weights (a scale for each channel) and activations in 8 bits, as QuantizeLinear pairs.

    The activations' ranges are those on the calibration images. Weights take 7 bits: with 8, sums
    saturate on processors without VNNI, and the file would be another model there than here.
    """
    quantization = onnx_runtime("quantization")
    prepare = onnx_runtime("quantization.shape_inference").quant_pre_process

    reader: Any = quantization.CalibrationDataReader

    class Images(reader):  # type: ignore[misc]  # it ships no types
        def __init__(self) -> None:
            self._batches = iter(torch.split(source.calibration, _CALIBRATION_BATCH))

        def get_next(self) -> dict[str, npt.NDArray[np.uint8]] | None:
            batch = next(self._batches, None)
            return None if batch is None else {"images": batch.contiguous().numpy()}

    with tempfile.TemporaryDirectory(prefix="hpo-int8-") as folder:
        plain, prepared, quantized = (Path(folder, f"{n}.onnx") for n in ("plain", "prep", "int8"))
        plain.write_bytes(source.onnx)
        prepare(plain, prepared, skip_symbolic_shape=True)
        quantization.quantize_static(
            prepared,
            quantized,
            Images(),
            quant_format=quantization.QuantFormat.QDQ,
            op_types_to_quantize=list(_QUANTIZED),
            per_channel=True,
            reduce_range=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            # The logits are the last Gemm's: rounded to 8 bits, classes would tie.
            extra_options={"OpTypesToExcludeOutputQuantization": ["Gemm", "MatMul"]},
        )
        return _tidied(onnx.load(quantized))


def int8_weights(source: ExportSource) -> bytes:
    """Weights of convolutions and linear layers in 8 bits, arithmetic in float32.

    Symmetric, a scale for each output channel: |error| <= its largest weight / 254.
    """
    model = onnx.load_from_string(source.onnx)
    channel_axes = dict(_weights(model))
    if not channel_axes:
        raise ValueError("no layer has weights to quantize")
    for tensor in list(model.graph.initializer):
        if tensor.name in channel_axes:
            model.graph.initializer.remove(tensor)
            _quantize(model.graph, tensor, channel_axes[tensor.name])
    onnx.checker.check_model(model)
    return _tidied(model)


def _weights(model: Any) -> Iterator[tuple[str, int]]:
    """Each float weight that only convolutions and linear layers use, with its channel axis."""
    large = {
        tensor.name
        for tensor in model.graph.initializer
        if tensor.data_type == onnx.TensorProto.FLOAT and len(tensor.dims) >= 2
    }
    for node in model.graph.node:
        if node.op_type in ("Conv", "Gemm", "MatMul") and node.input[1] in large:
            transposed = any(part.name == "transB" and part.i for part in node.attribute)
            channels_first = node.op_type == "Conv" or transposed
            rank = next(len(t.dims) for t in model.graph.initializer if t.name == node.input[1])
            yield node.input[1], 0 if channels_first else rank - 1


def _quantize(graph: Any, tensor: Any, axis: int) -> None:
    """Put the weight into the graph as int8 numbers and a DequantizeLinear of the same name."""
    values = onnx.numpy_helper.to_array(tensor)
    others = tuple(other for other in range(values.ndim) if other != axis)
    largest = np.abs(values).max(axis=others, keepdims=True)
    scale = np.where(largest > 0, largest / _INT8_LARGEST, 1).astype(np.float32)
    rounded = np.rint(values / scale).clip(-_INT8_LARGEST, _INT8_LARGEST).astype(np.int8)
    names = [f"{tensor.name}_int8", f"{tensor.name}_scale"]
    graph.initializer.append(onnx.numpy_helper.from_array(rounded, names[0]))
    graph.initializer.append(onnx.numpy_helper.from_array(scale.reshape(-1), names[1]))
    node = onnx.helper.make_node("DequantizeLinear", names, [tensor.name], axis=axis)
    graph.node.insert(0, node)


def _tidied(model: Any) -> bytes:
    """The file's content, without domains that no node uses."""
    used = {node.domain for node in model.graph.node}
    kept = [opset for opset in model.opset_import if opset.domain in used]
    del model.opset_import[:]
    model.opset_import.extend(kept)
    content: bytes = model.SerializeToString()
    return content
