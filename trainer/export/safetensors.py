"""safetensors: the weights alone; the network is rebuilt from the manifest's config."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import nn

from trainer.backbones import build
from trainer.config import TrainConfig
from trainer.export.model import Classifier, ExportModel, as_classifier
from trainer.export.source import ExportSource


def to_bytes(source: ExportSource) -> bytes:
    """The file's content: ExportModel's tensors by name."""
    return _saved(source.model)


def weights_to_bytes(model: nn.Module, *, mean: Sequence[float], std: Sequence[float]) -> bytes:
    """The file's content for a network that is no classifier: weights to start from."""
    return _saved(ExportModel(model, mean=mean, std=std))


def _saved(model: ExportModel) -> bytes:
    # A tensor that stands in two places is refused by safetensors unless it is copied.
    return safetensors.torch.save(
        {name: tensor.clone() for name, tensor in model.state_dict().items()}
    )


def load(path: Path, manifest: Mapping[str, Any]) -> Classifier:
    """The file's weights in the network that the manifest describes, run by PyTorch."""
    return as_classifier(rebuild(path, manifest))


def rebuild(path: Path, manifest: Mapping[str, Any]) -> ExportModel:
    """The model of this file. manifest: needs config, input_size and class_names."""
    tensors = safetensors.torch.load_file(path)
    # Published weights would be downloaded only to be replaced.
    config = TrainConfig.from_dict(manifest["config"]).from_scratch()
    channels, height, width = manifest["input_size"]
    num_classes = len(manifest["class_names"])
    backbone = build(config, input_size=(channels, height, width), num_classes=num_classes)
    model = ExportModel(backbone, mean=[0.0] * channels, std=[1.0] * channels)
    model.load_state_dict(tensors)
    return model
