"""ONNX Runtime, imported so that it reports to nobody. Imports without torch.

Its official builds send events of their use to Microsoft, and keep an identifier of the machine in
the user's cache folder. One variable, read when the library is loaded, turns both off.
"""

import importlib
import os
from types import ModuleType
from typing import Any


def onnx_runtime(name: str = "") -> Any:
    """The package, or the module of this name in it. A user's own choice of the variable stays."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    module: ModuleType = importlib.import_module("onnxruntime" + (name and f".{name}"))
    return module
