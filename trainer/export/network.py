"""The network as text: a Python file that needs torch and nothing of this project."""

import keyword
import re

from torch.export.graph_signature import InputKind

from trainer.export.source import ExportSource

FILE = "network.py"

_HEAD = '''\
"""The network of model.safetensors, in plain torch operations. Made by torch.export.

    logits = network.classify(safetensors.torch.load_file("model.safetensors"), images)
"""

import torch
from torch import device, inf, nan

'''
_TAIL = '''

TENSORS = (
{names}
)


def classify(tensors: dict[str, torch.Tensor], images: torch.Tensor) -> torch.Tensor:
    """images: uint8 (N,C,H,W). Logits, float32 (N,classes)."""
    with torch.inference_mode():
        return forward(None, *(tensors[name] for name in TENSORS), images)[0]
'''


def network_source(source: ExportSource) -> str:
    """The file's text. Raises ValueError if the graph holds tensors that are no weights."""
    names = []
    for spec in source.program.graph_signature.input_specs:
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
            assert spec.target is not None
            names.append(spec.target)
        elif spec.kind != InputKind.USER_INPUT:
            raise ValueError(f"{spec.target} is no weight")
    listed = "\n".join(f"    {_quoted(name)}," for name in names)
    code = re.sub(r";  [\w = ]+ = None$", "", source.program.graph_module.code, flags=re.M)
    return _HEAD + code.strip() + "\n" + _TAIL.format(names=listed)


def _quoted(name: str) -> str:
    """A tensor's name as a literal: names of modules, so nothing but words and dots."""
    words = name.split(".")
    if not all(re.fullmatch(r"\w+", word) and not keyword.iskeyword(word) for word in words):
        raise ValueError(f"{name!r} is no tensor's name")
    return f'"{name}"'
