"""Pictures are classified by an export folder alone."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from torch import nn

from hpo.predict import predict
from tests.parts import Hpo
from trainer.config import ConfigError, DataError, TrainConfig
from trainer.data.dataset import ImageDataset, Split
from trainer.data.pictures import read_picture
from trainer.export.folder import export_model
from trainer.export.publish import check_out
from trainer.export.snippets import TFLITE, snippet

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
    """The model as ONNX in three precisions, and as TFLite."""
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
        formats=("onnx", "onnx-fp16", "onnx-int8"),
        tolerance=1,
    )
    # The converter installs beside another torch only: what it made of this model lies here.
    shutil.copy(Path(__file__).parent / "data" / "linear.tflite", out / "model.tflite")
    manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    manifest["formats"]["tflite"] = {"file": "model.tflite"}
    (out / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
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


@pytest.mark.parametrize("name", ["onnx", "onnx-fp16", "onnx-int8", "tflite"])
def test_each_picture_gets_the_model_s_class_and_probability(
    model: nn.Module, export_dir: Path, pictures: list[Path], name: str
) -> None:
    arrays = np.stack([read_picture(path, input_size=(1, 8, 8)) for path in pictures])
    expected = model((torch.from_numpy(arrays) / 255 - 0.5) / 0.05).softmax(dim=1).detach()
    predictions = predict(export_dir, pictures, file_format=name)
    assert [prediction.file for prediction in predictions] == [str(path) for path in pictures]
    assert {prediction.class_ for prediction in predictions} == set(CLASSES)
    exact = name in ("onnx", "tflite")
    for prediction, row in zip(predictions, expected, strict=True):
        top = row.sort(descending=True).values
        if exact or top[0] - top[1] > 0.2:
            assert prediction.class_ == CLASSES[int(row.argmax())]
        assert prediction.probability == pytest.approx(float(row.max()), abs=1e-5 if exact else 0.1)
        assert set(prediction.to_dict()) == {"file", "class", "probability"}


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "I;16", "EXIF", "animated"]
)
def test_pictures_of_every_mode_and_size_are_classified(
    export_dir: Path, tmp_path: Path, mode: str
) -> None:
    """A bright half beside a dark one, however it is written, is the same picture."""
    halves = Image.new("L", (40, 24), 0)
    halves.paste(255, (0, 0, 20, 24))
    plain = tmp_path / "plain.png"
    halves.save(plain)
    path = tmp_path / ("picture.tif" if mode in ("CMYK", "PA", "I;16") else "picture.png")
    if mode == "I;16":
        Image.fromarray(np.asarray(halves, dtype=np.uint16) * 257).save(path)
    elif mode == "EXIF":
        exif = Image.Exif()
        exif[0x0112] = 3  # upside down
        halves.transpose(Image.Transpose.ROTATE_180).save(path, exif=exif)
    elif mode == "animated":
        path = tmp_path / "picture.gif"
        halves.save(path, save_all=True, append_images=[Image.new("L", (40, 24), 90)])
    elif mode == "PA":
        halves.convert("RGBA").save(path)
    else:
        halves.convert("RGB").convert(mode).save(path)
    expected, found = predict(export_dir, [plain, path])
    assert found.class_ == expected.class_
    assert found.probability == pytest.approx(expected.probability, abs=1e-3)


def test_a_folder_is_read_to_the_bottom_in_the_order_of_names(
    export_dir: Path, pictures: list[Path], tmp_path: Path
) -> None:
    (tmp_path / "b").mkdir()
    for number, name in enumerate(("c.png", "b/2.png", "b/1.PNG", "a.png", "b/without-suffix")):
        shutil.copy(pictures[number], tmp_path / name)
    (tmp_path / "b" / "notes.txt").write_text("no picture")
    (tmp_path / "b" / "torn.png").write_bytes(pictures[0].read_bytes()[:40])
    said: list[str] = []
    found = predict(export_dir, [tmp_path, pictures[9]], say=said.append)
    expected = ["a.png", "b/1.PNG", "b/2.png", "b/without-suffix", "c.png"]
    assert [p.file for p in found] == [*(str(tmp_path / x) for x in expected), str(pictures[9])]
    assert len(said) == 2
    assert said[0].startswith(f"passed over: {tmp_path / 'b' / 'notes.txt'}: not a picture")
    assert "torn.png" in said[1]


def test_a_folder_without_pictures_is_said(export_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no pictures in this folder"):
        predict(export_dir, [tmp_path])


@pytest.mark.parametrize("name", ["onxx", "torchscript", "tensorrt", ""])
def test_a_format_that_predict_can_not_run_is_answered_with_those_it_can(
    export_dir: Path, pictures: list[Path], name: str
) -> None:
    with pytest.raises(ConfigError, match="it has: onnx, onnx-fp16, onnx-int8, tflite") as refusal:
        predict(export_dir, pictures[:1], file_format=name)
    assert len(str(refusal.value).splitlines()) == 1


@pytest.fixture
def another(export_dir: Path, tmp_path: Path) -> Path:
    """A copy of the export, to be spoilt."""
    return Path(shutil.copytree(export_dir, tmp_path / "export"))


def refused_in_one_line(export: Path, picture: Path, file_format: str = "onnx") -> str:
    with pytest.raises(ConfigError) as refusal:
        predict(export, [picture], file_format=file_format)
    assert len(str(refusal.value).splitlines()) == 1
    assert len(str(refusal.value)) < 500
    return str(refusal.value)


@pytest.mark.parametrize("name", ["manifest.json", "model.onnx", "model.tflite"])
def test_an_export_s_file_that_has_no_end_or_never_begins_is_refused_at_once(
    another: Path, pictures: list[Path], name: str
) -> None:
    file_format = "tflite" if name.endswith("tflite") else "onnx"
    (another / name).unlink()
    os.mkfifo(another / name)
    assert "no regular file" in refused_in_one_line(another, pictures[0], file_format)
    (another / name).unlink()
    (another / name).symlink_to("/dev/zero")
    assert "no regular file" in refused_in_one_line(another, pictures[0], file_format)
    if name == "manifest.json":
        # an export of ours that is to be replaced is looked at, too
        with pytest.raises(ConfigError, match="isn't empty and is no older export"):
            check_out(another)


@pytest.mark.parametrize(
    "changed",
    [
        {"class_names": "猫dx"},
        {"class_names": [1, 2, 3]},
        {"class_names": {"a": 1, "b": 2, "c": 3}},
        {"class_names": ["x" * 10**6]},
        {"input_size": [4096, 4096, 4096]},
        {"input_size": [1, 8, 10**6]},
        {"input_size": [1] * 10**5},
        {"input_size": "188"},
        {"formats": ["onnx"]},
        {"formats": {"onnx": {"file": 7}}},
        {"formats": {"onnx": {"file": "../" * 10**5}}},
        {"formats": {"onnx": "model.onnx"}},
    ],
)
def test_a_manifest_of_other_types_or_sizes_is_refused(
    another: Path, pictures: list[Path], changed: dict[str, Any]
) -> None:
    path = another / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**manifest, **changed}), encoding="utf-8")
    refused_in_one_line(another, pictures[0])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_model_without_finite_logits_is_refused_with_the_picture(
    another: Path, pictures: list[Path], value: float
) -> None:
    graph = onnx.load(another / "model.onnx")
    broken = 0
    for tensor in graph.graph.initializer:
        weights = onnx.numpy_helper.to_array(tensor)
        if weights.dtype == np.float32 and weights.size > 3:
            spoilt = np.full_like(weights, value)
            tensor.CopyFrom(onnx.numpy_helper.from_array(spoilt, tensor.name))
            broken += 1
    assert broken
    onnx.save(graph, another / "model.onnx")
    command = [sys.executable, "-P", "-m", "hpo", "predict", str(another), str(pictures[0])]
    for as_json in ([], ["--json"]):
        done = subprocess.run([*command, *as_json], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (2, "")
        said = f"hpo: {another}: its model gives no finite logits for {pictures[0]}\n"
        assert done.stderr == said


def test_the_card_s_program_for_tflite_answers_as_predict_does(
    export_dir: Path, pictures: list[Path], tmp_path: Path
) -> None:
    """Elsewhere the card's programs are run as an export writes them; this file came by itself."""
    program = snippet(TFLITE, file="model.tflite", input_size=(1, 8, 8), num_classes=3)
    arrays = np.stack([read_picture(path, input_size=(1, 8, 8)) for path in pictures])
    np.save(tmp_path / "images.npy", arrays)
    program += "import sys; print(classify(np.load(sys.argv[1])).tolist(), *sys.modules)"
    command = [sys.executable, "-I", "-c", program, str(tmp_path / "images.npy")]
    done = subprocess.run(command, cwd=export_dir, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    numbers, _, modules = done.stdout.splitlines()[-1].partition("]")
    predictions = predict(export_dir, pictures, file_format="tflite")
    assert json.loads(numbers + "]") == [CLASSES.index(p.class_) for p in predictions]
    assert not {"hpo", "trainer", "storage", "torch"} & set(modules.split())


def test_a_broken_tflite_file_is_said_in_one_line(
    export_dir: Path, pictures: list[Path], tmp_path: Path
) -> None:
    copy = changed(export_dir, tmp_path)
    for content in (b"", b"no model" * 100):
        (copy / "model.tflite").write_bytes(content)
        with pytest.raises(ConfigError, match="is no TFLite model") as refusal:
            predict(copy, pictures[:1], file_format="tflite")
        assert len(str(refusal.value).splitlines()) == 1


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
for name in ("onnx", "onnx-fp16", "onnx-int8", "tflite"):
    found = predict(Path({str(export_dir)!r}), [Path({str(pictures[0])!r})], file_format=name)
    assert len(found) == 1
for module in ("torch", "optuna", "sqlalchemy", "psycopg2", "matplotlib"):
    assert module not in sys.modules, module
"""
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    lines = done.stderr.splitlines()  # LiteRT says which of its parts it runs on
    assert [line for line in lines if not line.startswith("INFO: Created TensorFlow Lite")] == []


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
        ({"formats": {}}, "has no file of the format onnx that predict runs; it has: none"),
        ({"formats": None}, "is no manifest of an export"),
        ({"formats": []}, "is no manifest of an export"),
        ({"formats": {"onnx": "model.onnx"}}, "is no manifest of an export"),
        ({"formats": {"onnx": {"file": "missing.onnx"}}}, "missing.onnx is no ONNX model"),
        ({"formats": {"onnx": {"file": "manifest.json"}}}, "is no ONNX model"),
        ({"formats": {"onnx": {"file": "../copy/model.onnx"}}}, "can't have file"),
        ({"formats": {"onnx": {"file": "/etc/passwd"}}}, "can't have file"),
        ({"formats": {"onnx": {"file": ".."}}}, "can't have file"),
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


EVIL = "\x1b[2J\x9b1A\r\n\u2028\u202e"
WRITTEN = r"\x1b[2J\x9b1A\r\n\u2028\u202e"


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1", "ascii", None])
def test_names_of_strangers_are_printed_and_not_obeyed(
    export_dir: Path, pictures: list[Path], tmp_path: Path, encoding: str | None
) -> None:
    """encoding: of the output; None: as in the locale C, with Python's own way around it off."""
    export = changed(export_dir, tmp_path, class_names=[f"{EVIL}{n}猫" for n in range(3)])
    folder = tmp_path / "folder"
    folder.mkdir()
    latin = folder / os.fsdecode(b"caf\xe9.png")
    shutil.copy(pictures[0], latin)
    shutil.copy(pictures[1], folder / f"x{EVIL}.png")
    (folder / f"y{EVIL}.txt").write_text("no picture")
    variables = {"PYTHONIOENCODING": encoding} if encoding else {
        "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": ""
    }  # fmt: skip
    program = Hpo(tmp_path, variables)
    done = program.run("predict", str(export), str(folder))
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first.startswith(f"{folder}/caf\\xe9.png: {WRITTEN}")
    # in the locale C all beyond ASCII in a file's name is bytes
    in_name = WRITTEN if encoding else r"\x1b[2J\xc2\x9b1A\r\n\xe2\x80\xa8\xe2\x80\xae"
    assert second.startswith(f"{folder}/x{in_name}.png: {WRITTEN}")
    (passed_over,) = done.stderr.splitlines()
    assert passed_over.startswith("passed over: ")
    assert r"/y\x1b[2J" in passed_over
    assert (done.stdout + done.stderr).replace("\n", "").isprintable()
    as_json = json.loads(program.run("predict", str(export), str(folder), "--json").stdout)
    assert [os.fsencode(row["file"]) for row in as_json] == [
        os.fsencode(path) for path in (latin, folder / f"x{EVIL}.png")
    ]
    assert all(row["class"].startswith(EVIL) for row in as_json)


@pytest.mark.parametrize("what", ["export", "picture"])
def test_a_name_in_an_error_leaves_it_one_line(
    export_dir: Path, pictures: list[Path], tmp_path: Path, what: str
) -> None:
    evil = tmp_path / f"none{EVIL}"
    given = (evil, pictures[0]) if what == "export" else (export_dir, evil)
    done = Hpo(tmp_path).run("predict", *map(str, given))
    assert done.returncode == (2 if what == "export" else 5)
    assert done.stderr.startswith("hpo: ")
    assert done.stderr.count("\n") == 1
    escapes = WRITTEN if what == "picture" else r"\x1b[2J\x9b1A \u202e"  # line breaks are spaces
    assert f"none{escapes}" in done.stderr
    assert done.stderr.rstrip("\n").isprintable()


def external(folder: Path, location: str) -> None:
    """Makes the folder's model take its weights from a file of this name."""
    path = folder / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    weights = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    (folder / "own.bin").write_bytes(weights.raw_data)
    given = {"location": location, "offset": "0", "length": str(len(weights.raw_data))}
    weights.ClearField("raw_data")
    weights.data_location = onnx.TensorProto.EXTERNAL
    for key, value in given.items():
        entry = weights.external_data.add()
        entry.key, entry.value = key, value
    path.write_bytes(model.SerializeToString())


def test_weights_beside_the_model_are_read(
    export_dir: Path, pictures: list[Path], tmp_path: Path
) -> None:
    copy = changed(export_dir, tmp_path)
    external(copy, "own.bin")
    assert predict(copy, pictures[:5]) == predict(export_dir, pictures[:5])


@pytest.mark.parametrize(
    "location",
    [
        "../outside.bin",
        "below/../../outside.bin",
        "{outside}",
        "link.bin",
        "linked/outside.bin",
        "fifo",
        "/dev/zero",
        "/proc/self/environ",
        "*/_ORT_MEM_ADDR_/*",
    ],
)
def test_weights_from_outside_of_the_export_are_refused(
    export_dir: Path, pictures: list[Path], tmp_path: Path, location: str
) -> None:
    """A stranger's export can't have a model made of one's own files."""
    copy = changed(export_dir, tmp_path)
    outside = tmp_path / "outside.bin"
    external(copy, location.format(outside=outside))
    shutil.copy(copy / "own.bin", outside)
    (copy / "below").mkdir()
    (copy / "link.bin").symlink_to(outside)
    (copy / "linked").symlink_to(tmp_path, target_is_directory=True)
    os.mkfifo(copy / "fifo")
    with pytest.raises(ConfigError, match="is no ONNX model of ours") as refusal:
        predict(copy, pictures[:1])
    assert len(str(refusal.value).splitlines()) == 1
