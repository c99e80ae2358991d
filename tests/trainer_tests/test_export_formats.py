"""Each format gives the model's logits, for any number of images, and keeps secrets."""

import dataclasses
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from trainer.backbones import build
from trainer.config import ConfigError, TrainConfig
from trainer.data.dataset import Split
from trainer.export import extras, latency
from trainer.export import verify as verify_module
from trainer.export.formats import DEFAULT_FORMATS, FORMATS, Format, check_formats
from trainer.export.model import ExportModel, as_classifier
from trainer.export.onnx_session import open_session
from trainer.export.source import ExportSource, calibration_images, export_source
from trainer.export.verify import ExportRefused, classify_all, verify

SIZE = (3, 9, 12)
CONFIG = TrainConfig(backbone="smallcnn", dropout=0.5, pretrained=True)
MANIFEST: dict[str, Any] = {
    "config": CONFIG.to_dict(),
    "input_size": list(SIZE),
    "class_names": ["cat", "dog", "fish", "bird"],
}
RAGGED = 2 * 256 + 10


def a_model(seed: int = 0) -> ExportModel:
    """A smallcnn whose batch norms have seen images, so that their statistics matter."""
    config = TrainConfig(backbone="smallcnn", dropout=0.5, seed=seed)
    backbone = build(config, input_size=SIZE, num_classes=4)
    backbone(torch.randn(64, *SIZE, generator=torch.Generator().manual_seed(seed)))
    return ExportModel(backbone, mean=(0.2, 0.4, 0.6), std=(0.1, 0.2, 0.3))


def some_images(num_images: int, size: tuple[int, int, int] = SIZE) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randint(0, 256, (num_images, *size), dtype=torch.uint8, generator=generator)


def a_split(model: ExportModel, num_images: int = RAGGED) -> tuple[Split, Tensor]:
    """Images with the model's own answers as labels, and its logits."""
    images = some_images(num_images)
    logits = model(images)
    return Split(images, logits.argmax(dim=1)), logits


@pytest.fixture(autouse=True)
def short_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is measured here needn't be exact."""
    monkeypatch.setattr(latency, "_SECONDS", 0.01)


@pytest.fixture(scope="module")
def source() -> ExportSource:
    """A model, traced and converted once for all tests."""
    images = some_images(200)
    train = Split(images, torch.arange(200) % 4)
    return export_source(a_model(), train, seed=0)


@pytest.fixture(scope="module")
def model(source: ExportSource) -> ExportModel:
    return source.model


WAYS = [(name, method) for name in DEFAULT_FORMATS for method in FORMATS[name].methods]


@pytest.fixture(scope="module")
def contents(source: ExportSource) -> dict[tuple[str, str], bytes]:
    """Each format's file, made by each of its methods."""
    return {(name, method): FORMATS[name].methods[method](source) for name, method in WAYS}


@pytest.fixture(params=WAYS, ids=[f"{name}: {method}" for name, method in WAYS])
def way(request: pytest.FixtureRequest) -> tuple[str, str]:
    chosen: tuple[str, str] = request.param
    return chosen


@pytest.fixture
def name(way: tuple[str, str]) -> str:
    return way[0]


@pytest.fixture
def file(way: tuple[str, str], contents: dict[tuple[str, str], bytes], tmp_path: Path) -> Path:
    path = tmp_path / FORMATS[way[0]].file
    path.write_bytes(contents[way])
    return path


def test_a_file_takes_any_number_of_raw_images(name: str, file: Path, model: ExportModel) -> None:
    classify = FORMATS[name].load(file, MANIFEST)
    for num_images in (1, 2, 3, 7, 300):
        images = some_images(num_images)
        logits, expected = classify(images.numpy()), model(images).numpy()
        assert logits.dtype == np.float32
        assert logits.shape == (num_images, 4)
        if FORMATS[name].exact:
            np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)
        else:
            assert np.abs(logits - expected).max() < 0.1 * np.abs(expected).max()


