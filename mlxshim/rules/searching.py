"""Searches in sorted sequences: `mx.searchsorted` (since 0.32.1).

    i = #{j: a_j < v}  (side "left")    i = #{j: a_j <= v}  (side "right")    a: (n,)   v: (...)

with NaN above all numbers. MLX maps the values only. With a sequence for each sample all samples
are bisected at once, in 1 + floor(log2 n) steps of a gather each: no memory beyond that of v.

Source: mlx/ops.cpp, mlx/primitives.cpp, `SearchSorted`.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from ..core import levels
from ..core.interception import intercept, original
from ..core.primitive import Arrays, Axes
from ._devices import within
from ._opaque import Opaque


def _lowering(a: mx.array, v: mx.array, *, side: str) -> list[mx.array]:
    return [original(mx, "searchsorted")(a, v, side)]


def _batch(size: int, arrays: Arrays, axes: Axes, *, side: str) -> list[mx.array]:
    (a, v), (of_a, of_v) = map(mx.stop_gradient, arrays), axes
    v = mx.broadcast_to(v, (size, *v.shape)) if of_v is None else mx.moveaxis(v, of_v, 0)
    if of_a is None:
        return _search(a, v, side=side)
    return [_bisected(mx.moveaxis(a, of_a, 0), v, side)]


def _bisected(a: mx.array, v: mx.array, side: str) -> mx.array:
    """(S, n), (S, ...) -> (S, ...)"""
    size, n = a.shape
    flat, column = mx.reshape(a, (-1,)), (size, *(1,) * (v.ndim - 1))
    start = mx.reshape(mx.arange(size, dtype=mx.int64) * n, column)
    low = mx.zeros(v.shape, mx.int64)
    high = low + n
    for _ in range(n.bit_length()):
        middle = mx.right_shift(low + high, mx.array(1, mx.int64))
        element = mx.take(flat, start + mx.minimum(middle, n - 1))
        before = _less(element, v) if side == "left" else mx.logical_not(_less(v, element))
        before = mx.logical_and(before, low < high)
        low, high = mx.where(before, middle + 1, low), mx.where(before, high, middle)
    return low.astype(mx.uint32)


def _less(x: mx.array, y: mx.array) -> mx.array:
    below = mx.less(x, y)
    if not mx.issubdtype(x.dtype, mx.floating):
        return below
    return mx.logical_or(below, mx.logical_and(mx.isnan(y), mx.logical_not(mx.isnan(x))))


def _vjp(primals: Arrays, cotangents: Arrays, outputs: Arrays, **_: Any) -> list[mx.array]:
    return [mx.zeros_like(x) for x in primals]


def _jvp(primals: Arrays, tangents: Arrays, outputs: Arrays, **_: Any) -> list[mx.array]:
    return [mx.zeros_like(x) for x in outputs]


_search = Opaque("searchsorted", lowering=_lowering, batch=_batch, vjp=_vjp, jvp=_jvp)


@intercept(mx, "searchsorted")
def searchsorted(
    sorted_sequence: mx.array, values: mx.array, /, side: str = "left", *, stream: Any = None
) -> mx.array:
    raw = original(mx, "searchsorted")(sorted_sequence, values, side, stream=stream)
    if "vmap" not in levels.active():
        return raw
    # The dtype that MLX compares in.
    dtype = mx.result_type(sorted_sequence.dtype, values.dtype)
    a, v = sorted_sequence.astype(dtype), values.astype(dtype)
    with within(stream):
        return _search(a, v, side=side)[0]
