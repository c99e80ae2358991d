"""Which cores and GPUs of this machine are in use by launches, so that two launches share none.

A claim is a Unix socket with a name in Linux's abstract namespace. The kernel gives each name to
one process of the machine, whoever its user is, and takes it back however the process ends: there
is no file that could stay behind or be locked by somebody else. Where there are no such names (on
macOS, or between containers with networks of their own) nothing is in use by others.
"""

import contextlib
import errno
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass

MOST_CLAIMS_OF_A_GPU = 32


@dataclass(frozen=True, kw_only=True)
class Claim:
    """The use of one core or GPU, until it is released or the process ends."""

    what: str
    holder: socket.socket | None

    def release(self) -> None:
        """Others may use it."""
        if self.holder is not None:
            self.holder.close()


def claim_core(cores: Sequence[int]) -> tuple[int, Claim] | None:
    """The first of these cores that no other launch has claimed; None if all are in use."""
    for core in cores:
        claim = _claim(f"core-{core}")
        if claim is not None:
            return core, claim
    return None


def claim_gpu(key: str) -> Claim | None:
    """One more use of a GPU, which may have several. key: device_key's."""
    for number in range(MOST_CLAIMS_OF_A_GPU):
        claim = _claim(f"gpu-{key}-{number}")
        if claim is not None:
            return claim
    return None


def least_used(devices: Sequence[str]) -> list[str]:
    """The devices, those first that fewest workers of other launches use; else as they were."""
    return sorted(devices, key=lambda device: _num_claims(device_key(device)))


def device_key(device: str) -> str:
    """A name of the device that is the same in all processes, whatever CUDA_VISIBLE_DEVICES hides.

    Imports torch for a CUDA device.
    """
    if not device.startswith("cuda"):
        return device
    import torch

    try:
        properties = torch.cuda.get_device_properties(device)
    except RuntimeError:  # it doesn't answer, which the worker's own check of it will say
        return device
    return str(getattr(properties, "uuid", None) or device)


def _num_claims(key: str) -> int:
    num_claims = 0
    for number in range(MOST_CLAIMS_OF_A_GPU):
        claim = _claim(f"gpu-{key}-{number}")
        if claim is None:
            num_claims += 1
        else:
            claim.release()
    return num_claims


def _claim(what: str) -> Claim | None:
    """None if somebody else has it."""
    if sys.platform != "linux":
        return Claim(what=what, holder=None)
    holder = socket.socket(socket.AF_UNIX)
    try:
        holder.bind(f"\0hpo-{what}")
    except OSError as error:
        with contextlib.suppress(OSError):
            holder.close()
        if error.errno == errno.EADDRINUSE:
            return None
        return Claim(what=what, holder=None)  # a kernel without such names
    return Claim(what=what, holder=holder)
