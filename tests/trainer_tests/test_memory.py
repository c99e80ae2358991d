import dataclasses
import gc
import math
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchvision.ops import StochasticDepth

import trainer.device
import trainer.memory
from trainer.averaging import Averages
from trainer.backbones import build
from trainer.batches import num_micro_batches
from trainer.config import DeviceBusy, OutOfMemory, TrainConfig
from trainer.data.dataset import ImageDataset, Split
from trainer.device import DevicePlan, choose_plan
from trainer.evaluate import evaluate
from trainer.foreign import Shape
from trainer.loop import optimizer_step, train
from trainer.memory import CONTEXT_BYTES, DeviceMemory, memory_errors, micro_batch_that_fits
from trainer.optim import make_optimizer
from trainer.state import TrainState

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
CPU = DevicePlan(device="cpu")
GIB = 2**30


class MemoryLimit(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A fake allocator: counts what torch's tensors hold, and refuses what exceeds the limit."""

    def __init__(self, limit_bytes: float = math.inf) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.limit_bytes = limit_bytes
        self.live_bytes, self.peak_bytes = 0, 0
        self._addresses: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """The operation; OutOfMemoryError if its result is too much."""
        del types
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        if self.live_bytes > self.limit_bytes:
            raise torch.OutOfMemoryError(f"out of memory: {self.live_bytes} bytes (a fake limit)")
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        address, num_bytes = storage._cdata, storage.nbytes()
        if address not in self._addresses:
            self._addresses.add(address)
            self.live_bytes += num_bytes
            weakref.finalize(storage, self._free, address, num_bytes)

    def _free(self, address: int, num_bytes: int) -> None:
        self._addresses.discard(address)
        self.live_bytes -= num_bytes


@pytest.fixture(autouse=True)
def as_if_nothing_were_known(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    num_threads = torch.get_num_threads()
    monkeypatch.setattr(trainer.memory, "_tried", {})
    monkeypatch.setattr(trainer.device, "_probed", {})
    monkeypatch.setattr(trainer.device, "_fastest", lambda candidates, *_: candidates[0])
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture
def cpu_is_probed(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a fake limit. A failed backward pass leaves nodes in its thread's queue till the next:

    those of an accelerator have threads of their own, which empty them.
    """

    def empty_queue() -> None:
        torch.autograd.backward(torch.ones((), requires_grad=True))

    monkeypatch.setattr(trainer.memory, "is_probed", lambda _: True)
    monkeypatch.setattr(torch.accelerator, "empty_cache", empty_queue)


@pytest.fixture
def only_reference_counts() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def random_data(size: Shape, num_train: int, num_val: int = 8) -> ImageDataset:
    """Noise in three classes."""
    generator = torch.Generator().manual_seed(0)

    def split(num_images: int) -> Split:
        images = torch.randint(256, (num_images, *size), generator=generator, dtype=torch.uint8)
        return Split(images, torch.arange(num_images) % 3)

    return ImageDataset(
        name="noise",
        train=split(num_train),
        val=split(num_val),
        class_names=("a", "b", "c"),
        mean=(0.5,) * size[0],
        std=(0.25,) * size[0],
        fingerprint="0" * 64,
        flips=True,
        open_test=lambda: split(0),
    )


def num_bytes(data: ImageDataset) -> int:
    return data.train.images.nbytes + data.val.images.nbytes


class Device:
    """Fits so many images at once, and remembers what it was asked for."""

    def __init__(self, limit: int, error: str = "out of memory") -> None:
        self.limit, self.error = limit, error
        self.asked: list[int] = []

    def __call__(self, num_images: int) -> None:
        self.asked.append(num_images)
        if num_images > self.limit:
            raise RuntimeError(self.error)

    def find(self, batch_size: int, backbone: str = "resnet8", side: int = 8) -> int | None:
        """The micro-batch, and in `asked` the attempts that it took."""
        self.asked = []
        config = TrainConfig(backbone=backbone, batch_size=batch_size)
        return micro_batch_that_fits(config, (1, side, side), "cuda:0", self)


@pytest.mark.parametrize(
    ("limit", "batch_size", "micro_batch", "asked"),
    [
        (1000, 128, None, [129]),
        (129, 128, None, [129]),
        (128, 128, 64, [129, 65]),
        (40, 128, 32, [129, 65, 33]),
        (40, 100, 25, [101, 51, 26]),
        (3, 16, 2, [17, 9, 5, 3]),
        (3, 5, 2, [6, 3]),
        (3, 3, 2, [4, 3]),
        (3, 2, None, [3]),
    ],
)
def test_the_batch_is_halved_until_it_fits_with_room_for_one_image_more(
    limit: int, batch_size: int, micro_batch: int | None, asked: list[int]
) -> None:
    device = Device(limit)
    assert device.find(batch_size) == micro_batch
    assert device.asked == asked


@given(st.integers(3, 600), st.lists(st.integers(2, 600), min_size=1, max_size=4))
@example(3, [3])
def test_no_part_of_any_batch_is_larger_than_what_fits(limit: int, batch_sizes: list[int]) -> None:
    trainer.memory._tried.clear()
    for batch_size in batch_sizes:
        micro_batch = Device(limit).find(batch_size)
        for num_images in range(2, batch_size + 2):
            num_parts = num_micro_batches(num_images, micro_batch)
            assert math.ceil(num_images / num_parts) <= limit


def test_what_fits_is_remembered_and_later_trials_begin_there() -> None:
    device = Device(40)
    found = [(device.find(size), device.asked) for size in (64, 64, 32, 48, 256, 128)]
    assert found == [(32, [65, 33]), (32, []), (None, []), (32, []), (32, [33]), (32, [])]


def test_a_batch_larger_than_one_that_fitted_whole_is_tried_whole() -> None:
    device = Device(300)
    found = [(device.find(size), device.asked) for size in (64, 32, 128, 512)]
    assert found == [(None, [65]), (None, []), (None, [129]), (256, [513, 257])]


def test_each_backbone_and_size_has_a_memory_of_its_own() -> None:
    device = Device(40)
    for backbone, side in (("resnet8", 8), ("resnet20", 8), ("resnet8", 16)):
        assert device.find(64, backbone, side) == 32
        assert device.asked == [65, 33]


def test_a_pair_that_does_not_fit_is_out_of_memory_in_one_line() -> None:
    device = Device(2)
    with pytest.raises(OutOfMemory) as caught:
        device.find(16)
    assert device.asked == [17, 9, 5, 3]
    assert str(caught.value) == (
        "resnet8 on images of 1x8x8 doesn't fit into the memory of cuda:0: "
        "not even 2 images at once"
    )
    assert caught.value.__context__ is None  # its frames would hold what the attempt held


def memory(monkeypatch: pytest.MonkeyPatch, *, total: float, own: float, others: float) -> None:
    """A device whose memory is used so, in GiB; it never was a real one."""
    found = DeviceMemory(
        total=int(total * GIB), free=int((total - own - others) * GIB), own=int(own * GIB)
    )
    monkeypatch.setattr(trainer.memory, "memory_of", lambda _: found)


ASKED = "CUDA out of memory. Tried to allocate 6.00 GiB. GPU 0 has a total capacity of 16.00 GiB"


@pytest.mark.parametrize(
    ("own", "others", "error", "is_busy"),
    [
        (3, 12.5, ASKED, True),  # 3 + 6 would fit into 16, were it not for the others
        (3, 12.5, "CUDNN_STATUS_ALLOC_FAILED", True),
        (15, 0.5, ASKED, False),  # nobody else is there but a context
        (10, 3, ASKED, False),  # 10 + 6 is all that there is
        (13, 2, ASKED, False),
        (8, 7, "Tried to allocate 512.00 MiB: out of memory", True),
    ],
)
def test_memory_that_others_hold_is_no_fault_of_the_configuration(
    own: float, others: float, error: str, is_busy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory(monkeypatch, total=16, own=own, others=others)
    device = Device(2, error)
    kind, ending = (DeviceBusy, "other processes hold") if is_busy else (OutOfMemory, "not even 2")
    with pytest.raises(kind, match=ending) as caught:
        device.find(16)
    assert device.asked == [17, 9, 5, 3]
    assert caught.value.__context__ is None
    assert "\n" not in str(caught.value)
    with pytest.raises(kind), memory_errors(TrainConfig(), "cuda:0"):
        raise torch.OutOfMemoryError(error)


def test_what_is_said_of_a_busy_device_names_who_holds_what(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    memory(monkeypatch, total=16, own=3, others=12.5)
    with (
        pytest.raises(DeviceBusy) as caught,
        memory_errors(TrainConfig(backbone="resnet8", batch_size=64), "cuda:0"),
    ):
        raise torch.OutOfMemoryError(ASKED)
    assert str(caught.value) == (
        "resnet8 with batch_size 64 doesn't fit: other processes hold 12.5 GiB of the 16.0 GiB of "
        "cuda:0"
    )


def test_what_fits_beside_others_is_not_remembered_for_when_they_have_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    memory(monkeypatch, total=16, own=3, others=12.5)
    assert Device(40).find(64) == 32
    memory(monkeypatch, total=16, own=3, others=0)
    alone = Device(1000)
    assert (alone.find(64), alone.asked) == (None, [65])
    assert (alone.find(64), alone.asked) == (None, [])


def test_where_none_can_say_who_holds_memory_it_is_the_configuration() -> None:
    assert trainer.memory.memory_of("cpu") is None
    with pytest.raises(OutOfMemory), memory_errors(TrainConfig(), "cpu"):
        raise MemoryError
    assert DeviceMemory(total=10 * GIB, free=9 * GIB, own=GIB // 2).others == 0
    assert DeviceMemory(total=10 * GIB, free=2 * GIB, own=GIB).others == 7 * GIB
    assert CONTEXT_BYTES == GIB


def test_that_nothing_fits_is_not_remembered() -> None:
    with pytest.raises(OutOfMemory):
        Device(2).find(16)
    assert Device(100).find(16) is None


@pytest.mark.parametrize(
    "error",
    [
        "CUDA out of memory. Tried to allocate 2.00 GiB.",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.",
        "GET was unable to find an engine to execute this computation",
    ],
)
def test_whatever_libraries_say_when_memory_is_short_halves_the_batch(error: str) -> None:
    assert Device(40, error).find(64) == 32


@pytest.mark.parametrize("error", ["a bug", "FIND was unable to find an engine"])
def test_what_fails_for_another_reason_comes_out_as_it_is(error: str) -> None:
    with pytest.raises(RuntimeError, match=error):
        Device(0, error).find(64)


def test_on_a_cpu_nothing_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(trainer.device, "_fill_memory", fail)
    config = TrainConfig(backbone="smallcnn", batch_size=10**9)
    plan = choose_plan(config, input_size=(1, 8, 8), num_classes=3, device="cpu")
    assert plan.micro_batch is None


SMALL = TrainConfig(
    backbone="smallcnn", batch_size=64, epochs=1, flip=True, translate=1, dropout=0.1
)


def needed_bytes(config: TrainConfig, size: Shape, num_images: int, data_bytes: int = 0) -> int:
    """Peak of the attempt at so many images at once."""
    limit = MemoryLimit()
    with limit:
        trainer.device._fill_memory(config, CPU, num_images, size, 3, data_bytes)
    return limit.peak_bytes


def plan_within(
    limit: MemoryLimit, config: TrainConfig, size: Shape, data_bytes: int
) -> DevicePlan:
    with limit:
        return choose_plan(
            config, input_size=size, num_classes=3, device="cpu", data_bytes=data_bytes
        )


@pytest.mark.usefixtures("cpu_is_probed", "only_reference_counts")
@pytest.mark.parametrize(("at_once", "micro_batch"), [(64, None), (63, 32), (31, 16), (15, 8)])
@pytest.mark.parametrize(
    ("backbone", "size"),
    [("smallcnn", (1, 8, 8)), ("smallcnn", (3, 24, 24)), ("resnet8", (3, 16, 16))],
)
def test_what_is_found_trains_within_the_limit(
    backbone: str, size: Shape, at_once: int, micro_batch: int | None
) -> None:
    config = dataclasses.replace(SMALL, backbone=backbone)
    data = random_data(size, 2 * 64 + 1, num_val=100)
    limit_bytes = needed_bytes(config, size, at_once + 1, num_bytes(data))
    limit = MemoryLimit(limit_bytes)
    plan = plan_within(limit, config, size, num_bytes(data))
    assert plan == dataclasses.replace(CPU, micro_batch=micro_batch)
    assert limit.live_bytes == 0
    with MemoryLimit(limit_bytes):
        assert [report.step for report in train(config, data, plan)] == [4]


@pytest.mark.usefixtures("cpu_is_probed")
@pytest.mark.parametrize("backbone", ["smallcnn", "resnet8"])
def test_where_only_pairs_fit_pairs_train_and_the_whole_batch_does_not(backbone: str) -> None:
    config = dataclasses.replace(SMALL, backbone=backbone, batch_size=16)
    data = random_data((1, 8, 8), 2 * 16 + 1)
    limit_bytes = needed_bytes(config, (1, 8, 8), 3, num_bytes(data))
    plan = plan_within(MemoryLimit(limit_bytes), config, (1, 8, 8), num_bytes(data))
    assert plan.micro_batch == 2
    with MemoryLimit(limit_bytes):
        assert [report.step for report in train(config, data, plan)] == [4]
    message = f"{backbone} with batch_size 16 doesn't fit into the memory of cpu"
    with MemoryLimit(limit_bytes), pytest.raises(OutOfMemory, match=message):
        list(train(config, data, CPU))


def test_an_evaluation_goes_on_in_smaller_batches_where_large_ones_do_not_fit() -> None:
    data = random_data((1, 8, 8), 8, num_val=301)
    model = build(SMALL, input_size=data.input_size, num_classes=3)

    def evaluated_within(limit_bytes: float) -> tuple[Any, int]:
        limit = MemoryLimit(limit_bytes)
        with limit:
            return evaluate(model, data.val, CPU, mean=data.mean, std=data.std), limit.peak_bytes

    whole, peak_bytes = evaluated_within(math.inf)
    parts, _ = evaluated_within(peak_bytes / 5)
    assert parts.num_images == 301
    assert parts.accuracy == whole.accuracy
    assert parts.loss == pytest.approx(whole.loss, rel=1e-6)
    with pytest.raises(torch.OutOfMemoryError):
        evaluated_within(1000)


@pytest.mark.usefixtures("cpu_is_probed", "only_reference_counts")
def test_a_network_that_does_not_fit_with_two_images_is_out_of_memory_and_leaves_nothing() -> None:
    limit = MemoryLimit(needed_bytes(SMALL, (1, 8, 8), 3) - 1)
    with pytest.raises(OutOfMemory, match="not even 2 images at once") as caught:
        plan_within(limit, SMALL, (1, 8, 8), 0)
    assert limit.live_bytes == 0
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("cpu_is_probed")
def test_the_data_beside_the_training_counts() -> None:
    data_bytes = 10**6
    limit_bytes = needed_bytes(SMALL, (1, 8, 8), 65)
    plans = []
    for beside, extra in ((data_bytes, 0), (data_bytes, data_bytes)):
        trainer.memory._tried.clear()
        plans.append(plan_within(MemoryLimit(limit_bytes + extra), SMALL, (1, 8, 8), beside))
    assert plans[0].micro_batch is not None
    assert plans[1].micro_batch is None


@pytest.mark.usefixtures("cpu_is_probed")
@pytest.mark.parametrize("limited", [False, True])
def test_the_random_state_is_the_callers_before_and_after(limited: bool) -> None:
    limit = MemoryLimit(needed_bytes(SMALL, (1, 8, 8), 33) if limited else math.inf)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    plan = plan_within(limit, dataclasses.replace(SMALL, dropout=0.5), (1, 8, 8), 0)
    assert (plan.micro_batch is not None) == limited
    assert torch.equal(torch.get_rng_state(), state)


def test_the_speed_probe_too_leaves_the_random_state_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def draw(candidates: list[DevicePlan], *_: object) -> DevicePlan:
        torch.rand(1)  # as dropout and stochastic depth do
        return candidates[0]

    monkeypatch.setattr(trainer.device, "_fastest", draw)
    state = torch.get_rng_state()
    choose_plan(SMALL, input_size=(1, 8, 8), num_classes=3, device="cpu")
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.usefixtures("cpu_is_probed")
def test_a_training_does_not_notice_that_memory_was_tried_in_between() -> None:
    data = random_data((1, 8, 8), 64 * 9)
    limit = MemoryLimit(needed_bytes(SMALL, (1, 8, 8), 33))
    results = []
    for disturb in (False, True):
        reports = []
        for report in train(SMALL, data, CPU):
            reports.append(report)
            if disturb:
                trainer.memory._tried.clear()
                assert plan_within(limit, SMALL, (1, 8, 8), 0).micro_batch == 32
        losses = [(report.train_loss, report.val_loss) for report in reports]
        results.append((losses, reports[-1].state.model.state_dict()))
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)


def gradients(
    model: nn.Module, config: TrainConfig, images: Tensor, micro_batch: int | None
) -> dict[str, Tensor]:
    """Of one optimizer step on these images, by the parameter's name."""
    plan = dataclasses.replace(CPU, micro_batch=micro_batch)
    optimizer = make_optimizer(config, model)
    state = TrainState(
        config=config,
        plan=plan,
        data_identity=[],
        model=model,
        optimizer=optimizer,
        averages=Averages(model, (), steps_per_epoch=1),
    )
    optimizer_step(state, images, torch.arange(len(images)) % 3)
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert len(found) == len(list(model.parameters()))
    return found


def network(config: TrainConfig, size: Shape, batch_norm: bool) -> nn.Module:
    """The backbone, without what draws at random."""
    dropped = StochasticDepth if batch_norm else (StochasticDepth, nn.BatchNorm2d)
    model = build(config, input_size=size, num_classes=3)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, dropped):
                setattr(parent, name, nn.Identity())
    return model


NUM_IMAGES = 13


SMOOTHED_AND_CLIPPED = {"label_smoothing": 0.2, "clip_norm": 0.01, "optimizer": "sgd"}


@pytest.mark.parametrize(
    ("backbone", "side", "fields", "micro_batch"),
    [
        *[("smallcnn", 8, {}, micro_batch) for micro_batch in (2, 3, 5, 12)],
        ("smallcnn", 8, SMOOTHED_AND_CLIPPED, 4),
        *[("resnet8", 8, {}, micro_batch) for micro_batch in (2, 3, 5, 12)],
        ("convnext_tiny", 16, {}, 5),
    ],
)
def test_without_batch_norm_gradients_of_micro_batches_are_those_of_the_whole_batch(
    backbone: str, side: int, fields: dict[str, Any], micro_batch: int
) -> None:
    config = TrainConfig.from_dict({"backbone": backbone, "lr": 1e-3, **fields})
    size = (1, side, side)
    images = torch.randn(NUM_IMAGES, *size, generator=torch.Generator().manual_seed(1))
    whole, parts = (
        gradients(network(config, size, batch_norm=False), config, images, at_once)
        for at_once in (None, micro_batch)
    )
    scale = max(1.0, *(float(gradient.abs().max()) for gradient in whole.values()))
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, rtol=0, atol=1e-6 * scale, msg=name)


def batch_norm_case() -> tuple[TrainConfig, Shape, Tensor]:
    config, size = TrainConfig(backbone="resnet8"), (1, 8, 8)
    return config, size, torch.randn(12, *size, generator=torch.Generator().manual_seed(1))


def test_with_batch_norm_statistics_are_per_micro_batch_so_gradients_are_the_parts_own() -> None:
    config, size, images = batch_norm_case()
    whole, parts, first, second = (
        gradients(network(config, size, batch_norm=True), config, chosen, at_once)
        for chosen, at_once in (
            (images, None),
            (images, 6),
            (images[:6], None),
            (images[6:], None),
        )
    )
    for name, gradient in parts.items():
        own = (first[name] + second[name]) / 2
        torch.testing.assert_close(gradient, own, rtol=1e-5, atol=1e-6, msg=name)
    assert any((parts[name] - whole[name]).abs().max() > 1e-3 for name in whole)


def test_with_batch_norm_whose_statistics_are_fixed_gradients_are_those_of_the_whole_batch() -> (
    None
):
    config, size, images = batch_norm_case()
    whole, parts = (
        gradients(network(config, size, batch_norm=True).eval(), config, images, at_once)
        for at_once in (None, 5)
    )
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, rtol=0, atol=1e-6, msg=name)


