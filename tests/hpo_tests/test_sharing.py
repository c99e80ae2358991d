"""How many workers share a GPU: the rule, what is measured for it, and who asks."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import hpo.measured
import hpo.sharing
from hpo.launch import devices_of_workers
from hpo.options import LaunchOptions
from hpo.sharing import best_number, measure, mps_runs, shared
from hpo.space import SearchSpace
from hpo.spec import StudySpec
from trainer.config import OutOfMemory
from trainer.data.registry import load

Row = dict[str, float]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HPO_HOME", str(tmp_path))
    monkeypatch.setattr(hpo.measured, "_known", {})
    return tmp_path


@pytest.fixture
def spec() -> StudySpec:
    space = SearchSpace(fields={"backbone": "smallcnn", "batch_size": (32, 64), "epochs": 1})
    fingerprint = load("digits", seed=0).fingerprint
    return StudySpec(data="digits", fingerprint=fingerprint, space=space, seed=0, first_rung=4)


def rows(*speeds: float, share: float = 0.1) -> list[Row]:
    """By 1, 2, ... workers, each with so much of the memory."""
    return [
        {"images_per_second": speed, "memory_share": share * number}
        for number, speed in enumerate(speeds, 1)
    ]


def silent(_: str) -> None:
    pass


@pytest.mark.parametrize(
    ("found", "number"),
    [
        ([], 1),
        (rows(100), 1),
        (rows(100, 105), 1),
        (rows(100, 109, 300), 1),
        (rows(100, 190, 250, 260), 3),
        (rows(100, 190, 280, 370), 4),
        (rows(100, 190, 280, 370, share=0.3), 2),
        (rows(100, 190, share=0.5), 1),
    ],
)
def test_a_worker_is_kept_while_all_train_more_and_memory_holds_them(
    found: list[Row], number: int
) -> None:
    assert best_number(found) == number


class Gpu:
    """Tells what so many workers come to, and how often it was asked."""

    def __init__(self, found: Sequence[Row]) -> None:
        self.found, self.asked = found, list[int]()

    def __call__(self, _spec: StudySpec, devices: list[str]) -> Row:
        self.asked.append(len(devices))
        if len(devices) > len(self.found):
            raise OutOfMemory("no more")
        return self.found[len(devices) - 1]


def measured_on(
    gpu: Gpu, spec: StudySpec, monkeypatch: pytest.MonkeyPatch, *, most: int = 8
) -> list[Row]:
    monkeypatch.setattr(hpo.sharing, "_together", gpu)
    return measure(spec, "cuda:0", most, silent)


def test_no_more_are_measured_than_are_worth_it(
    spec: StudySpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = Gpu(rows(100, 190, 195, 400))
    assert measured_on(gpu, spec, monkeypatch) == gpu.found[:3]
    assert gpu.asked == [1, 2, 3]


def test_what_memory_would_not_hold_is_not_tried(
    spec: StudySpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = Gpu(rows(100, 190, 280, share=0.4))
    assert len(measured_on(gpu, spec, monkeypatch)) == 2
    assert gpu.asked == [1, 2]


def test_out_of_memory_ends_the_measurement_and_fails_nothing(
    spec: StudySpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(measured_on(Gpu(rows(100, 190)), spec, monkeypatch)) == 2
    assert measured_on(Gpu([]), spec, monkeypatch) == []


def test_cores_bound_the_number(spec: StudySpec, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(measured_on(Gpu(rows(100, 190, 280)), spec, monkeypatch, most=2)) == 2


def two_gpus(monkeypatch: pytest.MonkeyPatch, gpu: Gpu, *, cores: int = 16) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    monkeypatch.setattr("trainer.device.available_devices", lambda: ["cuda:0", "cuda:1"])
    monkeypatch.setattr(hpo.sharing, "_together", gpu)
    monkeypatch.setattr(hpo.sharing, "num_cores", lambda: cores)


def test_each_gpu_has_as_many_workers_in_turn_and_its_kind_is_measured_once(
    spec: StudySpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu, said = Gpu(rows(100, 190, 195)), list[str]()
    two_gpus(monkeypatch, gpu)
    devices = devices_of_workers(spec, LaunchOptions(), said.append)
    assert devices == ["cuda:0", "cuda:1", "cuda:0", "cuda:1"]
    assert gpu.asked == [1, 2, 3]
    assert said == [
        "measuring how many workers train most on cuda:0",
        "cuda:0: 2 workers (images/s by 1, 2, ... of them: 100, 190, 195)",
        "cuda:1: 2 workers (images/s by 1, 2, ... of them: 100, 190, 195)",
    ]
    monkeypatch.setattr(hpo.measured, "_known", {})  # the next process
    assert devices_of_workers(spec, LaunchOptions(), silent) == devices
    assert gpu.asked == [1, 2, 3]


def test_what_a_month_keeps_is_measured_anew_for_other_networks_and_under_mps(
    spec: StudySpec, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    gpu = Gpu(rows(100))
    two_gpus(monkeypatch, gpu)
    other = dataclasses.replace(spec, space=spec.space.replace(backbone="resnet8"))
    for each in (spec, spec, other):
        shared(each, ["cuda:0"], silent)
    assert gpu.asked == [1, 2, 1, 2]
    (tmp_path / "control").touch()
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(tmp_path))
    assert mps_runs()
    shared(spec, ["cuda:0"], silent)
    assert gpu.asked == [1, 2, 1, 2, 1, 2]


def test_a_number_of_workers_that_is_given_is_taken_without_measuring(
    spec: StudySpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = Gpu(rows(100, 190, 280))
    two_gpus(monkeypatch, gpu)
    given = LaunchOptions(workers="3")
    assert devices_of_workers(spec, given, silent) == ["cuda:0", "cuda:1", "cuda:0"]
    assert gpu.asked == []


def test_where_each_gpu_has_one_core_there_is_nothing_to_measure(
    spec: StudySpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = Gpu(rows(100, 190, 280))
    two_gpus(monkeypatch, gpu, cores=2)
    assert devices_of_workers(spec, LaunchOptions(), silent) == ["cuda:0", "cuda:1"]
    assert gpu.asked == []


def test_without_a_gpu_nothing_is_measured(spec: StudySpec, monkeypatch: Any) -> None:
    monkeypatch.setattr("trainer.device.available_devices", lambda: ["cpu"])
    monkeypatch.setattr(hpo.sharing, "_together", None)
    assert set(devices_of_workers(spec, LaunchOptions(), silent)) == {"cpu"}


def test_workers_are_measured_at_work_together(spec: StudySpec) -> None:
    """On CPUs, which nobody asks this of, but which do the same."""
    found = measure(spec, "cpu", 2, silent)
    assert len(found) == 2
    assert all(row["images_per_second"] > 10 for row in found)
    assert all(row["memory_share"] == 0 for row in found)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_is_shared_by_as_many_as_it_is_worth(spec: StudySpec) -> None:
    said: list[str] = []
    devices = shared(spec, ["cuda:0"], said.append)
    assert set(devices) == {"cuda:0"}
    assert 1 <= len(devices) <= hpo.sharing.MOST_WORKERS
    assert said[-1].startswith(f"cuda:0: {len(devices)} worker")
