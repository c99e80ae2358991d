import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import trainer.device
from trainer.backbones import build
from trainer.config import ConfigError, TrainConfig
from trainer.device import DevicePlan, available_devices, choose_plan, prepare

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture(autouse=True)
def same_threads_afterwards() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def nothing_probed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer.device, "_probed", {})


def plan_for(backbone: str, side: int = 8) -> DevicePlan:
    config = TrainConfig(backbone=backbone)
    return choose_plan(config, input_size=(1, side, side), num_classes=3, device="cpu")


def test_a_plan_comes_back_from_json_as_it_was() -> None:
    plan = DevicePlan(device="cuda:1", precision="bf16", channels_last=True, micro_batch=32)
    assert DevicePlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"precision": "fp16"}, "unknown precision 'fp16'"),
        ({"micro_batch": 1}, "micro_batch must be >= 2, got 1"),
        ({"num_threads": 0}, "num_threads must be >= 1, got 0"),
        ({"chanels_last": True}, "unknown field 'chanels_last', did you mean channels_last"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DevicePlan.from_dict({"device": "cpu", **fields})


def test_there_is_always_a_device() -> None:
    devices = available_devices()
    assert devices
    assert all(torch.device(name).type in ("cpu", "cuda", "mps") for name in devices)


def test_prepare_sets_the_number_of_threads() -> None:
    for num_threads in (2, 1):
        prepare("cpu", num_threads)
        assert torch.get_num_threads() == num_threads


def test_prepare_makes_denormals_zero() -> None:
    prepare("cpu", 1)
    assert float(torch.tensor(1e-38) * 0.01) == 0.0


@pytest.mark.parametrize("device", ["cuda:77", "gpu"])
def test_a_device_that_is_not_there_is_refused_by_name(device: str) -> None:
    with pytest.raises(ConfigError, match=f"unknown device '{device}'"):
        prepare(device, 1)


@pytest.mark.usefixtures("nothing_probed")
@pytest.mark.parametrize("backbone", ["smallcnn", "resnet8"])
def test_the_probe_leaves_the_random_state_alone_and_is_made_once(backbone: str) -> None:
    state = torch.get_rng_state()
    plan = plan_for(backbone)
    assert torch.equal(torch.get_rng_state(), state)
    assert (plan.device, plan.num_threads, plan.micro_batch) == ("cpu", 1, None)
    assert plan_for(backbone) == plan
    assert len(trainer.device._probed) == 1


@pytest.mark.usefixtures("nothing_probed")
@pytest.mark.parametrize(
    ("seconds", "has_bf16", "chosen"),
    [
        ({"plain": 1.0, "last": 0.96, "bf16": 0.1}, False, ("fp32", False)),
        ({"plain": 1.0, "last": 0.94, "bf16": 0.1}, False, ("fp32", True)),
        ({"plain": 1.0, "last": 0.80, "bf16": 0.7}, True, ("bf16", True)),
        ({"plain": 0.5, "last": 0.80, "bf16": 0.7}, True, ("fp32", False)),
    ],
)
def test_the_fastest_way_is_taken_if_it_wins_by_five_percent(
    monkeypatch: pytest.MonkeyPatch,
    seconds: dict[str, float],
    has_bf16: bool,
    chosen: tuple[str, bool],
) -> None:
    def step_seconds(plan: DevicePlan, *_: object) -> float:
        kind = "bf16" if plan.precision == "bf16" else "last" if plan.channels_last else "plain"
        return seconds[kind]

    monkeypatch.setattr(trainer.device, "has_fast_bf16", lambda: has_bf16)
    monkeypatch.setattr(trainer.device, "_step_seconds", step_seconds)
    plan = plan_for("smallcnn")
    assert (plan.precision, plan.channels_last) == chosen


def test_channels_last_reaches_filters_and_images() -> None:
    plan = DevicePlan(device="cpu", channels_last=True)
    model = plan.place(build(TrainConfig(), input_size=(3, 8, 8), num_classes=2))
    filters = [parameter for parameter in model.parameters() if parameter.ndim == 4]
    assert filters
    assert all(f.is_contiguous(memory_format=torch.channels_last) for f in filters)
    images = plan.lay_out(torch.randn(2, 3, 8, 8))
    assert images.is_contiguous(memory_format=torch.channels_last)


def test_bf16_is_a_matter_of_the_context_and_weights_stay_fp32() -> None:
    plan = DevicePlan(device="cpu", precision="bf16")
    model = plan.place(build(TrainConfig(), input_size=(1, 8, 8), num_classes=2))
    images = torch.randn(2, 1, 8, 8)
    with plan.autocast():
        assert model(images).dtype == torch.bfloat16
    assert model(images).dtype == torch.float32
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.gpu
@needs_cuda
def test_a_gpu_with_bf16_gets_bf16_and_channels_last() -> None:
    plan = choose_plan(TrainConfig(), input_size=(3, 32, 32), num_classes=10, device="cuda:0")
    assert plan.channels_last == torch.cuda.is_bf16_supported(including_emulation=False)
    assert plan.precision == ("bf16" if plan.channels_last else "fp32")