@pytest.fixture
def limit_gpu() -> Iterator[Callable[[float], None]]:
    """Gives this process so many bytes of the first GPU."""

    def limit(limit_bytes: float) -> None:
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit_bytes / total), 0)

    yield limit
    limit(math.inf)


def plan_on_gpu(config: TrainConfig, data: ImageDataset) -> DevicePlan:
    return choose_plan(
        config,
        input_size=data.input_size,
        num_classes=data.num_classes,
        device="cuda:0",
        data_bytes=num_bytes(data),
    )


@pytest.mark.gpu
@needs_cuda
def test_on_a_gpu_with_a_real_limit_a_large_batch_trains_in_micro_batches(
    limit_gpu: Callable[[float], None],
) -> None:
    config = TrainConfig(backbone="resnet18", batch_size=2048, epochs=1)
    data = random_data((3, 64, 64), 2 * 2048 + 1)
    plan_on_gpu(dataclasses.replace(config, batch_size=2), data)  # libraries' own buffers stay
    limit_gpu(1.5 * GIB)
    allocated = torch.cuda.memory_allocated()
    state = torch.cuda.get_rng_state()
    plan = plan_on_gpu(config, data)
    assert plan.micro_batch is not None
    assert 2 <= plan.micro_batch <= 1024
    assert torch.cuda.memory_allocated() == allocated
    assert torch.equal(torch.cuda.get_rng_state(), state)
    assert [report.step for report in train(config, data, plan)] == [4]
    with pytest.raises(OutOfMemory, match="resnet18 with batch_size 2048 doesn't fit"):
        list(train(config, data, dataclasses.replace(plan, micro_batch=None)))


@pytest.mark.gpu
@needs_cuda
def test_on_a_gpu_too_small_for_the_network_a_pair_is_out_of_memory(
    limit_gpu: Callable[[float], None],
) -> None:
    config = TrainConfig(backbone="resnet50", batch_size=16)
    data = random_data((3, 64, 64), 8)
    plan_on_gpu(dataclasses.replace(config, batch_size=2), data)  # libraries' own buffers stay
    limit_gpu(GIB / 4)
    allocated = torch.cuda.memory_allocated()
    with pytest.raises(OutOfMemory, match="cuda:0: not even 2 images at once"):
        plan_on_gpu(config, data)
    assert torch.cuda.memory_allocated() == allocated
