"""What this hardware is and how to use it: devices, precision, memory format, threads."""

import dataclasses
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from trainer.allocator import keep_freed_memory
from trainer.backbones import build
from trainer.config import ConfigError, Precision, TrainConfig, unknown_name
from trainer.foreign import Shape
from trainer.memory import micro_batch_that_fits
from trainer.optim import make_optimizer
from trainer.seeds import own_randomness

PROBE_ROUNDS = 5
PROBE_STEP_SECONDS = 0.04
"""A timed step's length is brought near this by its number of images (8 to 64)."""
PROBE_MARGIN = 1.05
"""What another plan must be faster by to be taken instead of plain fp32."""

Plain = Mapping[str, Any]
Remember = Callable[[str, Callable[[], Plain]], Plain]
"""Gives what the function gave when it was last called for this text; plain values, for JSON."""

_probed: dict[str, Plain] = {}


@dataclass(frozen=True, kw_only=True)
class DevicePlan:
    """How a training uses its device; chosen at its start, it stays with it.

    Raises ConfigError if a field is out of its range.
    """

    device: str
    """"cpu", "cuda:0" or "mps"."""
    precision: Precision = "fp32"
    """bf16 is autocast: weights and losses stay fp32."""
    channels_last: bool = False
    """Images and filters lie in memory channel by channel for each pixel."""
    micro_batch: int | None = None
    """At most as many images at once, gradients are added up; >= 2; None is the whole batch."""
    num_threads: int = 1
    """CPU threads of one operation; sums, and so results, depend on it."""
    graphs: bool = False
    """On CUDA: a step's kernels are recorded and started together (trainer.graphs)."""

    def __post_init__(self) -> None:
        if self.precision not in get_args(Precision):
            raise ConfigError(unknown_name("precision", self.precision, get_args(Precision)))
        if self.micro_batch is not None and self.micro_batch < 2:
            raise ConfigError(f"micro_batch must be >= 2, got {self.micro_batch}")
        if self.num_threads < 1:
            raise ConfigError(f"num_threads must be >= 1, got {self.num_threads}")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "DevicePlan":
        """The plan of these fields. Raises ConfigError if one is unknown or out of range."""
        known = [field.name for field in dataclasses.fields(cls)]
        for name in values:
            if name not in known:
                raise ConfigError(unknown_name("field", name, known))
        return cls(**values)

    def on(self, device: str) -> "DevicePlan":
        """The same on another device, which may have no graphs, and no bf16.

        Where bf16 is emulated (computes_in) the plan is in fp32: weights, averages and an
        optimizer's state are fp32 in either plan, so a training goes on from where it was.
        """
        graphs = self.graphs and device.startswith("cuda")
        precision = self.precision if computes_in(self.precision, device) else "fp32"
        return dataclasses.replace(self, device=device, graphs=graphs, precision=precision)

    def place(self, model: nn.Module) -> nn.Module:
        """The model on the device, in the plan's memory format."""
        model = model.to(self.device)
        if self.channels_last:
            for parameter in model.parameters():
                if parameter.ndim == 4:
                    parameter.data = parameter.data.to(memory_format=torch.channels_last)
            for module in model.modules():
                hooks = module._forward_pre_hooks.values()  # of a model that was placed before
                if isinstance(module, nn.AdaptiveAvgPool2d) and _keep_format not in hooks:
                    module.register_forward_pre_hook(_keep_format)
        return model

    def lay_out(self, images: Tensor) -> Tensor:
        """images (N,C,H,W) in the plan's memory format."""
        if self.channels_last:
            return images.contiguous(memory_format=torch.channels_last)
        return images.contiguous()

    def autocast(self) -> AbstractContextManager[Any]:
        """The context in which the model is called."""
        return torch.autocast(
            torch.device(self.device).type, torch.bfloat16, enabled=self.precision == "bf16"
        )


