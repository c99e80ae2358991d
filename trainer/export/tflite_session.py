"""A .tflite file run by LiteRT's interpreter. Imports without torch."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from trainer.config import ConfigError
from trainer.export.extras import missing_extra
from trainer.reading import read_small

if TYPE_CHECKING:
    from trainer.export.model import Classifier

_LARGEST_BYTES = 2**31
"""The file format has no more."""


def open_tflite(path: Path, *, num_threads: int | None = None) -> "Classifier":
    """The model in this file, as a function of images, which it takes one by one.

    Raises ConfigError if the runtime is missing or the file is no model; the function raises it if
    the images don't fit.
    """
    try:
        from ai_edge_litert.interpreter import Interpreter
    except ImportError as error:
        raise ConfigError(missing_extra("tflite")) from error
    try:
        interpreter = Interpreter(
            model_content=read_small(path, _LARGEST_BYTES), num_threads=num_threads
        )
        interpreter.allocate_tensors()
        (images_at,) = interpreter.get_input_details()
        (logits_at,) = interpreter.get_output_details()
    except (OSError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"{path} is no TFLite model of ours: {reason}") from error
    size = tuple(int(side) for side in images_at["shape"][1:])

    def classify(images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        if images.shape[1:] != size:
            raise ConfigError(f"{path} takes images of {size}, not {images.shape[1:]}")
        rows = []
        for image in images:
            interpreter.set_tensor(images_at["index"], image[np.newaxis])
            interpreter.invoke()
            rows.append(interpreter.get_tensor(logits_at["index"]))
        logits: npt.NDArray[np.float32] = np.concatenate(rows)
        return logits

    return classify
