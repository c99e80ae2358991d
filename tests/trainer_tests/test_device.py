import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

import trainer.device
from trainer.backbones import build
from trainer.config import ConfigError, TrainConfig
from trainer.data.registry import load
from trainer.device import DevicePlan, available_devices, choose_plan, prepare
from trainer.loop import train
from trainer.state import TrainState

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


def test_a_processor_that_emulates_bf16_gets_no_plan_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    about: dict[str, Any] = {"input_size": (1, 8, 8), "num_classes": 3, "device": "cpu"}
    monkeypatch.setattr(trainer.device, "has_fast_bf16", lambda: True)
    plan = choose_plan(TrainConfig(backbone="smallcnn"), **about, precision="bf16")
    assert (plan.precision, plan.on("cpu")) == ("bf16", plan)
    monkeypatch.setattr(trainer.device, "has_fast_bf16", lambda: False)
    with pytest.raises(ConfigError, match="does not compute in bf16 itself: use a GPU or"):
        choose_plan(TrainConfig(backbone="smallcnn"), **about, precision="bf16")
    fp32 = choose_plan(TrainConfig(backbone="smallcnn"), **about, precision="fp32")
    assert fp32.precision == "fp32"


@pytest.mark.parametrize("made_on", ["cuda:0", "cpu"])
def test_a_plan_in_bf16_goes_on_in_fp32_on_a_processor_that_emulates_it(
    made_on: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer.device, "has_fast_bf16", lambda: False)
    plan = DevicePlan(device=made_on, precision="bf16", channels_last=True, micro_batch=8)
    there = plan.on("cpu")
    assert there == DevicePlan(device="cpu", channels_last=True, micro_batch=8)
    assert plan.on("cuda:1").precision == "bf16"


def test_a_training_in_bf16_is_resumed_in_fp32_where_bf16_is_emulated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The checkpoint's weights, optimizer and history are taken as they are."""
    data = load("digits", seed=0)
    small = dataclasses.replace(data, train=data.train.take(range(64)))
    config = TrainConfig(backbone="smallcnn", epochs=2, batch_size=16)
    monkeypatch.setattr(trainer.device, "has_fast_bf16", lambda: True)
    training = train(config, small, DevicePlan(device="cpu", precision="bf16"))
    first = next(training)
    weights = {name: value.clone() for name, value in first.state.model.state_dict().items()}
    saved = first.state.to_bytes()
    training.close()
    monkeypatch.setattr(trainer.device, "has_fast_bf16", lambda: False)
    state = TrainState.start(
        config, small, DevicePlan(device="cpu"), steps_per_epoch=4, resume=saved
    )
    assert state.plan.precision == "fp32"
    torch.testing.assert_close(dict(state.model.state_dict()), weights, rtol=0, atol=0)
    *_, last = train(config, small, DevicePlan(device="cpu"), resume=saved)
    assert (last.state.plan.precision, last.epoch, last.finished) == ("fp32", 2, True)


def test_channels_last_reaches_filters_and_images() -> None:
    plan = DevicePlan(device="cpu", channels_last=True)
    model = plan.place(build(TrainConfig(), input_size=(3, 8, 8), num_classes=2))
    filters = [parameter for parameter in model.parameters() if parameter.ndim == 4]
    assert filters
    assert all(f.is_contiguous(memory_format=torch.channels_last) for f in filters)
    images = plan.lay_out(torch.randn(2, 3, 8, 8))
    assert images.is_contiguous(memory_format=torch.channels_last)


class _Formats(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Operations on images of two memory formats at once, by name."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.mixed: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        formats = {
            value.is_contiguous(memory_format=torch.channels_last)
            for value in args
            if isinstance(value, Tensor) and value.ndim == 4
        }
        if len(formats) > 1:
            self.mixed.append(str(func))
        return func(*args, **(kwargs or {}))


def gradients_of(backbone: str, *, hooks: bool) -> tuple[list[Tensor], list[str]]:
    """Of one step on channels_last images, and the operations on two formats."""
    config = TrainConfig(backbone=backbone, seed=3)
    plan = DevicePlan(device="cpu", channels_last=True)
    model = plan.place(build(config, input_size=(3, 32, 32), num_classes=5))
    if not hooks:
        for module in model.modules():
            module._forward_pre_hooks.clear()
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    loss = functional.cross_entropy(model(plan.lay_out(images)), torch.arange(4))
    with _Formats() as formats:
        torch.autograd.backward(loss)
    return [p.grad for p in model.parameters() if p.grad is not None], formats.mixed


@pytest.mark.parametrize(
    ("backbone", "tolerance"),
    [
        *((backbone, 0.0) for backbone in ("smallcnn", "resnet8", "resnet20", "resnet18")),
        ("mobilenet_v3_small", 1e-5),  # its hardswish rounds otherwise where it can take eight
    ],
)
def test_gradients_keep_channels_last_all_the_way_and_their_values(
    backbone: str, tolerance: float
) -> None:
    expected, without = gradients_of(backbone, hooks=False)
    found, mixed = gradients_of(backbone, hooks=True)
    assert without  # or the hooks have nothing left to do
    assert not mixed
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def test_a_model_that_is_placed_again_has_each_hook_once() -> None:
    plan = DevicePlan(device="cpu", channels_last=True)
    model = plan.place(plan.place(nn.Sequential(nn.Conv2d(1, 2, 1), nn.AdaptiveAvgPool2d(1))))
    assert [len(module._forward_pre_hooks) for module in model.children()] == [0, 1]


class _Pools(nn.Module):
    """Calls its pooling as users' networks may."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)

    def forward(self, images: Tensor) -> Tensor:
        one: Tensor = self.pool(images[0])
        named: Tensor = self.pool(input=images)
        return one.sum() + named.sum()


def test_a_pooling_of_one_picture_or_by_name_is_left_alone() -> None:
    plan = DevicePlan(device="cpu", channels_last=True)
    images = torch.ones(2, 3, 4, 4, requires_grad=True)
    torch.autograd.backward(plan.place(_Pools())(plan.lay_out(images)))
    assert images.grad is not None
    assert images.grad.sum() == 2 * 3 + 3


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
