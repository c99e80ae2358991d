"""A whole export of a model trained on the digits, and each of its files run by others alone."""

import copy
import dataclasses
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import (
    confusion_matrix,
    f1_score,
    log_loss,
    precision_recall_fscore_support,
)
from torch import Tensor, nn
from torch.nn import functional

from trainer.backbones import build
from trainer.config import ConfigError, DataError, TrainConfig, TrainingDiverged
from trainer.data.dataset import ImageDataset, Split
from trainer.data.pictures import read_picture
from trainer.data.registry import load
from trainer.export import torchscript
from trainer.export.confusion import confusion_png
from trainer.export.folder import export_model, rehearse_export
from trainer.export.formats import DEFAULT_FORMATS, FORMATS, Format
from trainer.export.safetensors import rebuild
from trainer.export.snippets import TORCHSCRIPT

CONFIG = TrainConfig(backbone="smallcnn", dropout=0.1)
ABOUT = {"study": "digits", "trial": 3, "seeds": [0, 1], "versions": {"hpo": "0.1.0"}}

# Follows a program of the model card, in a process that knows nothing of this project.
CHECK = """
import sys
import numpy as np
data = np.load(sys.argv[1])
found = np.concatenate([classify(batch) for batch in np.split(data["images"], [1, 2, 9])])
assert not {"hpo", "trainer", "storage"} & set(sys.modules)
print(float((found == data["labels"]).mean()))
"""


def programs(card: Path) -> dict[str, str]:
    """The programs that a model card shows, by the headline they stand under."""
    text = card.read_text(encoding="utf-8")
    found = re.findall(r"^### (\S+)$.*?^```python$\n(.*?)^```$", text, flags=re.S | re.M)
    return dict(found)


