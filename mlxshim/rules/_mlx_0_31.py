"""Repairs that only MLX 0.31.1 and 0.31.2 need. Later versions take MLX's own functions.

Delete this file, and the two names imported from it, when 0.32.0 is the oldest version served.
"""

from __future__ import annotations

import mlx.core as mx

from ..core import levels
from ..core.versions import MOVED_SHAPE_BUG, SELECT_JVP_BUG
from ._constants import constant


def _tied_matmul(a: mx.array, b: mx.array) -> mx.array:
    """`a @ b` for equal batch dimensions, both operands mapped wherever one of them is.

    On 0.31.1 the batching rule of matmul broadcasts an unmapped operand into a node that cannot
    be transformed once more. An element-wise sum with a zero that depends on the other operand
    maps it first; element-wise broadcasting is not touched by the bug. It copies both operands, so
    it is done only where a further vmap or jvp will follow.
    """
    if sum(kind != "grad" for kind in levels.active()) > 1:
        a, b = a + _zero(b, a), b + _zero(a, b)
    return mx.matmul(a, b)


def _zero(x: mx.array, like: mx.array) -> mx.array:
    corner = mx.stop_gradient(x[(slice(0, 1),) * x.ndim])
    if x.ndim > like.ndim:  # a vector and a matrix
        corner = mx.squeeze(corner, tuple(range(x.ndim - like.ndim)))
    # `x * 0` would be NaN for an infinite x.
    return mx.logical_and(mx.isnan(corner), mx.array(False)).astype(like.dtype)


def _bounded_keep(keep: mx.array, scores: mx.array, floor: float) -> mx.array:
    """`where(keep, scores, floor)` without a traced branch of `where`, whose jvp crashes."""
    above, below = constant(float("inf"), scores.dtype), constant(floor, scores.dtype)
    return mx.minimum(scores, mx.where(mx.stop_gradient(keep), above, below))


def _where_keep(keep: mx.array, scores: mx.array, floor: float) -> mx.array:
    return mx.where(keep, scores, constant(floor, scores.dtype))


matmul = _tied_matmul if MOVED_SHAPE_BUG else mx.matmul
keep_where = _bounded_keep if SELECT_JVP_BUG else _where_keep
