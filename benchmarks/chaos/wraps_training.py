"""The witness of trainer/, and trainings that are simulated or sick."""

import contextlib
import dataclasses
import functools
import subprocess
import time
from collections.abc import Callable, Generator
from types import ModuleType
from typing import Any

from benchmarks.chaos.around import replace
from benchmarks.chaos.faults import plan, point, sickness, witness

NUM_TRAIN, NUM_VAL = 64, 100


def wrap_loop(module: ModuleType) -> None:
    """train and its step."""
    replace(module, "optimizer_step", _sick)
    replace(module, "train", _watched)


def _sick(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def optimizer_step(*args: Any, **kwargs: Any) -> Any:
        kind = sickness()
        if kind == "raise":
            raise ValueError("a layer of this backbone is broken")
        if kind == "oom":
            raise RuntimeError("DefaultCPUAllocator: not enough memory: tried to allocate")
        if kind == "hang":
            time.sleep(3600)
        if kind == "hang-child":
            subprocess.run(["sleep", "3600"])
        seconds = plan().step_seconds
        if seconds is not None:
            time.sleep(seconds)
        losses = original(*args, **kwargs)
        if seconds is not None:
            witness("step")
            point("after step")
        return losses * float(kind) if kind in ("nan", "inf") else losses

    return optimizer_step


def _watched(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def train(config: Any, data: Any, *args: Any, **kwargs: Any) -> Generator[Any, None, None]:
        pause = plan().leg_seconds
        if pause is not None:
            train, val = _first(data.train, NUM_TRAIN), _first(data.val, NUM_VAL)
            data = dataclasses.replace(data, train=train, val=val)
        with contextlib.closing(original(config, data, *args, **kwargs)) as reports:
            while True:
                witness("begin")
                _wait(pause or 0.0, kwargs.get("pulse", _no_pulse))
                try:
                    report = next(reports)
                except StopIteration:
                    return
                witness("leg", step=report.step, value=report.val_accuracy)
                point("after leg")
                yield report

    return train


def _first(images: Any, number: int) -> Any:
    """So many of them, where there are as many."""
    return images.take(range(min(number, len(images))))


def _no_pulse() -> None:
    """Of a retraining, which nobody interrupts."""


def _wait(seconds: float, pulse: Callable[[], None]) -> None:
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        time.sleep(min(left, 0.05))
        pulse()


def wrap_device(module: ModuleType) -> None:
    """Slow and simulated training need no probe, which each kill would pay for again."""

    def plain(original: Callable[..., Any]) -> Callable[..., Any]:
        def choose_plan(config: Any, *, device: str, **kwargs: Any) -> Any:
            if plan().leg_seconds is not None or plan().step_seconds is not None:
                return module.DevicePlan(device=device)
            return original(config, device=device, **kwargs)

        return choose_plan

    replace(module, "choose_plan", plain)