def test_verification_states_size_difference_accuracy_and_latency(
    name: str, file: Path, model: ExportModel
) -> None:
    split, logits = a_split(model)
    wrong = split.labels.clone()
    wrong[::2] = (wrong[::2] + 1) % 4
    test = Split(split.images, wrong)
    check = verify(file, FORMATS[name], MANIFEST, test, logits, tolerance=0.2)
    assert check.file == file.name
    assert check.bytes == file.stat().st_size > 0
    if FORMATS[name].exact:
        assert 0 <= check.max_abs_diff < 1e-4
        assert check.accuracy == 0.5
    else:
        assert check.max_abs_diff > 1e-6
        assert check.accuracy == pytest.approx(0.5, abs=0.2)
    values = check.to_dict()
    assert set(values) == {
        *("file", "bytes", "max_abs_diff", "accuracy"),
        *("latency_ms_1", "latency_ms_32", "num_threads"),
    }
    assert 0 < values["latency_ms_1"]
    assert 0 < values["latency_ms_32"]
    assert values["num_threads"] == torch.get_num_threads()


def test_a_file_of_another_model_is_refused(name: str, file: Path) -> None:
    split, logits = a_split(a_model(seed=1))
    reason = r"differs from the model by \d\S* in a logit"
    if not FORMATS[name].exact:
        reason = r"its accuracy is 0\.\d+ where the model's is 1\.0000: it loses 0\.\d+, more than"
    with pytest.raises(ExportRefused, match=reason):
        verify(file, FORMATS[name], MANIFEST, split, logits)


@pytest.mark.parametrize("num_images", [1, 5])
def test_verification_works_with_few_images(
    name: str, file: Path, model: ExportModel, num_images: int
) -> None:
    split, logits = a_split(model, num_images)
    check = verify(file, FORMATS[name], MANIFEST, split, logits, tolerance=1)
    assert check.accuracy == 1.0 or not FORMATS[name].exact


