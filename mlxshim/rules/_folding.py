"""Samples folded into a dimension that an operation already has: shapes, streams, and the loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from ..core import levels
from ..core.primitive import Arrays, Axes
from ..core.tracers import is_marked, is_tracer
from . import _devices


def may_be_mapped(result: mx.array) -> bool:
    """Whether the call that MLX answered with `result` can depend on a mapped argument."""
    return "vmap" in levels.active() and is_tracer(result)


def is_ours(x: mx.array) -> bool:
    """Whether a rule serves a call that MLX maps rightly, but decomposed or with more views.

    That is under a vmap on a GPU, whose kernels the rule reaches, and where the graph is kept.
    """
    if "vmap" not in levels.active():
        return False
    return _devices.gpu() or (levels.is_kept() and is_marked(x))


def on_stream(stream: Any, fun: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if stream is None:
        return fun(*args, **kwargs)
    with mx.stream(stream):
        return fun(*args, **kwargs)


def front(x: mx.array, axis: int | None, size: int) -> mx.array:
    """`x` with its mapped axis first; an unmapped one as a view that repeats it."""
    if axis is None:
        return mx.broadcast_to(mx.expand_dims(x, 0), (size, *x.shape))
    return x if axis == 0 else mx.moveaxis(x, axis, 0)


def pad_dims(x: mx.array, ndim: int, keep: int = 1) -> mx.array:
    """`x` with dimensions of one after its first `keep`, up to `ndim` in all."""
    missing = ndim - x.ndim
    return mx.expand_dims(x, tuple(range(keep, keep + missing))) if missing > 0 else x


def aligned(size: int, arrays: Arrays, axes: Axes) -> list[mx.array]:
    """Arrays that broadcast with each other, the mapped axes first; an unmapped one as it is."""
    ndim = 1 + max(sample_ndim(x, axis) for x, axis in zip(arrays, axes))
    return [
        x if axis is None else pad_dims(front(x, axis, size), ndim) for x, axis in zip(arrays, axes)
    ]


def sum_to(x: mx.array, shape: Sequence[int]) -> mx.array:
    """The transpose of broadcasting an array of that shape."""
    extra = x.ndim - len(shape)
    axes = [*range(extra)]
    axes += [extra + i for i, n in enumerate(shape) if n == 1 and x.shape[extra + i] != 1]
    return mx.reshape(mx.sum(x, axis=axes), shape) if axes else x


def broadcast_shape(*shapes: tuple[int, ...]) -> tuple[int, ...]:
    """What shapes that fit each other broadcast to."""
    ndim = max(len(s) for s in shapes)
    padded = [(1,) * (ndim - len(s)) + tuple(s) for s in shapes]
    return tuple(next((n for n in sizes if n != 1), 1) for sizes in zip(*padded))


def sample_ndim(x: mx.array, axis: int | None) -> int:
    return x.ndim - (axis is not None)


def sample_shape(x: mx.array, axis: int | None) -> tuple[int, ...]:
    """The shape of one sample of `x`."""
    return tuple(n for i, n in enumerate(x.shape) if i != axis)


def loop_batch(
    bind: Callable[..., list[mx.array]], size: int, arrays: Arrays, axes: Axes, **static: Any
) -> tuple[list[mx.array], list[int]]:
    """The batching rule of an operation without a batch dimension: a call for each sample."""
    samples = [
        bind(*(x if a is None else mx.take(x, i, a) for x, a in zip(arrays, axes)), **static)
        for i in range(size)
    ]
    outputs = [mx.stack(list(column)) for column in zip(*samples)]
    return outputs, [0] * len(outputs)
