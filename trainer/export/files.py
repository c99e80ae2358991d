"""The model files of an export, each verified: what doesn't hold is refused with its reason."""

import logging
import runpy
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from trainer.config import ConfigError
from trainer.data.dataset import Split
from trainer.export import network
from trainer.export.formats import FORMATS, Format
from trainer.export.model import Classifier, as_classifier
from trainer.export.source import ExportSource
from trainer.export.verify import ExportRefused, check_logits, classify_all, verify

logger = logging.getLogger(__name__)

_NETWORK_IMAGES = 64


def write_formats(
    folder: Path,
    names: Iterable[str],
    source: ExportSource,
    manifest: dict[str, Any],
    test: Split,
    reference: Tensor,
    tolerance: float,
) -> None:
    """Write and verify one file a format, and say in the manifest what came of it.

    Raises ConfigError if there is none that holds, OSError if the disk is the reason.
    """
    for name in names:
        fmt = FORMATS[name]
        try:
            entry = _write_format(
                folder / fmt.file, fmt, source, manifest, test, reference, tolerance
            )
        except ExportRefused as refusal:
            manifest["refused"][name] = str(refusal)
            logger.warning("no %s file: %s", name, refusal)
        else:
            manifest["formats"][name] = entry
            manifest["safe_to_load"][name] = fmt.safe_to_load
    if not manifest["formats"]:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in manifest["refused"].items())
        raise ConfigError(f"no format could be exported: {reasons}")


def write_network(folder: Path, source: ExportSource, test: Split, reference: Tensor) -> bool:
    """Write the text of the network whose weights model.safetensors holds, if it can be written.

    It is run, and compared with the model on some images. Raises OSError if the disk is the reason.
    """
    path = folder / network.FILE
    try:
        text = network.network_source(source)
    except Exception as error:
        logger.warning("no %s: %s", path.name, _one_line(error))
        return False
    path.write_text(text, encoding="utf-8")
    try:
        some = slice(0, _NETWORK_IMAGES)
        found = classify_all(_run_network(folder), test.images[some])
        check_logits(found, reference[some])
    except Exception as error:
        path.unlink()
        logger.warning("no %s: %s", path.name, _one_line(error))
        return False
    return True


def _run_network(folder: Path) -> Classifier:
    classify = runpy.run_path(str(folder / network.FILE))["classify"]
    tensors = safetensors.torch.load_file(folder / FORMATS["safetensors"].file)

    def module(images: Tensor) -> Tensor:
        logits: Tensor = classify(tensors, images)
        return logits

    return as_classifier(module)


def _write_format(
    path: Path,
    fmt: Format,
    source: ExportSource,
    manifest: Mapping[str, Any],
    test: Split,
    reference: Tensor,
    tolerance: float,
) -> dict[str, Any]:
    """The format's entry in the manifest, with the first method whose file holds.

    Raises ExportRefused, without a file, if there is none; OSError if the disk is the reason.
    """
    passed_over: dict[str, str] = {}
    for method, to_bytes in fmt.methods.items():
        try:
            _write(path, to_bytes, source)
            check = _checked(path, fmt, manifest, test, reference, tolerance)
        except ExportRefused as refusal:
            path.unlink(missing_ok=True)
            passed_over[method] = str(refusal)
        else:
            return {**check, "method": method, "passed_over": passed_over}
    if len(passed_over) == 1:
        raise ExportRefused(*passed_over.values())
    raise ExportRefused("; ".join(f"{method}: {why}" for method, why in passed_over.items()))


def _write(path: Path, to_bytes: Callable[[ExportSource], bytes], source: ExportSource) -> None:
    try:
        content = to_bytes(source)
    except Exception as error:  # one exporter's fault is no reason to lose the other files
        logger.debug("the exporter of %s failed", path.name, exc_info=True)
        raise ExportRefused(f"it can't be written: {_one_line(error)}") from error
    path.write_bytes(content)


def _checked(
    path: Path,
    fmt: Format,
    manifest: Mapping[str, Any],
    test: Split,
    reference: Tensor,
    tolerance: float,
) -> dict[str, Any]:
    try:
        return verify(path, fmt, manifest, test, reference, tolerance=tolerance).to_dict()
    except ExportRefused:
        raise
    except Exception as error:
        logger.debug("%s doesn't run", path.name, exc_info=True)
        raise ExportRefused(f"its file doesn't run: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