def test_exporting_is_silent_and_leaves_random_state_and_path(
    capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    model = a_model()
    before, path_before = torch.get_rng_state(), list(sys.path)
    source = export_source(model, Split(some_images(9), torch.arange(9) % 4), seed=0)
    for name, method in WAYS:
        path = tmp_path / FORMATS[name].file
        path.write_bytes(FORMATS[name].methods[method](source))
        FORMATS[name].load(path, MANIFEST)(some_images(2).numpy())
    assert torch.equal(torch.get_rng_state(), before)
    assert sys.path == path_before
    assert capfd.readouterr() == ("", "")


WITH_ONNX_RUNTIME = """
import sys
from types import SimpleNamespace
import torch
from trainer.export import onnx_reduced
from trainer.export.onnx_session import open_session
use, file = sys.argv[1:]
if use == "open":
    open_session(file)
else:
    source = SimpleNamespace(
        onnx=open(file, "rb").read(), calibration=torch.zeros(2, 3, 9, 12, dtype=torch.uint8)
    )
    getattr(onnx_reduced, use)(source)
"""


@pytest.mark.parametrize("use", ["open", "float16", "int8_static", "int8_weights"])
def test_onnx_runtime_reports_to_nobody_and_leaves_no_identifier_in_the_user_s_home(
    use: str, source: ExportSource, tmp_path: Path
) -> None:
    file, home = tmp_path / "model.onnx", tmp_path / "home"
    file.write_bytes(source.onnx)
    home.mkdir()
    ours = {name: value for name, value in os.environ.items() if not name.startswith("XDG_")}
    ours.pop("ORT_DISABLE_TELEMETRY", None)
    done = subprocess.run(
        [sys.executable, "-c", WITH_ONNX_RUNTIME, use, str(file)],
        capture_output=True,
        text=True,
        env={**ours, "HOME": str(home)},
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert [path.name for path in home.rglob("*")] == []


def test_onnx_runtime_is_imported_in_one_place() -> None:
    root = Path(verify_module.__file__ or "").parents[2]
    modules = [
        path for part in ("hpo", "trainer", "storage") for path in (root / part).rglob("*.py")
    ]
    importing = re.compile(r"^ +(import|from) onnxruntime", re.MULTILINE)
    assert [path.name for path in modules if importing.search(path.read_text())] == []


def test_a_file_names_no_source_file_of_the_machine_that_made_it(name: str, file: Path) -> None:
    if name == "torchscript":  # torch writes them itself
        return
    content = file.read_bytes()
    for module in (verify_module, nn):
        assert str(Path(module.__file__ or "").parent).encode() not in content


def test_other_shapes_and_not_a_number_are_refused(model: ExportModel, tmp_path: Path) -> None:
    split, logits = a_split(model, 5)
    path = tmp_path / "file"
    path.touch()

    def check(answer: Tensor) -> None:
        answers = iter([answer[:1], answer[1:3], answer[3:]])
        fmt = Format(
            file="file",
            methods={"nothing": lambda _source: b""},
            load=lambda _path, _manifest: lambda _images: next(answers, answer).numpy(),
            safe_to_load="",
            program=FORMATS["onnx"].program,
        )
        verify(path, fmt, MANIFEST, split, logits)

    check(logits)
    with pytest.raises(ExportRefused, match=r"gives torch.float32 \(5, 3\) where .* \(5, 4\)"):
        check(logits[:, :3])
    with pytest.raises(ExportRefused, match=r"gives torch.float64"):
        check(logits.double())
    with pytest.raises(ExportRefused, match=r"differs from the model by nan"):
        check(logits * torch.nan)


def test_a_broken_onnx_file_is_answered_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    for content in (b"", b"no model", b"\0" * 1000):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=r"is no ONNX model") as refusal:
            FORMATS["onnx"].load(path, MANIFEST)
        assert len(str(refusal.value).splitlines()) == 1


def test_an_onnx_file_in_a_folder_whose_name_is_no_utf_8_is_opened(
    source: ExportSource, model: ExportModel, tmp_path: Path
) -> None:
    moved = tmp_path / os.fsdecode(b"caf\xe9")
    moved.mkdir()
    (moved / "model.onnx").write_bytes(source.onnx)
    images = some_images(3)
    logits = open_session(moved / "model.onnx")(images.numpy())
    assert np.allclose(logits, model(images).detach().numpy(), atol=1e-4)


def test_onnx_images_of_another_size_are_refused(
    contents: dict[tuple[str, str], bytes], tmp_path: Path
) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(contents["onnx", "torch.onnx.export"])
    with pytest.raises(ConfigError, match="doesn't take the images"):
        FORMATS["onnx"].load(path, MANIFEST)(some_images(2, (3, 5, 5)).numpy())


def test_the_model_is_normalised_frozen_and_the_original_untouched() -> None:
    backbone = nn.Sequential(nn.Flatten(), nn.Dropout(0.9)).to(torch.float64).train()
    exported = ExportModel(backbone, mean=(0.5, 0.25), std=(0.5, 0.125))
    images = torch.tensor([0, 255], dtype=torch.uint8).view(1, 2, 1, 1)
    assert exported(images).tolist() == [[-1.0, 6.0]]
    assert not exported.backbone.training
    assert backbone.training
    exported.train()


def test_weights_are_copied_to_float32_in_plain_memory_order() -> None:
    backbone = nn.Conv2d(4, 5, 3).to(torch.float64).to(memory_format=torch.channels_last)
    exported = ExportModel(backbone, mean=(0.0,) * 4, std=(1.0,) * 4)
    (weight, _bias) = exported.parameters()
    assert weight.dtype == torch.float32
    assert weight.is_contiguous()
    assert not weight.requires_grad
    assert backbone.weight.dtype == torch.float64
    assert backbone.weight.requires_grad


def test_all_images_are_classified_in_their_order(model: ExportModel) -> None:
    sizes: list[int] = []
    classify = as_classifier(model)

    def counting(images: Any) -> Any:
        sizes.append(len(images))
        return classify(images)

    images = some_images(RAGGED)
    torch.testing.assert_close(classify_all(counting, images), model(images))
    assert sizes == [1, 2, 256, 256, 7]


def tensors(content: bytes) -> dict[str, Any]:
    """What an ONNX file holds, by name."""
    graph = onnx.load_from_string(content).graph
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}


def test_float16_holds_no_float32_and_takes_and_gives_what_the_model_does(
    contents: dict[tuple[str, str], bytes],
) -> None:
    content = contents["onnx-fp16", "weights and arithmetic in float16"]
    assert {array.dtype for array in tensors(content).values()} <= {np.dtype("f2"), np.dtype("i8")}
    graph = onnx.load_from_string(content).graph
    types = [value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)]
    assert types == [onnx.TensorProto.UINT8, onnx.TensorProto.FLOAT]


