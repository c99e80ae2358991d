"""Programs that load an export's files without this project: the model card shows them.

Each stands alone, runs in the export folder, and defines `classify(images)`.
"""

from collections.abc import Sequence
from string import Template

ONNX = """\
import onnxruntime

session = onnxruntime.InferenceSession("$file", providers=["CPUExecutionProvider"])


def logits_of(images):
    return session.run(["logits"], {"images": images})[0]
"""

TORCHSCRIPT = """\
import torch

module = torch.jit.load("$file", map_location="cpu")


def logits_of(images):
    with torch.inference_mode():
        return module(torch.from_numpy(images)).numpy()
"""

TORCH_EXPORT = """\
import torch

module = torch.export.load("$file").module()


def logits_of(images):
    with torch.inference_mode():
        return module(torch.from_numpy(images)).numpy()
"""

SAFETENSORS = """\
import runpy

import torch
from safetensors.torch import load_file

tensors = load_file("$file")
network = runpy.run_path("network.py")


def logits_of(images):
    return network["classify"](tensors, torch.from_numpy(images)).numpy()
"""

TFLITE = """\
from ai_edge_litert.interpreter import Interpreter

interpreter = Interpreter(model_path="$file")
interpreter.allocate_tensors()
(images_at,) = interpreter.get_input_details()
(logits_at,) = interpreter.get_output_details()


def logits_of(images):
    rows = []
    for image in images:  # it takes one at a time
        interpreter.set_tensor(images_at["index"], image[None])
        interpreter.invoke()
        rows.append(interpreter.get_tensor(logits_at["index"]))
    return np.concatenate(rows)
"""

TENSORRT = """\
import tensorrt
import torch

runtime = tensorrt.Runtime(tensorrt.Logger(tensorrt.Logger.ERROR))
with open("$file", "rb") as file:
    context = runtime.deserialize_cuda_engine(file.read()).create_execution_context()


def logits_of(images):  # at most 256 in a call
    given = torch.from_numpy(images).cuda()
    logits = torch.empty(len(given), $num_classes, device="cuda")
    context.set_input_shape("images", tuple(given.shape))
    context.set_tensor_address("images", given.data_ptr())
    context.set_tensor_address("logits", logits.data_ptr())
    context.execute_async_v3(torch.cuda.current_stream().cuda_stream)
    return logits.cpu().numpy()
"""

_HEAD = """\
import json
from pathlib import Path

import numpy as np
"""

_TAIL = """

def classify(images):
    return logits_of(images).argmax(axis=1)


class_names = json.loads(Path("manifest.json").read_text(encoding="utf-8"))["class_names"]
images = np.zeros((1, $channels, $height, $width), dtype=np.uint8)  # yours
print([class_names[number] for number in classify(images)])
"""

_PICTURES = """\
import numpy as np
from PIL import Image


def read(path):
    picture = Image.open(path).convert("$mode")
    picture = picture.resize(($width, $height), Image.Resampling.BILINEAR)
    return np.asarray(picture).reshape($height, $width, $channels).transpose(2, 0, 1)
"""


def snippet(program: str, *, file: str, input_size: Sequence[int], num_classes: int) -> str:
    """The program for a file of a format.

    program: the format's part of it, which defines logits_of(images); $file and $num_classes stand
    for what they say. input_size: (C,H,W). Raises ValueError or KeyError for another $.
    """
    channels, height, width = input_size
    return Template(_HEAD + program + _TAIL).substitute(
        file=file, num_classes=num_classes, channels=channels, height=height, width=width
    )


def pictures_snippet(input_size: Sequence[int]) -> str:
    """A program that reads a picture file as the model takes it. input_size: (C,H,W)."""
    channels, height, width = input_size
    mode = "L" if channels == 1 else "RGB"
    return Template(_PICTURES).substitute(mode=mode, channels=channels, height=height, width=width)
