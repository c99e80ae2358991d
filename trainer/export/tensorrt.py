"""TensorRT: an engine built from the ONNX file, for NVIDIA GPUs like the one that built it.

Covered by tests marked `gpu` only: it needs the package and a GPU.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from trainer.export.model import Classifier
from trainer.export.source import ExportSource

_MOST_IMAGES = 256
"""Of one call of the engine; its memory is laid out for that."""
_USUAL_IMAGES = 32


def to_bytes(source: ExportSource) -> bytes:
    """The serialized engine. Raises ValueError if TensorRT doesn't take the graph."""
    import tensorrt

    logger = tensorrt.Logger(tensorrt.Logger.ERROR)
    builder = tensorrt.Builder(logger)
    network = builder.create_network()
    parser = tensorrt.OnnxParser(network, logger)
    if not parser.parse(source.onnx):
        raise ValueError(str(parser.get_error(0)))
    size = tuple(source.example.shape[1:])
    profile = builder.create_optimization_profile()
    profile.set_shape("images", (1, *size), (_USUAL_IMAGES, *size), (_MOST_IMAGES, *size))
    config = builder.create_builder_config()
    config.add_optimization_profile(profile)
    # TF32 rounds to 10 bits, and the logits would differ from the model's.
    config.clear_flag(tensorrt.BuilderFlag.TF32)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise ValueError("TensorRT can't build an engine of this graph")
    return bytes(engine)


def load(path: Path, manifest: Mapping[str, Any]) -> Classifier:
    """The engine on the first GPU. The manifest says how many classes there are."""
    import tensorrt

    runtime = tensorrt.Runtime(tensorrt.Logger(tensorrt.Logger.ERROR))
    engine = runtime.deserialize_cuda_engine(path.read_bytes())
    if engine is None:
        raise ValueError("it is no engine for this GPU and this version of TensorRT")
    context = engine.create_execution_context()
    num_classes = len(manifest["class_names"])

    def classify(images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        logits = []
        for batch in torch.split(torch.from_numpy(images), _MOST_IMAGES):
            given = batch.cuda().contiguous()
            found = torch.empty(len(batch), num_classes, device="cuda")
            context.set_input_shape("images", tuple(given.shape))
            context.set_tensor_address("images", given.data_ptr())
            context.set_tensor_address("logits", found.data_ptr())
            stream = torch.cuda.current_stream()
            if not context.execute_async_v3(stream.cuda_stream):
                raise RuntimeError("the engine didn't run")
            logits.append(found.cpu())
        answer: npt.NDArray[np.float32] = torch.cat(logits).numpy()
        return answer

    return classify