def test_float16_normalises_the_darkest_and_brightest_images_without_overflow(
    tmp_path: Path,
) -> None:
    std = 1 / 255  # the least that a data set can have
    backbone = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = ExportModel(backbone, mean=(0.0, 0.5, 1.0), std=(std, std, std))
    source = export_source(model, Split(some_images(4), torch.arange(4)), seed=0)
    path = tmp_path / "model.onnx"
    (to_bytes,) = FORMATS["onnx-fp16"].methods.values()
    path.write_bytes(to_bytes(source))
    extremes = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, *SIZE)
    found = FORMATS["onnx-fp16"].load(path, MANIFEST)(extremes.contiguous().numpy())
    np.testing.assert_allclose(found, model(extremes).numpy(), atol=0.2)


def test_weights_in_8_bits_lose_at_most_half_a_step_of_their_channel(
    contents: dict[tuple[str, str], bytes],
) -> None:
    exact = tensors(contents["onnx", "torch.onnx.export"])
    found = tensors(contents["onnx-int8", "weights only: arithmetic in float32"])
    quantized = {name.removesuffix("_int8") for name in found if name.endswith("_int8")}
    assert quantized == {
        name for name, array in exact.items() if array.ndim >= 2 and array.size > 9
    }
    for name in quantized:
        weights, integers, scale = exact[name], found[f"{name}_int8"], found[f"{name}_scale"]
        assert integers.dtype == np.int8
        assert scale.shape == weights.shape[:1]
        steps = scale.reshape(-1, *[1] * (weights.ndim - 1))
        assert np.abs(integers * steps - weights).max() <= steps.max() / 2 * 1.001
        assert (np.abs(weights - integers * steps) <= steps / 2 * 1.001).all()


def test_static_8_bits_quantize_weights_by_channel_and_activations_too(
    contents: dict[tuple[str, str], bytes],
) -> None:
    content = contents["onnx-int8", "static: weights and activations in 8 bits"]
    nodes = [node.op_type for node in onnx.load_from_string(content).graph.node]
    assert nodes.count("QuantizeLinear") >= 3
    assert nodes[-1] != "DequantizeLinear", "logits aren't rounded to 8 bits"
    weights = [array for array in tensors(content).values() if array.dtype == np.int8]
    assert max(int(np.abs(array.astype(int)).max()) for array in weights) <= 64
    assert any(array.ndim == 1 and array.dtype == np.float32 for array in tensors(content).values())


def test_calibration_images_are_taken_fairly_over_classes() -> None:
    images = torch.arange(100, dtype=torch.uint8).view(100, 1, 1, 1)
    labels = torch.tensor([0] * 80 + [1] * 15 + [3] * 5)
    train = Split(images, labels)
    chosen = calibration_images(train, seed=0, most=24).flatten()
    assert torch.bincount(labels[chosen.long()], minlength=4).tolist() == [10, 9, 0, 5]
    assert len(set(chosen.tolist())) == 24
    assert torch.equal(chosen, calibration_images(train, seed=0, most=24).flatten())
    assert not torch.equal(chosen, calibration_images(train, seed=1, most=24).flatten())
    assert len(calibration_images(train, seed=0)) == 100


def test_a_slow_file_is_run_twice_for_each_size_of_batch() -> None:
    sizes: list[int] = []

    def slow(images: Any) -> Any:
        sizes.append(len(images))
        time.sleep(0.02)

    found = latency.measure(slow, some_images(5))
    assert sizes == [1, 1, 32, 32]
    assert found.latency_ms_1 >= 20
    assert found.latency_ms_32 >= 20


