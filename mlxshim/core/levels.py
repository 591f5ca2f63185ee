"""Levels: which transforms are being traced, innermost last, in this thread.

A level is pushed for exactly as long as the user's function runs. MLX calls batching and vjp
rules after that function has returned, when the level has been popped: a rule therefore sees the
levels *around* the transform it serves, and an empty stack at the outermost one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Literal, TypeVar

R = TypeVar("R")
Kind = Literal["vmap", "grad", "jvp"]


class _Levels(threading.local):
    def __init__(self) -> None:
        self.stack: list[Kind] = []


_levels = _Levels()


def active() -> list[Kind]:
    """The kinds of the active levels of this thread, outermost first. Not to be changed."""
    return _levels.stack


def at_level(kind: Kind, fun: Callable[..., R]) -> Callable[..., R]:
    """`fun`, run one level of `kind` deeper; the level is popped on every way out."""

    # Bare on purpose: this runs at every trace, and nobody but a transform sees it.
    def traced(*args: object, **kwargs: object) -> R:
        stack = _levels.stack
        stack.append(kind)
        try:
            return fun(*args, **kwargs)
        finally:
            stack.pop()

    return traced
