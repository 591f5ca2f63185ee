"""Inside a vmap nothing is compiled: a compiled function runs as it is written.

MLX inlines a compiled function that is called with a tracer, and compiles the others, once. What
such a function captures is kept with it: a mapped array that it reads, or a key of its own for
each sample, would be there still when the vmap is long over, and a draw that was compiled before
is one for all samples. `mx.disable_compile` is the switch; it is the whole process's.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import mlx.core as mx

R = TypeVar("R")

_lock = threading.Lock()
_users = 0
_switched = False


def switch_off() -> None:
    """Until as many calls of `switch_back`; the user's own switch is respected."""
    global _users, _switched
    with _lock:
        if _users == 0:
            _switched = _is_on()
            if _switched:
                mx.disable_compile()
        _users += 1


def switch_back() -> None:
    global _users
    with _lock:
        _users -= 1
        if _users == 0 and _switched:
            mx.enable_compile()


def always(compiled: Callable[..., R]) -> Callable[..., R]:
    """`compiled`, which is what MLX compiled even inside a vmap."""

    def call(*args: Any) -> R:
        if not _users or not _switched:
            return compiled(*args)
        mx.enable_compile()
        try:
            return compiled(*args)
        finally:
            mx.disable_compile()

    return call


def _is_on() -> bool:
    # There is no getter: a compiled function that has been called before is not called again.
    probe, calls = _probe()
    x = _argument()
    for _ in range(2):
        before = len(calls)
        probe(x)
        if len(calls) == before:
            return True
    calls.clear()
    return False


@functools.cache
def _probe() -> tuple[Callable[[mx.array], mx.array], list[None]]:
    calls: list[None] = []

    def probed(x: mx.array) -> mx.array:
        calls.append(None)
        return x

    return mx.compile(probed), calls


@functools.cache
def _argument() -> mx.array:
    return mx.array(0)
