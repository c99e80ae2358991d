"""The export folder: model files, each verified, manifest, metrics, and a picture of them."""

import json
import logging
import math
import platform
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from trainer.config import ConfigError, DataError, TrainConfig, TrainingDiverged, unknown_name
from trainer.data.dataset import ImageDataset, Split, check_split
from trainer.evaluate import confusion_matrix, macro_f1, macro_recall, per_class, wilson_interval
from trainer.export.confusion import confusion_png
from trainer.export.formats import FORMATS, Format
from trainer.export.model import ExportModel, as_classifier, example_images
from trainer.export.publish import MADE_BY, new_folder
from trainer.export.verify import ExportRefused, FormatCheck, classify_all, verify

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 1


def export_model(
    model: nn.Module,
    *,
    config: TrainConfig,
    data: ImageDataset,
    test: Split,
    out: Path,
    about: Mapping[str, Any],
    metrics: Mapping[str, Any],
    formats: Iterable[str] = tuple(FORMATS),
) -> dict[str, Any]:
    """Write the model to a folder that appears whole or not at all; its manifest is returned.

    data: what the model was trained on (with that mean and std). about: what else the manifest is
    to say (study, trial, seeds, plan; `versions` are added to). metrics: what is known beside the
    test. A format that can't be written, or whose file gives other logits than the model, is left
    out and stands with its reason under `refused`. The model itself isn't changed.

    Raises ConfigError if the folder can't be written or a format is unknown, DataError if the test
    split doesn't fit, TrainingDiverged if the model's logits aren't finite.
    """
    chosen = {name: _format(name) for name in formats}
    if not len(test):
        raise DataError(f"{data.name}: no test images to verify an export with")
    check_split(test, data.input_size, data.num_classes)
    exported = ExportModel(model, mean=data.mean, std=data.std)
    logits = classify_all(as_classifier(exported), test.images)
    if not bool(logits.isfinite().all()):
        raise TrainingDiverged("the model's logits aren't finite")
    confusion = confusion_matrix(logits, test.labels)
    tested = _test_metrics(confusion, data.class_names)
    manifest = _manifest(config, data, about, metrics, tested)
    with new_folder(out) as folder:
        _write_formats(folder, chosen, exported, manifest, test, logits)
        _write_json(folder / "manifest.json", manifest)
        _write_json(folder / "metrics.json", {**metrics, "test": tested})
        picture = confusion_png(confusion, data.class_names)
        (folder / "confusion_matrix.png").write_bytes(picture)
    return manifest


def _format(name: str) -> Format:
    if name not in FORMATS:
        raise ConfigError(unknown_name("format", name, FORMATS))
    return FORMATS[name]


def _write_formats(
    folder: Path,
    formats: Mapping[str, Format],
    model: ExportModel,
    manifest: dict[str, Any],
    test: Split,
    reference: Tensor,
) -> None:
    """Write and verify one file a format, and say in the manifest what came of it."""
    for name, fmt in formats.items():
        path = folder / fmt.file
        try:
            check = _write_format(path, fmt, model, manifest, test, reference)
        except ExportRefused as refusal:
            path.unlink(missing_ok=True)
            manifest["refused"][name] = str(refusal)
            logger.warning("no %s file: %s", name, refusal)
        else:
            manifest["formats"][name] = check.to_dict()
            manifest["safe_to_load"][name] = fmt.safe_to_load
    if not manifest["formats"]:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in manifest["refused"].items())
        raise RuntimeError(f"no format could be exported: {reasons}")


def _write_format(
    path: Path,
    fmt: Format,
    model: ExportModel,
    manifest: Mapping[str, Any],
    test: Split,
    reference: Tensor,
) -> FormatCheck:
    """Raises ExportRefused if there can be no such file; OSError if the disk is the reason."""
    try:
        content = fmt.to_bytes(model, example_images(manifest["input_size"]))
    except Exception as error:  # one exporter's fault is no reason to lose the other files
        logger.debug("the exporter of %s failed", path.name, exc_info=True)
        raise ExportRefused(f"it can't be written: {_one_line(error)}") from error
    path.write_bytes(content)
    try:
        return verify(path, fmt, manifest, test, reference)
    except ExportRefused:
        raise
    except Exception as error:
        logger.debug("%s doesn't run", path.name, exc_info=True)
        raise ExportRefused(f"its file doesn't run: {_one_line(error)}") from error


def _manifest(
    config: TrainConfig,
    data: ImageDataset,
    about: Mapping[str, Any],
    metrics: Mapping[str, Any],
    tested: Mapping[str, Any],
) -> dict[str, Any]:
    """The manifest, but for what is found out about each format."""
    summary = {name: tested[name] for name in _SUMMARY}
    own = {
        "made_by": MADE_BY,
        "schema_version": SCHEMA_VERSION,
        "input_size": list(data.input_size),
        "class_names": list(data.class_names),
        "config": config.to_dict(),
        "data": {"source": data.name, "fingerprint": data.fingerprint},
        "versions": _versions() | dict(about.get("versions", {})),
        "metrics": {**metrics, "test": summary},
    }
    others = {name: value for name, value in about.items() if name not in own}
    return {**own, **others, "formats": {}, "refused": {}, "safe_to_load": {}}


_SUMMARY = ("accuracy", "ci95", "num_images", "macro_recall", "macro_f1")


def _test_metrics(confusion: Tensor, class_names: Iterable[str]) -> dict[str, Any]:
    """What metrics.json says of the test. confusion: int64 (classes,classes)."""
    num_images, num_correct = int(confusion.sum()), int(confusion.trace())
    classes = [
        {
            "class": name,
            "precision": found.precision,
            "recall": found.recall,
            "f1": found.f1,
            "support": found.support,
        }
        for name, found in zip(class_names, per_class(confusion), strict=True)
    ]
    return {
        "accuracy": num_correct / num_images,
        "ci95": list(wilson_interval(num_correct, num_images)),
        "num_images": num_images,
        "macro_recall": macro_recall(confusion),
        "macro_f1": macro_f1(confusion),
        "per_class": classes,
        "confusion_matrix": confusion.tolist(),
    }


def _versions() -> dict[str, str]:
    packages = ("torch", "torchvision", "onnx", "onnxruntime", "safetensors")
    return {
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in packages},
    }


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    text = json.dumps(_plain(values), indent=2, ensure_ascii=False, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def _plain(value: Any) -> Any:
    """The value with null for what JSON has no word for: NaN and infinity."""
    if isinstance(value, Mapping):
        return {name: _plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
