"""Reshapes: one view, where the graph is kept.

    reshape(x, shape)               samples are one more dimension in front

MLX's batching rule moves the mapped axis to the front by a transpose, also where it is there. As a
primitive a reshape of all samples is one view. `x.reshape()`, kept or not, is one to no dimensions,
as in JAX, where MLX dies of it.

Source: mlx/primitives.cpp, `Reshape::vmap`.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from ..core import levels
from ..core.interception import intercept, original
from ..core.primitive import Arrays, Axes, Primitive
from ..core.tracers import is_marked
from ._folding import front


def _raw(x: mx.array, *, shape: tuple[int, ...]) -> list[mx.array]:
    return [original(mx, "reshape")(x, shape)]


def _batch(
    size: int, arrays: Arrays, axes: Axes, *, shape: tuple[int, ...]
) -> tuple[list[mx.array], list[int]]:
    return reshaped(front(arrays[0], axes[0], size), shape=(size, *shape)), [0]


def _vjp(
    primals: Arrays, cotangents: Arrays, outputs: Arrays, *, shape: tuple[int, ...]
) -> list[mx.array]:
    return [_bound(cotangents[0], original(mx, "reshape")(cotangents[0], primals[0].shape))]


def _bound(x: mx.array, out: mx.array) -> mx.array:
    """A node that nothing maps is left in the graph, which MLX could not export then."""
    return reshaped(x, shape=out.shape)[0] if is_marked(out) else out


reshaped = Primitive("reshape", decomposition=_raw, lowering=_raw, batch=_batch, vjp=_vjp)


def _reshaping(owner: Any) -> None:
    @intercept(owner, "reshape")
    def reshape(a: mx.array, *shape: Any, **options: Any) -> mx.array:
        if owner is mx.array and not shape and not options:
            shape = ((),)  # MLX reads past the end of no sizes
        out = original(owner, "reshape")(a, *shape, **options)
        if not levels.is_kept() or options or out.shape == a.shape:
            return out
        return _bound(a, out)


_reshaping(mx)
_reshaping(mx.array)