def test_a_reduced_format_may_lose_as_much_as_the_tolerance_says(tmp_path: Path) -> None:
    logits = torch.eye(4).repeat(25, 1)
    split = Split(some_images(100), torch.arange(100) % 4)
    worse = logits.clone()
    worse[:3] = worse[:3].roll(1, dims=1)
    path = tmp_path / "file"
    path.touch()

    def check(answer: Tensor, tolerance: float) -> float:
        answers = iter(answer.split([1, 2, 97]))  # type: ignore[no-untyped-call]
        fmt = Format(
            file="file",
            methods={"nothing": lambda _source: b""},
            load=lambda _path, _manifest: lambda _images: next(answers, answer).numpy(),
            safe_to_load="",
            program=FORMATS["onnx"].program,
            exact=False,
        )
        return verify(path, fmt, MANIFEST, split, logits, tolerance=tolerance).accuracy

    assert check(worse, 0.03) == 0.97
    with pytest.raises(
        ExportRefused, match=r"0\.9700 where the model's is 1\.0000: it loses 0\.03"
    ):
        check(worse, 0.02)
    with pytest.raises(ExportRefused, match="aren't finite"):
        check(worse * torch.nan, 1)


def test_formats_are_checked_before_anything_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_formats(["onnx", "torchscript", "onnx"]) == ("onnx", "torchscript")
    assert check_formats(DEFAULT_FORMATS) == DEFAULT_FORMATS
    with pytest.raises(ConfigError, match="unknown format 'onnx-int9', did you mean onnx-int8"):
        check_formats(["onnx", "onnx-int9"])
    with pytest.raises(ConfigError, match="no format is named"):
        check_formats([])
    absent = dataclasses.replace(FORMATS["tflite"], modules=("a_package_that_is_nowhere",))
    monkeypatch.setitem(FORMATS, "tflite", absent)
    with pytest.raises(ConfigError, match=r"needs the extra tflite, .* pip install 'hpo-vision\["):
        check_formats(["onnx", "tflite"])


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"methods": {}}, "has no method"),
        ({"file": "manifest.json"}, "can't be called 'manifest.json'"),
        ({"file": "below/model.pt"}, "can't be called 'below/model.pt'"),
        ({"extra": "tflite"}, "an extra has modules"),
        ({"modules": ("somewhere",)}, "an extra has modules"),
        ({"program": "module = load('$file', $five)"}, "five"),
        ({"program": "costs 5 $ each"}, "Invalid placeholder"),
    ],
)
def test_a_format_is_whole_or_is_none(fields: dict[str, Any], said: str) -> None:
    with pytest.raises((ValueError, KeyError), match=said):
        dataclasses.replace(FORMATS["torchscript"], **fields)


def test_each_format_has_a_file_of_its_own() -> None:
    assert len({fmt.file for fmt in FORMATS.values()}) == len(FORMATS)


def test_tensorrt_needs_its_package_and_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    absent = dataclasses.replace(FORMATS["tensorrt"], modules=("a_package_that_is_nowhere",))
    monkeypatch.setitem(FORMATS, "tensorrt", absent)
    with pytest.raises(ConfigError, match="needs the extra tensorrt"):
        check_formats(["tensorrt"])
    there = dataclasses.replace(FORMATS["tensorrt"], modules=("torch",))
    monkeypatch.setitem(FORMATS, "tensorrt", there)
    with pytest.raises(ConfigError, match="needs an NVIDIA GPU, and torch finds none"):
        check_formats(["tensorrt"])


def test_tflite_is_made_where_its_extra_is_installed_and_refused_elsewhere(
    source: ExportSource, model: ExportModel, tmp_path: Path
) -> None:
    """It has an environment of its own: tests/hpo_tests/data holds a file that was made there."""
    if extras.is_missing(FORMATS["tflite"].modules):
        with pytest.raises(ConfigError, match="the format tflite needs the extra tflite"):
            check_formats(["tflite"])
        return
    path = tmp_path / FORMATS["tflite"].file
    (to_bytes,) = FORMATS["tflite"].methods.values()
    path.write_bytes(to_bytes(source))
    split, logits = a_split(model, 20)
    assert verify(path, FORMATS["tflite"], MANIFEST, split, logits).accuracy == 1.0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_tensorrt_engine_gives_the_model_s_logits(
    source: ExportSource, model: ExportModel, tmp_path: Path
) -> None:
    assert check_formats(["tensorrt"]) == ("tensorrt",), "install the extra tensorrt"
    path = tmp_path / FORMATS["tensorrt"].file
    (to_bytes,) = FORMATS["tensorrt"].methods.values()
    path.write_bytes(to_bytes(source))
    split, logits = a_split(model)
    assert verify(path, FORMATS["tensorrt"], MANIFEST, split, logits).max_abs_diff < 1e-2
