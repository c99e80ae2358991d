"""Each format gives the model's logits, for any number of images, and keeps secrets."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from trainer.backbones import build
from trainer.config import ConfigError, TrainConfig
from trainer.data.dataset import Split
from trainer.export import latency
from trainer.export import verify as verify_module
from trainer.export.formats import DEFAULT_FORMATS, FORMATS, Format
from trainer.export.model import ExportModel, as_classifier
from trainer.export.source import ExportSource, export_source
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


@pytest.mark.parametrize("num_images", [1, 2, 3, 5])
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
            methods={},
            load=lambda _path, _manifest: lambda _images: next(answers).numpy(),
            safe_to_load="",
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