def available_devices() -> list[str]:
    """The accelerators of this machine by torch's names, or just the CPU: never empty."""
    if torch.cuda.is_available():
        return [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    return ["mps"] if torch.backends.mps.is_available() else ["cpu"]


def prepare(device: str, num_threads: int) -> None:
    """Set this process up for training: threads, denormals as zeros, TF32, cuDNN's search, and
    freed memory that stays with the process.

    Denormal numbers are slow on CPUs; that flag belongs to the calling thread. Raises
    ConfigError if the device isn't there.
    """
    if device != "cpu" and device not in available_devices():
        known = ["cpu", *available_devices()]
        raise ConfigError(unknown_name("device", device, known))
    torch.set_num_threads(num_threads)
    torch.set_flush_denormal(True)
    keep_freed_memory()
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        torch.backends.cudnn.benchmark = True


def has_fast_bf16() -> bool:
    """Whether this CPU computes with bf16 itself (elsewhere it is emulated, and slow)."""
    capabilities = torch.cpu.get_capabilities()
    return any(value is True for name, value in capabilities.items() if "bf16" in name)


def computes_in(precision: Precision, device: str) -> bool:
    """Whether trainings on the device of this machine can have this precision.

    torch's emulation of bf16 on a CPU leaves parts of some gradients unset (seen in torch 2.15: of
    a strided convolution on one pixel).
    """
    return precision != "bf16" or device != "cpu" or has_fast_bf16()


def check_precision(precision: Precision, device: str) -> None:
    """Raises ConfigError if trainings on the device of this machine can't have this precision."""
    if not computes_in(precision, device):
        raise ConfigError(
            f"this machine's processor does not compute in {precision} itself: use a GPU or a "
            "processor that does, or make the study with --precision fp32 or auto"
        )


def remember_here(what: str, measure: Callable[[], Plain]) -> Plain:
    """As long as this process lives."""
    if what not in _probed:
        _probed[what] = measure()
    return _probed[what]


def choose_plan(
    config: TrainConfig,
    *,
    input_size: Shape,
    num_classes: int,
    device: str,
    num_threads: int = 1,
    data_bytes: int = 0,
    graphs: bool = False,
    precision: Precision | None = None,
    remember: Remember = remember_here,
) -> DevicePlan:
    """The fastest way found to train this backbone here, in micro-batches that fit.

    precision: is taken as it is, with channels_last, and nothing is measured.

    On CUDA bf16 with channels_last where the hardware has it; on a CPU a probe of a few
    training steps, well below a second for small networks, once for each (backbone, size,
    device, threads) as far as `remember` does. graphs: use CUDA graphs where they are right, which
    isn't for networks that this project doesn't know. What memory holds is tried on accelerators
    only, with data_bytes of images beside it. Does not touch torch's random state, and leaves
    nothing in memory. Raises OutOfMemory or DeviceBusy if no micro-batch fits, ConfigError if the
    device isn't there or doesn't compute in the precision.
    """
    prepare(device, num_threads)
    if precision is not None:
        check_precision(precision, device)
    plain = DevicePlan(device=device, num_threads=num_threads)
    if precision is None:
        plan = _fast_plan(config, plain, input_size, num_classes, remember)
    else:
        plan = dataclasses.replace(plain, precision=precision, channels_last=True)
    if graphs and ":" not in config.backbone:
        plan = dataclasses.replace(plan, graphs=True).on(device)

    def attempt(num_images: int) -> None:
        with own_randomness("memory", config.seed, device=device):
            _fill_memory(config, plan, num_images, input_size, num_classes, data_bytes)

    micro_batch = micro_batch_that_fits(config, input_size, device, attempt)
    return plan if micro_batch is None else dataclasses.replace(plan, micro_batch=micro_batch)


def _fast_plan(
    config: TrainConfig, plain: DevicePlan, input_size: Shape, num_classes: int, remember: Remember
) -> DevicePlan:
    if plain.device.startswith("cuda"):
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        precision: Precision = "bf16" if bf16 else "fp32"
        return dataclasses.replace(plain, precision=precision, channels_last=bf16)
    if plain.device != "cpu":
        return plain
    size = "x".join(map(str, input_size))
    what = f"plan for {config.backbone} on {size} with {plain.num_threads} threads"
    found = remember(what, lambda: _probe(config, plain, input_size, num_classes).to_dict())
    return DevicePlan.from_dict(found)


def _probe(
    config: TrainConfig, plain: DevicePlan, input_size: Shape, num_classes: int
) -> DevicePlan:
    last = dataclasses.replace(plain, channels_last=True)
    candidates = [plain, last]
    if has_fast_bf16():
        candidates.append(dataclasses.replace(last, precision="bf16"))
    config = dataclasses.replace(config.from_scratch(), trainable="all")
    with own_randomness("speed", config.seed):
        models = [build(config, input_size=input_size, num_classes=num_classes) for _ in candidates]
        return _fastest(candidates, models, input_size)


def _fill_memory(
    config: TrainConfig,
    plan: DevicePlan,
    num_images: int,
    input_size: Shape,
    num_classes: int,
    data_bytes: int,
) -> None:
    """A forward and a backward pass of so many images, with all else that a training keeps.

    That is the data, a whole batch as bytes and as floats, weights, gradients, and the state of
    the largest optimizer, so that what fits one fits all.
    """
    data = torch.empty(data_bytes, dtype=torch.uint8, device=plan.device)
    whole = (config.batch_size + 1, *input_size)
    images = torch.zeros(whole, dtype=torch.uint8, device=plan.device)
    batch = images.float()
    config = dataclasses.replace(config.from_scratch(), optimizer="adamw")
    model = plan.place(build(config, input_size=input_size, num_classes=num_classes))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    optimizer = make_optimizer(config, model)
    optimizer.step()
    _forward_backward(plan, model, batch[:num_images])
    del data  # held until here


def _fastest(
    candidates: list[DevicePlan], models: list[nn.Module], input_size: Shape
) -> DevicePlan:
    """The candidate of the shortest training step, the first one if it is nearly as short."""
    models = [plan.place(model) for plan, model in zip(candidates, models, strict=True)]
    _step_seconds(candidates[0], models[0], 8, input_size)  # loads kernels
    first = _step_seconds(candidates[0], models[0], 8, input_size)
    num_images = min(64, max(8, int(8 * PROBE_STEP_SECONDS / first)))
    rounds = [
        [
            _step_seconds(plan, model, num_images, input_size)
            for plan, model in zip(candidates, models, strict=True)
        ]
        for _ in range(PROBE_ROUNDS)
    ]
    seconds = [min(times) for times in zip(*rounds, strict=True)]
    best = min(range(len(seconds)), key=seconds.__getitem__)
    return candidates[best if seconds[0] > PROBE_MARGIN * seconds[best] else 0]


def _step_seconds(plan: DevicePlan, model: nn.Module, num_images: int, size: Shape) -> float:
    """CPU seconds, all threads together, of a forward and a backward pass.

    Time by the clock would depend on which neighbour was busy at the moment.
    """
    started = time.process_time()
    _forward_backward(
        plan,
        model,
        torch.linspace(-1, 1, num_images * size[0] * size[1] * size[2]).view(num_images, *size),
    )
    return time.process_time() - started


def _forward_backward(plan: DevicePlan, model: nn.Module, images: Tensor) -> None:
    """images: (N,C,H,W) float, on the plan's device."""
    with plan.autocast():
        logits = model(plan.lay_out(images))
    labels = torch.zeros(len(images), dtype=torch.int64, device=plan.device)
    torch.autograd.backward(functional.cross_entropy(logits.float(), labels))


def _keep_format(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Tensor, ...] | None:
    """Before an average over pixels: the gradient of its input keeps channels_last, as it does not
    by itself, and an operation on two memory formats takes ten times as long as on one.

    inputs: of the call, without those that it names; anything but (N,C,H,W) is left alone.
    """
    if len(inputs) != 1 or inputs[0].ndim != 4:
        return None
    images: Tensor = inputs[0]
    if not images.requires_grad or not images.is_contiguous(memory_format=torch.channels_last):
        return None
    pooled = images.view_as(images)  # whose gradient is the pooling's alone
    pooled.register_hook(_channels_last)  # type: ignore[no-untyped-call]
    return (pooled,)


def _channels_last(gradient: Tensor) -> Tensor:
    return gradient.contiguous(memory_format=torch.channels_last)
