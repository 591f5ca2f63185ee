"""A function that is run again draws the same random numbers again.

MLX's graph holds no second derivative of what was traced once: a pullback, a tangent map and a
recomputation run the function anew. The draws without a key have to be those of the first run,
or the derivative would be of another function. The second run takes its keys from a chain of its
own that starts where MLX's global state stood at the first, and leaves that state alone.

Source: python/src/random.cpp (`PyKeySequence::next`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

import mlx.core as mx

from . import levels

R = TypeVar("R")


class _Local(threading.local):
    def __init__(self) -> None:
        #: The state of the run that is repeated, in a list as MLX has it; None in a first run.
        self.chain: list[mx.array] | None = None


_local = _Local()


def chain() -> list[mx.array] | None:
    """The random state of a repeated run, to be moved on by who draws; None in a first run."""
    return _local.chain


def same_draws(fun: Callable[..., R], start: list[mx.array] | None = None) -> Callable[..., R]:
    """`fun`, whose later calls draw what its first call drew.

    The later calls must run inside a level, where draws are intercepted. `start` is where the
    beginning of the first call's draws is kept: an empty list, for whoever makes several of these.
    """
    start = [] if start is None else start

    def run(*args: Any, **kwargs: Any) -> R:
        outer = _local.chain
        if levels.is_abstract():
            return fun(*args, **kwargs)  # nothing is drawn
        if not start:
            start.append(outer[0] if outer is not None else mx.random.state[0])  # pyright: ignore
            return fun(*args, **kwargs)
        _local.chain = [start[0]]
        try:
            return fun(*args, **kwargs)
        finally:
            _local.chain = outer

    return run
