"""Each format gives the model's logits, for any number of images, and keeps secrets."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from trainer.backbones import build
from trainer.config import ConfigError, TrainConfig
from trainer.data.dataset import Split
from trainer.export import verify as verify_module
from trainer.export.formats import FORMATS, Format
from trainer.export.model import ExportModel, as_classifier, example_images
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


@pytest.fixture(scope="module")
def model() -> ExportModel:
    return a_model()


@pytest.fixture(scope="module")
def contents(model: ExportModel) -> dict[str, bytes]:
    """Each format's file, made once."""
    return {name: fmt.to_bytes(model, example_images(SIZE)) for name, fmt in FORMATS.items()}


@pytest.fixture(params=FORMATS)
def name(request: pytest.FixtureRequest) -> str:
    chosen: str = request.param
    return chosen


@pytest.fixture
def file(name: str, contents: dict[str, bytes], tmp_path: Path) -> Path:
    path = tmp_path / FORMATS[name].file
    path.write_bytes(contents[name])
    return path


@pytest.mark.parametrize("num_images", [1, 2, 3, 7, 300])
def test_a_file_takes_any_number_of_raw_images(
    name: str, file: Path, model: ExportModel, num_images: int
) -> None:
    classify = FORMATS[name].load(file, MANIFEST)
    images = some_images(num_images)
    logits = classify(images.numpy())
    assert logits.dtype == np.float32
    assert logits.shape == (num_images, 4)
    np.testing.assert_allclose(logits, model(images).numpy(), rtol=1e-4, atol=1e-5)


def test_verification_states_size_difference_and_accuracy(
    name: str, file: Path, model: ExportModel
) -> None:
    split, logits = a_split(model)
    wrong = split.labels.clone()
    wrong[::2] = (wrong[::2] + 1) % 4
    check = verify(file, FORMATS[name], MANIFEST, Split(split.images, wrong), logits)
    assert check.file == file.name
    assert check.bytes == file.stat().st_size > 0
    assert 0 <= check.max_abs_diff < 1e-4
    assert check.accuracy == 0.5
    assert set(check.to_dict()) == {"file", "bytes", "max_abs_diff", "accuracy"}


def test_a_file_of_another_model_is_refused(name: str, file: Path) -> None:
    split, logits = a_split(a_model(seed=1))
    with pytest.raises(ExportRefused, match=r"differs from the model by \d\S* in a logit"):
        verify(file, FORMATS[name], MANIFEST, split, logits)


@pytest.mark.parametrize("num_images", [1, 2, 3, 5])
def test_verification_works_with_few_images(
    name: str, file: Path, model: ExportModel, num_images: int
) -> None:
    split, logits = a_split(model, num_images)
    assert verify(file, FORMATS[name], MANIFEST, split, logits).accuracy == 1.0


def test_exporting_is_silent_and_leaves_the_random_state(
    name: str, model: ExportModel, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    before = torch.get_rng_state()
    path = tmp_path / FORMATS[name].file
    path.write_bytes(FORMATS[name].to_bytes(model, example_images(SIZE)))
    FORMATS[name].load(path, MANIFEST)(some_images(2).numpy())
    assert torch.equal(torch.get_rng_state(), before)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["onnx", "torch-export"], indirect=True)
def test_a_file_names_no_source_file_of_the_machine_that_made_it(file: Path) -> None:
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
            to_bytes=lambda _model, _example: b"",
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
    contents: dict[str, bytes], tmp_path: Path
) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(contents["onnx"])
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
