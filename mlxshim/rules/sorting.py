"""Sorting, repaired for MLX before 0.32.4: `mx.sort`, `argsort`, `partition`, `topk`, `median`, …

    sort(x) = take_along_axis(x, argsort(x))
    partition(x, k) = take_along_axis(x, argpartition(x, k))

MLX's batching rule of a sort keeps a negative axis, which then counts from the end of an array that
has one axis more: here it counts from the front before MLX sees it. That of a partition loses k,
and flattens the array: here it is a primitive. The gradient of a sort gathers where it should
scatter (0.31), that of a partition cannot be mapped (0.31), and second derivatives of both are
wrong (0.32.0): here the order is constant, and the values are taken in it.

Source: mlx/ops.cpp, `median`; mlx/primitives.cpp, `Sort`, `ArgSort`, `Partition`, `ArgPartition`.
Delete when 0.32.4 is the oldest served.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from ..core import levels
from ..core.interception import intercept, original
from ..core.primitive import Arrays, Axes, Primitive
from ._devices import within


def _from_the_front(a: mx.array, axis: int | None) -> tuple[mx.array, int]:
    return (mx.reshape(a, (-1,)), 0) if axis is None else (a, axis % a.ndim)


# Orders -----------------------------------------------------------------------------------------


@intercept(mx, "argsort")
def argsort(a: mx.array, /, axis: int | None = -1, *, stream: Any = None) -> mx.array:
    if levels.active() and axis is not None and -a.ndim <= axis < a.ndim:
        a, axis = mx.stop_gradient(a), axis % a.ndim
    return original(mx, "argsort")(a, axis, stream=stream)


def _argpartition(a: mx.array, *, kth: int, axis: int) -> list[mx.array]:
    # In a trace this is thrown away, unless `a` is unmapped: then it is right.
    return [original(mx, "argpartition")(mx.stop_gradient(a), kth, axis)]


def _batch(
    size: int, arrays: Arrays, axes: Axes, *, kth: int, axis: int
) -> tuple[list[mx.array], list[int]]:
    place = axes[0] or 0
    return _parted(arrays[0], kth=kth, axis=axis + (axis >= place)), [place]


_parted = Primitive(
    "argpartition", decomposition=_argpartition, lowering=_argpartition, batch=_batch
)


@intercept(mx, "argpartition")
def argpartition(
    a: mx.array, /, kth: int, axis: int | None = -1, *, stream: Any = None
) -> mx.array:
    raw = original(mx, "argpartition")
    if not levels.active():
        return raw(a, kth, axis, stream=stream)
    raw(a, kth, axis, stream=stream)  # MLX's own messages; thrown away
    with within(stream):
        a, axis = _from_the_front(mx.stop_gradient(a), axis)
        return _parted(a, kth=kth, axis=axis)[0]


# Values -----------------------------------------------------------------------------------------


@intercept(mx, "sort")
def sort(a: mx.array, /, axis: int | None = -1, *, stream: Any = None) -> mx.array:
    raw, stack = original(mx, "sort"), levels.active()
    if not stack or a.ndim == 0 or (axis is not None and not -a.ndim <= axis < a.ndim):
        return raw(a, axis, stream=stream)
    with within(stream):
        a, axis = _from_the_front(a, axis)
        if "grad" in stack or "jvp" in stack:
            return mx.take_along_axis(a, argsort(a, axis), axis)
        return raw(a, axis)


@intercept(mx, "partition")
def partition(a: mx.array, /, kth: int, axis: int | None = -1, *, stream: Any = None) -> mx.array:
    raw = original(mx, "partition")(a, kth, axis, stream=stream)
    if not levels.active():
        return raw
    with within(stream):
        a, axis = _from_the_front(a, axis)
        return mx.take_along_axis(a, argpartition(a, kth, axis), axis)


@intercept(mx, "topk")
def topk(a: mx.array, /, k: int, axis: int | None = -1, *, stream: Any = None) -> mx.array:
    raw = original(mx, "topk")(a, k, axis, stream=stream)
    if not levels.active():
        return raw
    with within(stream):
        a, axis = _from_the_front(a, axis)
        n = a.shape[axis]
        if k == n:
            return a
        order = argpartition(a, n - k, axis)
        last = (*(slice(None),) * axis, slice(n - k, n))
        return mx.take_along_axis(a, order[last], axis)


@intercept(mx, "median")
def median(
    a: mx.array, /, axis: Any = None, keepdims: bool = False, *, stream: Any = None
) -> mx.array:
    raw = original(mx, "median")(a, axis, keepdims, stream=stream)
    if not levels.active() or a.ndim == 0:
        return raw
    several = axis if isinstance(axis, (tuple, list)) else [axis]
    axes = sorted(i % a.ndim for i in (range(a.ndim) if axis is None else several))
    stay = [i for i in range(a.ndim) if i not in axes]
    with within(stream):
        a = mx.reshape(mx.transpose(a, (*stay, *axes)), (*(a.shape[i] for i in stay), -1))
        a = sort(a, a.ndim - 1)
        n = a.shape[-1]
        out = mx.take(a, n // 2, axis=-1).astype(raw.dtype)
        if n % 2 == 0:
            out = (out + mx.take(a, n // 2 - 1, axis=-1).astype(raw.dtype)) * 0.5
        return mx.expand_dims(out, axes) if keepdims else out
