"""Random streams that depend on the seed that they are given, and on nothing else."""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor


def derived_seed(*parts: int | str) -> int:
    """A seed in [0, 2**63) that is the same for the same parts, and unrelated for others."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def seeded_generator(*parts: int | str) -> torch.Generator:
    """A CPU generator with the seed of these parts."""
    return torch.Generator().manual_seed(derived_seed(*parts))


@contextmanager
def own_randomness(*parts: int | str, device: str = "cpu") -> Iterator[None]:
    """torch's global random state, of the CPU and of device, has the seed of these parts inside.

    Dropout and stochastic depth draw from it. Afterwards it is what it was before.
    """
    generators = _global_generators(device)
    before = [generator.get_state() for generator in generators]
    try:
        reseed(*parts, device=device)
        yield
    finally:
        for generator, state in zip(generators, before, strict=True):
            generator.set_state(state)


def reseed(*parts: int | str, device: str = "cpu") -> None:
    """Give torch's global random state, of the CPU and of device, the seed of these parts."""
    for generator in _global_generators(device):
        generator.manual_seed(derived_seed(*parts))


def random_states(device: str) -> dict[str, Tensor]:
    """torch's global random state, of the CPU and of device, by kind of device."""
    return {each.device.type: each.get_state() for each in _global_generators(device)}


def set_random_states(states: Mapping[str, Tensor], *, device: str) -> None:
    """Of random_states(); a device of another kind than those keeps the state that it has."""
    for generator in _global_generators(device):
        if generator.device.type in states:
            generator.set_state(states[generator.device.type])


def _global_generators(device: str) -> list[torch.Generator]:
    where = torch.device(device)
    if where.type == "cuda":
        torch.cuda.init()  # type: ignore[no-untyped-call]
        return [torch.default_generator, torch.cuda.default_generators[where.index or 0]]
    if where.type == "mps":
        return [torch.default_generator, torch.mps._get_default_mps_generator()]
    return [torch.default_generator]
