"""How fast workers train while all of them are at work."""

import multiprocessing
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from hpo.errors import WorkersDie
from hpo.executors.local import warm_up
from hpo.spec import StudySpec
from trainer.config import TrainConfig, is_module

if TYPE_CHECKING:
    from trainer.speed import Speed


class Crew:
    """A process for each worker that there would be, to be asked together. A context manager."""

    def __init__(self, spec: StudySpec, devices: Sequence[str]) -> None:
        """devices: one a process, by torch's names, the same one as often as wanted."""
        self._spec, self._devices = spec, devices
        warm_up(for_modules=any(map(is_module, spec.space.choices("backbone"))))
        # not multiprocessing's Pool: it replaces processes that die at once, for ever
        self._pool = ProcessPoolExecutor(
            len(devices), mp_context=multiprocessing.get_context("forkserver")
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._pool.shutdown(cancel_futures=True)

    def speeds(self, backbone: str, *, seconds: float, **fields: Any) -> "list[Speed]":
        """One a process, all at once. fields: of the training; others have the space's middle.

        Raises TrainingFailure or DeviceBusy if it can't be trained, WorkersDie if a process dies.
        """
        jobs = [
            self._pool.submit(_measure, self._spec, backbone, device, index, seconds, fields)
            for index, device in enumerate(self._devices)
        ]
        try:
            return [job.result() for job in jobs]
        except BrokenProcessPool as error:
            raise WorkersDie(
                f"a process that measured {backbone} died: perhaps there is too little memory"
            ) from error

    def memory_share(self) -> float:
        """Of the first device's memory, what is taken while all these processes hold theirs."""
        return self._pool.submit(_memory_share, self._devices[0]).result()


def _measure(
    spec: StudySpec,
    backbone: str,
    device: str,
    index: int,
    seconds: float,
    fields: Mapping[str, Any],
) -> "Speed":
    """In a process of its own, pinned as a worker is."""
    from trainer.speed import measure_speed

    if device == "cpu" and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[index % len(cores)]})
    config = TrainConfig.from_dict({**spec.space.middle(), "backbone": backbone, **fields})
    return measure_speed(
        config,
        spec.load_data(),
        device=device,
        seconds=seconds,
        precision=spec.given_precision,
    )


def _memory_share(device: str) -> float:
    from trainer.memory import memory_share

    return memory_share(device)
