import json
from pathlib import Path

import pytest
import torch

from benchmarks.train import PARTS, Task, layers, line, main, measure
from trainer.backbones import build
from trainer.config import TrainConfig
from trainer.device import DevicePlan


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def test_the_parts_of_a_step_are_the_whole_step() -> None:
    row = measure("smallcnn", Task(seconds=0.1, batch=16, size=(1, 16, 16)))
    parts = row["milliseconds_a_step"]
    assert list(parts) == [*PARTS, "other"]
    assert min(parts.values()) > 0
    assert sum(parts.values()) == pytest.approx(16_000 / row["images_per_second"])
    assert 0 < row["share_of_peak"] < 1
    assert 0 < row["share_of_own_convolutions"] < 1.2  # alone they are timed at their best
    assert line(row).count("|") == 16


def test_each_convolution_and_linear_layer_is_timed_once_in_its_own_shape() -> None:
    model = build(TrainConfig(backbone="smallcnn"), input_size=(1, 16, 16), num_classes=10)
    found = layers(model, 4, (1, 16, 16), DevicePlan(device="cpu"))
    assert [shape for _, shape in found] == [(4, 1, 16, 16), (4, 32, 8, 8), (4, 32, 4, 4), (4, 64)]


def test_the_command_writes_what_it_prints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "train.json"
    main(["--seconds", "0.1", "--batch", "16", "--size", "1x16x16", "--out", str(out), "smallcnn"])
    (row,) = json.loads(out.read_text())["rows"]
    assert line(row) in capsys.readouterr().out


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_is_measured_by_its_own_clock() -> None:
    row = measure("resnet18", Task(seconds=1.0, device="cuda:0", batch=512, size=(3, 32, 32)))
    assert 0 < row["share_of_peak"] < 1
    assert row["peak_mib"] > 100
