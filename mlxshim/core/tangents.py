"""Tangents that samples share.

MLX's tangent of a product of which both factors have one is `addmm(dA B, A dB)`, and its batching
rule for that wants the first term mapped wherever the other is not, or MLX refuses: `[addmm] input
c must broadcast`. A vmap that meets this is traced once more, with tangents of each sample's own.

Source: mlx/primitives.cpp, `Matmul::jvp` and `AddMM::vmap`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import mlx.core as mx

from . import levels

R = TypeVar("R")


def tied(tangents: Sequence[mx.array]) -> Sequence[mx.array]:
    """The tangents, mapped by every vmap that asks for it."""
    for level in levels.vmaps():
        if level.ties and level.mapped is not None:
            corner = mx.stop_gradient(level.mapped)[(slice(0, 1),) * level.mapped.ndim]
            # Not a product with zero, which infinities do not have.
            zero = mx.any(mx.logical_and(mx.isnan(corner), mx.array(False)))
            tangents = [t + zero.astype(t.dtype) for t in tangents]
    return tangents


def tying(level: levels.VmapLevel, run: Callable[[], R]) -> R:
    """`run()`, the trace of a vmap; with its tangents tied where MLX lacks a mapped one."""
    try:
        return run()
    except Exception as e:
        if level.ties or not lacks_a_mapped_tangent(e):
            raise
    level.ties, level.calls = True, 0
    return run()


def lacks_a_mapped_tangent(error: Exception) -> bool:
    return "[addmm] input c must broadcast to the output shape" in str(error)
