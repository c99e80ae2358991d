"""The model card's sections about the files: what was measured, how to load them, whom to trust."""

from collections.abc import Mapping
from typing import Any

from trainer.export.card_text import safe, share, table
from trainer.export.formats import FORMATS
from trainer.export.snippets import pictures_snippet, snippet

_COLUMNS = (
    "format",
    "file",
    "bytes",
    "largest difference of a logit",
    "test accuracy",
    "ms, batch of 1",
    "ms, batch of 32",
    "threads",
    "made by",
)


def format_table(manifest: Mapping[str, Any]) -> str:
    """What was measured of each file, and what there is no file of."""
    rows = (
        (
            name,
            f"`{entry['file']}`",
            f"{entry['bytes']:,}",
            f"{entry['max_abs_diff']:.1e}",
            share(entry["accuracy"]),
            f"{entry['latency_ms_1']:.3g}",
            f"{entry['latency_ms_32']:.3g}",
            entry["num_threads"],
            entry["method"],
        )
        for name, entry in manifest["formats"].items()
    )
    lines = [
        "## Files",
        "Each was loaded again by its own runtime and run on all test images. Milliseconds are "
        "medians for a batch of 1 and of 32, on the machine that made the export. Files of reduced "
        f"precision may lose {manifest['tolerance']:g} of accuracy.",
        table(
            _COLUMNS,
            rows,
        ),
    ]
    passed_over = [
        f"- {name} isn't made by “{safe(method)}”: {safe(why, longest=400)}"
        for name, entry in manifest["formats"].items()
        for method, why in entry["passed_over"].items()
    ]
    refused = [
        f"- no {name}: {safe(why, longest=400)}" for name, why in manifest["refused"].items()
    ]
    lines.append("\n".join(passed_over + refused))
    if "tensorrt" not in manifest["formats"]:
        lines.append("TensorRT was not run: no engine was made.")
    return "\n\n".join(line for line in lines if line)


def loading(manifest: Mapping[str, Any]) -> str:
    """A program for each file."""
    size = manifest["input_size"]
    lines = [
        "## Loading",
        "Each program runs in this folder, without the project that made it. `hpo predict` needs "
        "ONNX Runtime and Pillow only, and reads transparent, rotated and 16-bit pictures as well.",
        "A picture as the model takes it:",
        _code(pictures_snippet(size)),
    ]
    for name, entry in manifest["formats"].items():
        lines.append(f"### {name}")
        if name == "safetensors" and entry["network"] is None:
            lines.append(
                "The weights alone: the network is that of `trainer.backbones.build` with the "
                "configuration in `manifest.json`; this file can't be run without it."
            )
            continue
        if name == "safetensors":
            lines.append(
                "The weights are numbers; `network.py` is the network, a program of plain torch "
                "operations: read it before you run one that comes from somebody else."
            )
        num_classes, program = len(manifest["class_names"]), FORMATS[name].program
        lines.append(
            _code(snippet(program, file=entry["file"], input_size=size, num_classes=num_classes))
        )
    return "\n\n".join(lines)


def _code(text: str) -> str:
    return f"```python\n{text.rstrip()}\n```"


def safety(manifest: Mapping[str, Any]) -> str:
    """Which of the files one may take from a stranger."""
    rows = (
        (f"`{manifest['formats'][n]['file']}`", why) for n, why in manifest["safe_to_load"].items()
    )
    return "\n\n".join(
        [
            "## Safe to load?",
            "Files of this kind that come from a stranger: safetensors and ONNX are safe, .pt2 and "
            "TorchScript are not.",
            table(("file", "safe from strangers"), rows),
        ]
    )
