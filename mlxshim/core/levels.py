"""Levels: which transforms are being traced, innermost last, in this thread.

A level is pushed for exactly as long as the user's function runs. MLX calls batching and vjp
rules after that function has returned, when the level has been popped: a rule therefore sees the
levels *around* the transform it serves, and an empty stack at the outermost one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Literal, TypeVar

import mlx.core as mx

from . import compilation

R = TypeVar("R")
Kind = Literal["vmap", "grad", "jvp"]


class VmapLevel:
    """What rules and collectives may ask of one active vmap."""

    __slots__ = ("axis_name", "depth", "mapped", "randomness", "size")

    def __init__(self, axis_name: object, size: int, randomness: str) -> None:
        self.axis_name = axis_name
        self.size = size
        self.randomness = randomness
        #: A tracer of this level that is mapped for certain: one of its inputs.
        self.mapped: mx.array | None = None
        #: How many vmap levels are around this one.
        self.depth = 0


class _Levels(threading.local):
    def __init__(self) -> None:
        self.stack: list[Kind] = []
        self.vmaps: list[VmapLevel] = []


_levels = _Levels()


def active() -> list[Kind]:
    """The kinds of the active levels of this thread, outermost first. Not to be changed."""
    return _levels.stack


def vmaps() -> list[VmapLevel]:
    """The active vmap levels of this thread, outermost first. Not to be changed."""
    return _levels.vmaps


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


def at_vmap(level: VmapLevel, fun: Callable[..., R]) -> Callable[..., R]:
    """`fun`, run inside one more vmap, whose first argument is a mapped tracer."""

    def traced(mapped: mx.array, *args: object, **kwargs: object) -> R:
        local = _levels
        level.mapped, level.depth = mapped, len(local.vmaps)
        if level.depth == 0:
            compilation.switch_off()
        local.stack.append("vmap")
        local.vmaps.append(level)
        try:
            return fun(*args, **kwargs)
        finally:
            local.stack.pop()
            local.vmaps.pop()
            level.mapped = None
            if level.depth == 0:
                compilation.switch_back()

    return traced
