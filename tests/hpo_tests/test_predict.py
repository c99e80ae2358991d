"""Pictures are classified by an export folder alone."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from hpo.predict import predict
from trainer.config import ConfigError, DataError, TrainConfig
from trainer.data.dataset import ImageDataset, Split
from trainer.data.pictures import read_picture
from trainer.export.folder import export_model

CLASSES = ("dark", "bright", "猫")


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """Linear in the 8x8 gray pixels, with random weights, so that no class is rare."""
    linear = nn.Linear(64, 3, bias=False)
    with torch.no_grad():
        linear.weight.normal_(std=0.02, generator=torch.Generator().manual_seed(1))
    return nn.Sequential(nn.Flatten(), linear)


@pytest.fixture(scope="module")
def export_dir(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as ONNX only."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (12, 1, 8, 8), dtype=torch.uint8, generator=generator)
    split = Split(images, torch.arange(12) % 3)
    data = ImageDataset(
        name="blobs",
        train=split,
        val=split.take([]),
        class_names=CLASSES,
        mean=(0.5,),
        std=(0.05,),
        fingerprint="0" * 64,
        flips=False,
        open_test=lambda: split,
    )
    out = tmp_path_factory.mktemp("predict") / "out"
    export_model(
        model,
        config=TrainConfig(),
        data=data,
        test=split,
        out=out,
        about={},
        metrics={},
        formats=("onnx",),
    )
    return out


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """More pictures than go into one batch, each of its own noise."""
    folder = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    paths = []
    for number in range(70):
        pixels = generator.integers(0, 256, (8, 8), dtype=np.uint8)
        paths.append(folder / f"{number}.png")
        Image.fromarray(pixels).save(paths[-1])
    return paths


def test_each_picture_gets_the_model_s_class_and_probability(
    model: nn.Module, export_dir: Path, pictures: list[Path]
) -> None:
    arrays = np.stack([read_picture(path, input_size=(1, 8, 8)) for path in pictures])
    expected = model((torch.from_numpy(arrays) / 255 - 0.5) / 0.05).softmax(dim=1).detach()
    predictions = predict(export_dir, pictures)
    assert [prediction.file for prediction in predictions] == [str(path) for path in pictures]
    assert {prediction.class_ for prediction in predictions} == set(CLASSES)
    for prediction, row in zip(predictions, expected, strict=True):
        assert prediction.class_ == CLASSES[int(row.argmax())]
        assert prediction.probability == pytest.approx(float(row.max()), abs=1e-5)
        assert set(prediction.to_dict()) == {"file", "class", "probability"}


def test_large_colour_pictures_are_brought_to_the_model_s_size(
    export_dir: Path, tmp_path: Path
) -> None:
    path = tmp_path / "large.jpg"
    Image.new("RGB", (300, 200), "orange").save(path)
    (prediction,) = predict(export_dir, [path])
    assert prediction.class_ in CLASSES
    assert 0 < prediction.probability <= 1


def test_no_pictures_are_no_predictions(export_dir: Path) -> None:
    assert predict(export_dir, []) == []


def test_predicting_imports_no_torch(export_dir: Path, pictures: list[Path]) -> None:
    code = f"""
import sys
from pathlib import Path
from hpo.predict import predict
predictions = predict(Path({str(export_dir)!r}), [Path({str(pictures[0])!r})])
assert len(predictions) == 1
assert "torch" not in sys.modules and "matplotlib" not in sys.modules
"""
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_file_that_is_no_picture_is_said_in_one_line(
    export_dir: Path, pictures: list[Path], tmp_path: Path
) -> None:
    text = tmp_path / "text.png"
    text.write_text("no picture")
    for path in (text, tmp_path / "missing.png", tmp_path):
        with pytest.raises(DataError) as refusal:
            predict(export_dir, [pictures[0], path])
        assert str(path) in str(refusal.value)
        assert len(str(refusal.value).splitlines()) == 1


def changed(export_dir: Path, tmp_path: Path, **values: Any) -> Path:
    """A copy of the export with other values in its manifest; None takes one out."""
    copy = tmp_path / "copy"
    shutil.copytree(export_dir, copy)
    manifest = json.loads((copy / "manifest.json").read_text(encoding="utf-8"))
    manifest.update(values)
    kept = {name: value for name, value in manifest.items() if value is not None}
    (copy / "manifest.json").write_text(json.dumps(kept), encoding="utf-8")
    return copy


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"formats": {}}, "has no ONNX file"),
        ({"formats": None}, "is no manifest of an export"),
        ({"formats": []}, "is no manifest of an export"),
        ({"formats": {"onnx": "model.onnx"}}, "is no manifest of an export"),
        ({"formats": {"onnx": {"file": "missing.onnx"}}}, "missing.onnx is no ONNX model"),
        ({"formats": {"onnx": {"file": "manifest.json"}}}, "is no ONNX model"),
        ({"formats": {"onnx": {"file": "../copy/model.onnx"}}}, "can't have onnx file"),
        ({"formats": {"onnx": {"file": "/etc/passwd"}}}, "can't have onnx file"),
        ({"formats": {"onnx": {"file": ".."}}}, "can't have onnx file"),
        ({"formats": {"onnx": {"file": 3}}}, "is no manifest of an export"),
        ({"input_size": [1, 8]}, "is no manifest of an export"),
        ({"input_size": [1, 8, 9]}, "doesn't take the images"),
        ({"input_size": [1, 8, -8]}, "can't have input_size"),
        ({"input_size": [1, 8, 10**9]}, "can't have input_size"),
        ({"class_names": ["one", "two"]}, "names 2 classes, the model knows 3"),
        ({"class_names": [1, 2, 3]}, "can't have class_names"),
        ({"class_names": None}, "is no manifest of an export"),
    ],
)
def test_an_export_that_is_not_whole_is_said_in_one_line(
    export_dir: Path, pictures: list[Path], tmp_path: Path, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as refusal:
        predict(changed(export_dir, tmp_path, **values), pictures[:1])
    assert len(str(refusal.value).splitlines()) == 1


@pytest.mark.parametrize("manifest", [None, "", "[]", "no json", "\udcff", "[" * 9999])
def test_a_folder_without_our_manifest_is_no_export(
    pictures: list[Path], tmp_path: Path, manifest: str | None
) -> None:
    if manifest is not None:
        text = manifest.encode("utf-8", "surrogateescape")
        (tmp_path / "manifest.json").write_bytes(text)
    with pytest.raises(ConfigError, match=r"is no (export|manifest)") as refusal:
        predict(tmp_path, pictures[:1])
    assert len(str(refusal.value).splitlines()) == 1
