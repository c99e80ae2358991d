"""An ONNX file run by ONNX Runtime on the CPU. Imports without torch."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from trainer.config import ConfigError
from trainer.export.onnx_runtime import onnx_runtime
from trainer.reading import check_regular, is_utf8

if TYPE_CHECKING:
    from trainer.export.model import Classifier

_ERRORS_ONLY = 3


def open_session(path: Path, *, num_threads: int = 0) -> "Classifier":
    """The model in this file, as a function of images. num_threads: 0 is one a core.

    Raises ConfigError if the file is no model; the function raises it if the images don't fit.
    """
    onnxruntime = onnx_runtime()
    onnxruntime.set_default_logger_severity(_ERRORS_ONLY)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads
    options.log_severity_level = _ERRORS_ONLY
    try:
        check_regular(path)
        session = onnxruntime.InferenceSession(
            # given a path, ONNX Runtime takes it for UTF-8
            path if is_utf8(path) else path.read_bytes(),
            sess_options=options,
            providers=["CPUExecutionProvider"],
        )
        (images_name,) = [node.name for node in session.get_inputs()]
        logits_name = session.get_outputs()[0].name
    except Exception as error:  # ONNX Runtime's own have no base class of theirs
        raise ConfigError(f"{path} is no ONNX model of ours: {_first_line(error)}") from error

    def classify(images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        try:
            logits: npt.NDArray[np.float32] = session.run([logits_name], {images_name: images})[0]
        except Exception as error:
            raise ConfigError(f"{path} doesn't take the images: {_first_line(error)}") from error
        return logits

    return classify


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__
