"""The export folder: model files, each verified, manifest, metrics, and a picture of them."""

import json
import math
import platform
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from trainer.config import DataError, TrainConfig, TrainingDiverged
from trainer.data.dataset import ImageDataset, Split, check_split
from trainer.export import network
from trainer.export.card import model_card
from trainer.export.confusion import confusion_png
from trainer.export.curves import Curves, curves_png
from trainer.export.files import write_formats, write_network
from trainer.export.formats import DEFAULT_FORMATS, FORMATS, check_formats
from trainer.export.latency import Latency
from trainer.export.model import ExportModel, as_classifier
from trainer.export.publish import MADE_BY, check_room, new_folder, scratch_folder
from trainer.export.source import export_source
from trainer.export.tested import SUMMARY, final_metrics
from trainer.export.verify import DEFAULT_TOLERANCE, FormatCheck, classify_all

SCHEMA_VERSION = 1
_REHEARSED_IMAGES = 64
_ROOM_BYTES = 16 * 2**20
"""Of an export's pictures and texts, and of a format's graph beside its weights."""


def export_model(
    model: nn.Module,
    *,
    config: TrainConfig,
    data: ImageDataset,
    test: Split,
    out: Path,
    about: Mapping[str, Any],
    metrics: Mapping[str, Any],
    formats: Iterable[str] = DEFAULT_FORMATS,
    tolerance: float = DEFAULT_TOLERANCE,
    curves: Curves = MappingProxyType({}),
) -> dict[str, Any]:
    """Write the model to a folder that appears whole or not at all; its manifest is returned.

    data: what the model was trained on (with that mean and std). about: what else the manifest is
    to say (study, trial, seeds, plan; `versions` are added to); the model card tells of trial,
    candidates, search and averaging where they are there. metrics: what is known beside the test.
    tolerance: how much less accurate a format of reduced precision may be. A format that can't be
    written, or whose file isn't the model, is left out and stands with its reason under `refused`.
    The model itself isn't changed.

    Raises ConfigError if the folder can't be written or check_formats refuses the formats,
    DataError if the test split doesn't fit, TrainingDiverged if the model's logits aren't finite.
    """
    names = check_formats(formats)
    if not len(test):
        raise DataError(f"{data.name}: no test images to verify an export with")
    check_split(test, data.input_size, data.num_classes)
    exported = ExportModel(model, mean=data.mean, std=data.std)
    reference = _finite_logits(exported, test)
    tested = final_metrics(reference, test.labels, data.class_names)
    source = export_source(exported, data.train, seed=config.seed)
    manifest = _manifest(config, data, test, about, metrics, tested, tolerance)
    with new_folder(out) as folder:
        write_formats(folder, names, source, manifest, test, reference, tolerance)
        if "safetensors" in manifest["formats"]:
            written = write_network(folder, source, test, reference)
            manifest["formats"]["safetensors"]["network"] = network.FILE if written else None
        _describe(folder, manifest, metrics, tested, data.class_names, curves)
    return manifest


def rehearse_export(
    model: nn.Module,
    *,
    config: TrainConfig,
    data: ImageDataset,
    out: Path,
    about: Mapping[str, Any],
    metrics: Mapping[str, Any],
    formats: Iterable[str] = DEFAULT_FORMATS,
    tolerance: float = DEFAULT_TOLERANCE,
    curves: Curves = MappingProxyType({}),
) -> None:
    """Write all that export_model writes but the formats' files, of training images; keep nothing.

    What would end an export ends here, before the test split is opened for it. Raises what
    export_model raises, ConfigError if the disk has too little room.
    """
    names = check_formats(formats)
    exported = ExportModel(model, mean=data.mean, std=data.std)
    weights = sum(tensor.nbytes for tensor in exported.state_dict().values())
    check_room(out, _ROOM_BYTES + len(names) * weights)
    some = data.train.take(range(min(len(data.train), _REHEARSED_IMAGES)))
    tested = final_metrics(_finite_logits(exported, some), some.labels, data.class_names)
    manifest = _manifest(config, data, some, about, metrics, tested, tolerance)
    for name in names:
        latency = Latency(latency_ms_1=0.0, latency_ms_32=0.0, num_threads=1)
        check = FormatCheck(
            file=FORMATS[name].file, bytes=0, max_abs_diff=0.0, accuracy=0.0, latency=latency
        )
        method = next(iter(FORMATS[name].methods))
        entry = {**check.to_dict(), "method": method, "passed_over": {}, "network": network.FILE}
        manifest["formats"][name] = entry
        manifest["safe_to_load"][name] = FORMATS[name].safe_to_load
    with scratch_folder(out) as folder:
        _describe(folder, manifest, metrics, tested, data.class_names, curves)


def _finite_logits(exported: ExportModel, split: Split) -> torch.Tensor:
    """float32 (N,classes). Raises TrainingDiverged."""
    logits = classify_all(as_classifier(exported), split.images)
    if not bool(logits.isfinite().all()):
        raise TrainingDiverged("the model's logits aren't finite")
    return logits


def _describe(
    folder: Path,
    manifest: Mapping[str, Any],
    metrics: Mapping[str, Any],
    tested: Mapping[str, Any],
    class_names: Sequence[str],
    curves: Curves,
) -> None:
    """Write what an export holds beside its formats."""
    _write_pictures(folder, tested, class_names, curves)
    _write_json(folder / "manifest.json", manifest)
    described = {name: manifest[name] for name in ("formats", "refused", "tolerance")}
    _write_json(folder / "metrics.json", {**metrics, "test": tested, **described})
    card = model_card(manifest, tested, pictures=[path.name for path in folder.glob("*.png")])
    (folder / "model_card.md").write_text(card, encoding="utf-8")


def _write_pictures(
    folder: Path, tested: Mapping[str, Any], class_names: Sequence[str], curves: Curves
) -> None:
    confusion = torch.tensor(tested["confusion_matrix"])
    (folder / "confusion_matrix.png").write_bytes(confusion_png(confusion, class_names))
    if curves:
        (folder / "curves.png").write_bytes(curves_png(curves))


def _manifest(
    config: TrainConfig,
    data: ImageDataset,
    test: Split,
    about: Mapping[str, Any],
    metrics: Mapping[str, Any],
    tested: Mapping[str, Any],
    tolerance: float,
) -> dict[str, Any]:
    """The manifest, but for what is found out about each format."""
    counts = {"train": _counts(data.train, data.num_classes)}
    counts |= {"val": _counts(data.val, data.num_classes), "test": _counts(test, data.num_classes)}
    own = {
        "made_by": MADE_BY,
        "schema_version": SCHEMA_VERSION,
        "input_size": list(data.input_size),
        "class_names": list(data.class_names),
        # where its first weights lay on this machine is nobody else's business
        "config": {**config.to_dict(), "weights": Path(config.weights).name},
        "data": {"source": data.name, "fingerprint": data.fingerprint, "images": counts},
        "versions": _versions() | dict(about.get("versions", {})),
        "metrics": {**metrics, "test": {name: tested[name] for name in SUMMARY}},
        "tolerance": tolerance,
    }
    others = {name: value for name, value in about.items() if name not in own}
    return {**own, **others, "formats": {}, "refused": {}, "safe_to_load": {}}


def _counts(split: Split, num_classes: int) -> list[int]:
    """Images of each class."""
    return [int(count) for count in torch.bincount(split.labels, minlength=num_classes)]


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
