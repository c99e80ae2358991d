"""The logic of the GPU's benchmark, on a CPU."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import study
from benchmarks.gpu import PUBLISHED, loop_speed, loop_table, main
from benchmarks.train import Task


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def test_all_of_it_is_measured_and_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The studies themselves are run by test_study."""
    asked: list[tuple[str, int, int, int]] = []

    def run(arm: str, kind: study.Kind, _seed: int, num_images: int) -> dict[str, Any]:
        study.command_of(arm)  # raises for one that there is not
        asked.append((arm, kind["num_trials"], kind["epochs"], num_images))
        return {"trials_per_hour": 4321.0, "images_per_second": 1.0, "seconds": 9.0, "best": 0.5}

    monkeypatch.setattr(study, "run", run)
    out = tmp_path / "gpu.json"
    loop = "--device cpu --backbone smallcnn --batch 64 --noise 256 --epochs 2"
    studies = "--images 400 --workers auto,1,2 --trials 7"
    main([*loop.split(), *studies.split(), "--out", str(out)])
    found = json.loads(out.read_text())
    assert [row["backbone"] for row in found["loop"]] == ["smallcnn", "smallcnn"]
    assert all(row["images_per_second"] > 0 and row["tflops"] > 0 for row in found["loop"])
    assert asked == [
        ("hpo", 12, 2, 400), ("hpo, 1 worker", 12, 2, 400), ("hpo, 2 workers", 12, 2, 400),
        ("hpo, 1 worker", 7, 8, 400),
    ]  # fmt: skip
    printed = capsys.readouterr().out
    assert "| hpo, 2 workers | 4,321 |" in printed
    assert "7 trials: 9 s, best 0.5000" in printed


def test_published_figures_stand_beside_ours() -> None:
    row = {"backbone": "resnet18", "plan": {"precision": "bf16", "graphs": True},
           "images_per_second": 23_456.0, "tflops": 78.12}  # fmt: skip
    text = loop_table([row])
    assert "| resnet18, bf16, CUDA graphs | 23,456 | 78.1 |" in text
    assert all(f"| {name} |" in text for name in PUBLISHED)
    assert "| 116.5 |" in text  # 0.36 PFLOP in 3.09 s


def test_without_a_gpu_nothing_is_measured_and_that_is_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no CUDA device"):
        main([])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_the_loop_runs_with_graphs() -> None:
    task = Task(device="cuda:0", batch=512, size=(3, 32, 32))
    row = loop_speed("resnet18", task, epochs=2, graphs=True)
    assert row["plan"]["graphs"]
    assert row["peak_mib"] > 100