def trained(data: ImageDataset) -> nn.Module:
    """A smallcnn after some hundred steps: good, but not right about each image."""
    model = build(CONFIG, input_size=data.input_size, num_classes=data.num_classes)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    mean, std = (torch.tensor(x).view(1, -1, 1, 1) for x in (data.mean, data.std))
    for _ in range(150):
        chosen = torch.randint(0, len(data.train), (64,), generator=generator)
        batch = data.train.take(chosen)
        loss = functional.cross_entropy(model((batch.images / 255 - mean) / std), batch.labels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return model


@pytest.fixture(scope="module")
def data() -> ImageDataset:
    return load("digits", seed=0)


@pytest.fixture(scope="module")
def test_split(data: ImageDataset) -> Split:
    return data.open_test()


@pytest.fixture(scope="module")
def model(data: ImageDataset) -> nn.Module:
    return trained(data)


@pytest.fixture(scope="module")
def exported(
    data: ImageDataset,
    model: nn.Module,
    test_split: Split,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, dict[str, Any]]:
    """The folder and the manifest that was returned."""
    out = tmp_path_factory.mktemp("export") / "digits"
    about = {**ABOUT, "plan": {"device": "cpu"}, "test_openings": 1}
    metrics = {"validation": {"accuracy": math.nan, "seconds": (1.0, 2)}}
    curves = {"trial 3 (validation accuracy)": [(0.25, 0.5), (1, 0.9)]}
    returned = export_model(
        model,
        config=CONFIG,
        data=data,
        test=test_split,
        out=out,
        about=about,
        metrics=metrics,
        curves=curves,
    )
    return out, returned


@pytest.fixture
def some_test(test_split: Split) -> Split:
    return test_split.take(range(5))


def read_json(path: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return values


def test_the_folder_holds_all_formats_manifest_metrics_card_and_pictures(
    exported: tuple[Path, dict[str, Any]],
) -> None:
    out, manifest = exported
    assert sorted(path.name for path in out.iterdir()) == [
        "confusion_matrix.png",
        "curves.png",
        "manifest.json",
        "metrics.json",
        "model.fp16.onnx",
        "model.int8.onnx",
        "model.onnx",
        "model.pt2",
        "model.safetensors",
        "model.ts.pt",
        "model_card.md",
        "network.py",
    ]
    assert [path.name for path in out.parent.iterdir()] == ["digits"]
    assert tuple(manifest["formats"]) == DEFAULT_FORMATS
    assert manifest["refused"] == {}


def test_the_manifest_says_all_that_is_needed_to_use_and_repeat_the_model(
    exported: tuple[Path, dict[str, Any]], data: ImageDataset
) -> None:
    out, returned = exported
    manifest = read_json(out / "manifest.json")
    assert manifest["made_by"] == "hpo"
    assert manifest["input_size"] == [1, 8, 8]
    assert manifest["class_names"] == [str(digit) for digit in range(10)]
    assert TrainConfig.from_dict(manifest["config"]) == CONFIG
    assert manifest["study"] == "digits"
    assert manifest["trial"] == 3
    assert manifest["seeds"] == [0, 1]
    assert manifest["plan"] == {"device": "cpu"}
    assert manifest["data"]["source"] == "digits"
    assert manifest["data"]["fingerprint"] == data.fingerprint
    assert sum(manifest["data"]["images"]["train"]) == len(data.train)
    assert manifest["data"]["images"]["test"][0] == 36
    assert manifest["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert {"python", "torchvision", "onnxruntime", "hpo"} <= set(manifest["versions"])
    assert manifest["safe_to_load"]["torch-export"].startswith("from people you trust")
    assert manifest["metrics"]["validation"] == {"accuracy": None, "seconds": [1.0, 2]}
    assert manifest["formats"] == returned["formats"]
    for name, entry in manifest["formats"].items():
        assert entry["file"] == FORMATS[name].file
        assert entry["bytes"] == (out / entry["file"]).stat().st_size
        accuracy = manifest["metrics"]["test"]["accuracy"]
        if FORMATS[name].exact:
            assert entry["max_abs_diff"] < 1e-4
            assert entry["accuracy"] == accuracy
        else:
            assert 1e-6 < entry["max_abs_diff"] < 2
            assert entry["accuracy"] >= accuracy - 0.01 - 1e-9
        assert 0 < entry["latency_ms_1"] < entry["latency_ms_32"] * 10
        assert entry["method"] in FORMATS[name].methods
    assert read_json(out / "metrics.json")["formats"] == manifest["formats"]
    small = manifest["formats"]["onnx-int8"]["bytes"]
    assert small < manifest["formats"]["onnx-fp16"]["bytes"] < manifest["formats"]["onnx"]["bytes"]


def test_the_metrics_are_those_of_scikit_learn(
    exported: tuple[Path, dict[str, Any]], data: ImageDataset, model: nn.Module, test_split: Split
) -> None:
    out, _ = exported
    mean, std = (torch.tensor(x).view(1, -1, 1, 1) for x in (data.mean, data.std))
    with torch.no_grad():
        model.eval()
        predicted = model((test_split.images / 255 - mean) / std).argmax(dim=1).numpy()
    labels = test_split.labels.numpy()
    tested = read_json(out / "metrics.json")["test"]
    assert 0.7 < tested["accuracy"] < 1.0
    assert tested["accuracy"] == pytest.approx((predicted == labels).mean())
    low, high = tested["ci95"]
    assert low < tested["accuracy"] < high
    assert tested["num_images"] == len(labels) == 359
    assert tested["confusion_matrix"] == confusion_matrix(labels, predicted).tolist()
    assert tested["macro_f1"] == pytest.approx(f1_score(labels, predicted, average="macro"))
    expected = precision_recall_fscore_support(labels, predicted, zero_division=0)
    for key, values in zip(("precision", "recall", "f1", "support"), expected, strict=True):
        assert [entry[key] for entry in tested["per_class"]] == pytest.approx(list(values))
    assert tested["macro_recall"] == pytest.approx(expected[1].mean())
    with torch.no_grad():
        probabilities = model((test_split.images / 255 - mean) / std).softmax(dim=1).numpy()
    loss = log_loss(labels, probabilities)
    assert tested["negative_log_likelihood"] == pytest.approx(loss, rel=1e-4)
    assert 0 < tested["expected_calibration_error"] < 0.5


@pytest.mark.parametrize("name", DEFAULT_FORMATS)
def test_the_card_s_program_gives_the_stated_accuracy_without_this_project(
    exported: tuple[Path, dict[str, Any]], test_split: Split, tmp_path: Path, name: str
) -> None:
    out, manifest = exported
    arrays = tmp_path / "test.npz"
    np.savez(arrays, images=test_split.images.numpy(), labels=test_split.labels.numpy())
    program = programs(out / "model_card.md")[name] + CHECK
    command = [sys.executable, "-I", "-W", "ignore", "-c", program, str(arrays)]
    done = subprocess.run(command, cwd=out, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    shown, accuracy = done.stdout.splitlines()
    assert shown.startswith("['")
    assert float(accuracy) == pytest.approx(manifest["formats"][name]["accuracy"])


def test_the_card_s_reading_of_a_picture_is_ours(
    exported: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    out, _ = exported
    pixels = np.random.default_rng(0).integers(0, 256, (30, 20, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    card = (out / "model_card.md").read_text(encoding="utf-8")
    program = card.partition("```python\n")[2].partition("```")[0]
    program += "import sys; sys.stdout.buffer.write(read(sys.argv[1]).tobytes())"
    command = [sys.executable, "-I", "-c", program, str(tmp_path / "photo.png")]
    done = subprocess.run(command, cwd=out, capture_output=True, check=True)
    expected = read_picture(tmp_path / "photo.png", input_size=(1, 8, 8))
    assert np.array_equal(np.frombuffer(done.stdout, np.uint8).reshape(1, 8, 8), expected)


def test_the_network_is_rebuilt_from_weights_and_manifest(
    exported: tuple[Path, dict[str, Any]], test_split: Split
) -> None:
    out, manifest = exported
    pretrained = {**manifest, "config": {**manifest["config"], "pretrained": True}}
    model = rebuild(out / "model.safetensors", pretrained)
    found = model(test_split.images).argmax(dim=1)
    accuracy = float((found == test_split.labels).double().mean())
    assert accuracy == pytest.approx(manifest["formats"]["safetensors"]["accuracy"])


@pytest.mark.parametrize("name", ["confusion_matrix.png", "curves.png"])
def test_the_pictures_can_be_shown(exported: tuple[Path, dict[str, Any]], name: str) -> None:
    out, _ = exported
    with Image.open(out / name) as picture:
        picture.load()
        assert picture.format == "PNG"
        assert min(picture.size) >= 300


@pytest.mark.parametrize(
    "class_names",
    [
        ["$x$", "$unbalanced"],
        ["猫", "\N{DOG FACE}", "new\nline"],
        ["x" * 300, "<b>", "\\frac{1}"],
        [f"class {number}" for number in range(300)],
    ],
    ids=["mathematics", "letters the font lacks", "long", "many"],
)
def test_any_class_names_can_be_drawn(class_names: list[str]) -> None:
    confusion = torch.zeros(len(class_names), len(class_names), dtype=torch.int64)
    confusion[0, 1] = 7
    assert confusion_png(confusion, class_names).startswith(b"\x89PNG")


def export_quickly(
    out: Path, data: ImageDataset, test: Split, model: nn.Module, *formats: str
) -> dict[str, Any]:
    return export_model(
        model,
        config=CONFIG,
        data=data,
        test=test,
        out=out,
        about=ABOUT,
        metrics={},
        formats=formats or ("torchscript", "safetensors"),
    )


def test_a_format_added_by_one_entry_of_the_registry_is_exported_and_its_program_runs(
    tmp_path: Path,
    data: ImageDataset,
    some_test: Split,
    model: nn.Module,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As CONTRIBUTING.md says."""
    added = Format(
        file="model.copy.pt",
        methods={"torch.jit.trace, copied": torchscript.to_bytes},
        load=torchscript.load,
        safe_to_load="from people you trust",
        program=TORCHSCRIPT,
    )
    monkeypatch.setitem(FORMATS, "copy", added)
    out = tmp_path / "out"
    rehearse_export(
        model, config=CONFIG, data=data, out=out, about=ABOUT, metrics={}, formats=["copy"]
    )
    assert os.listdir(tmp_path) == []
    manifest = export_quickly(out, data, some_test, model, "copy")
    arrays = tmp_path / "test.npz"
    np.savez(arrays, images=some_test.images.numpy(), labels=some_test.labels.numpy())
    program = programs(out / "model_card.md")["copy"] + CHECK.replace("[1, 2, 9]", "[1, 2]")
    command = [sys.executable, "-I", "-W", "ignore", "-c", program, str(arrays)]
    done = subprocess.run(command, cwd=out, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = float(done.stdout.splitlines()[-1])
    assert found == pytest.approx(manifest["formats"]["copy"]["accuracy"])


def test_what_would_end_an_export_ends_its_rehearsal(
    tmp_path: Path, data: ImageDataset, model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"

    def rehearse(model: nn.Module = model, **changed: Any) -> None:
        given: dict[str, Any] = {"data": data, "about": ABOUT, "formats": ["onnx"], **changed}
        rehearse_export(model, config=CONFIG, out=out, metrics={}, **given)

    rehearse()
    rehearse(formats=DEFAULT_FORMATS)
    broken = copy.deepcopy(model)
    with torch.no_grad():
        next(broken.parameters()).fill_(math.nan)
    with pytest.raises(TrainingDiverged, match="aren't finite"):
        rehearse(broken)
    with pytest.raises(ConfigError, match="unknown format"):
        rehearse(formats=["onxx"])
    with pytest.raises(TypeError, match="not JSON serializable"):
        rehearse(about={"study": object()})
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda _: types.SimpleNamespace(free=2**20))
        with pytest.raises(ConfigError, match=r"its disk has 1 MiB left: free as much, or give"):
            rehearse()
    assert os.listdir(tmp_path) == []
    out.touch()
    with pytest.raises(ConfigError, match="is a file"):
        rehearse()


def test_an_older_export_is_replaced_by_the_formats_of_the_new_one(
    tmp_path: Path, data: ImageDataset, some_test: Split, model: nn.Module
) -> None:
    out = tmp_path / "out"
    export_quickly(out, data, some_test, model, "torchscript")
    export_quickly(out, data, some_test, model, "safetensors")
    assert list(read_json(out / "manifest.json")["formats"]) == ["safetensors"]
    assert not (out / "model.ts.pt").exists()
    assert os.listdir(tmp_path) == ["out"]


def test_a_format_that_fails_is_refused_with_its_reason_and_the_others_stay(
    tmp_path: Path, data: ImageDataset, some_test: Split, model: nn.Module
) -> None:
    larger = dataclasses.replace(CONFIG, backbone="resnet8")
    manifest = export_model(
        model,
        config=larger,
        data=data,
        test=some_test,
        out=tmp_path / "out",
        about=ABOUT,
        metrics={},
        formats=("torchscript", "safetensors"),
    )
    assert list(manifest["formats"]) == ["torchscript"]
    assert "Missing key" in manifest["refused"]["safetensors"]
    assert len(manifest["refused"]["safetensors"].splitlines()) == 1
    assert not (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_model_that_knows_one_number_of_images_is_refused(
    tmp_path: Path, data: ImageDataset, some_test: Split
) -> None:
    class Rigid(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.reshape(int(x.shape[0]), 64)[:, :10]

    with pytest.raises(ConfigError, match="no format could be exported") as failure:
        export_quickly(tmp_path / "out", data, some_test, Rigid(), "torchscript", "onnx")
    assert "torchscript: its file doesn't run: RuntimeError" in str(failure.value)
    assert "onnx: it can't be written: UserError: Constraints violated" in str(failure.value)
    assert os.listdir(tmp_path) == []


def test_what_cannot_be_exported_is_said_in_one_line_and_leaves_nothing(
    tmp_path: Path, data: ImageDataset, some_test: Split, model: nn.Module
) -> None:
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match="unknown format 'onxx', did you mean onnx"):
        export_quickly(out, data, some_test, model, "onxx")
    with pytest.raises(DataError, match="no test images"):
        export_quickly(out, data, some_test.take([]), model)
    with pytest.raises(DataError, match="images of one data set must be"):
        export_quickly(out, data, Split(some_test.images[..., :7], some_test.labels), model)
    broken = build(CONFIG, input_size=data.input_size, num_classes=10)
    with torch.no_grad():
        next(broken.parameters()).fill_(math.nan)
    with pytest.raises(TrainingDiverged, match="logits aren't finite"):
        export_quickly(out, data, some_test, broken)
    (tmp_path / "precious").touch()
    with pytest.raises(ConfigError, match="no older export"):
        export_quickly(tmp_path, data, some_test, model)
    assert os.listdir(tmp_path) == ["precious"]


def test_exporting_changes_neither_the_model_nor_its_mode(
    tmp_path: Path, data: ImageDataset, some_test: Split, model: nn.Module
) -> None:
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    export_quickly(tmp_path / "out", data, some_test, model)
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize(
    "name", ["model.safetensors", "network.py", "curves.png", "metrics.json", "model_card.md"]
)
def test_a_full_disk_is_said_in_one_line_and_leaves_nothing(
    tmp_path: Path,
    data: ImageDataset,
    some_test: Split,
    model: nn.Module,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    write_bytes, write_text = Path.write_bytes, Path.write_text

    def on_a_full_disk(path: Path) -> Path:
        return Path("/dev/full") if path.name == name else path

    monkeypatch.setattr(
        Path, "write_bytes", lambda path, content: write_bytes(on_a_full_disk(path), content)
    )
    monkeypatch.setattr(
        Path,
        "write_text",
        lambda path, text, encoding: write_text(on_a_full_disk(path), text, encoding),
    )
    with pytest.raises(ConfigError, match="No space left on device"):
        export_model(
            model,
            config=CONFIG,
            data=data,
            test=some_test,
            out=tmp_path / "out",
            about=ABOUT,
            metrics={},
            formats=("safetensors",),
            curves={"retraining (training loss)": [(1, 0.5)]},
        )
    assert os.listdir(tmp_path) == []


@pytest.fixture
def killed_export(tmp_path: Path) -> Path:
    """The place of an export whose process was killed as its first file stood there."""
    out = tmp_path / "out"
    code = f"""
from pathlib import Path
from trainer.backbones import build
from trainer.config import TrainConfig
from trainer.data.pictures import read_picture
from trainer.data.registry import load
from trainer.export.folder import export_model
data = load("digits", seed=0)
config = TrainConfig(backbone="smallcnn")
model = build(config, input_size=data.input_size, num_classes=10)
export_model(model, config=config, data=data, test=data.open_test(), out=Path({str(out)!r}),
             about={{}}, metrics={{}})
"""
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    with subprocess.Popen([sys.executable, "-c", code], env=environment) as process:
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob(".out.partial-*/model.ts.pt")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    return out


def test_a_killed_export_leaves_no_folder_and_the_next_one_cleans_up(
    killed_export: Path, data: ImageDataset, some_test: Split, model: nn.Module
) -> None:
    assert not killed_export.exists()
    assert len(os.listdir(killed_export.parent)) == 1
    export_quickly(killed_export, data, some_test, model)
    assert os.listdir(killed_export.parent) == ["out"]
