"""Puts something of ours before and after a function of the product.

A name that is not there any more is an error: a point that nobody passes would test nothing.
"""

import functools
from collections.abc import Callable
from typing import Any

from benchmarks.chaos.faults import point

Hook = Callable[..., None]


def replace(owner: Any, name: str, make: Callable[[Any], Any]) -> None:
    """Its attribute `name` by what is made of it."""
    setattr(owner, name, make(getattr(owner, name)))


def around(owner: Any, name: str, *, before: Hook | None = None, after: Hook | None = None) -> None:
    """before(*args, **kwargs); after(result, *args, **kwargs), unless the call raises."""

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if before is not None:
                before(*args, **kwargs)
            result = original(*args, **kwargs)
            if after is not None:
                after(result, *args, **kwargs)
            return result

        return wrapped

    replace(owner, name, make)


def passes(name: str) -> Hook:
    """A hook that passes a fault point."""

    def hook(*_: Any, **__: Any) -> None:
        point(name)

    return hook
