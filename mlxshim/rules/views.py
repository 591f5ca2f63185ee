"""Pads and strided views.

    mx.pad(x, widths, constant_values=v)

is `x` written into an array of `v`, where MLX is wrong or cannot: `v` in a trace, or before 0.32.4.

    mx.as_strided(x, shape, strides, offset)

is a view of the samples one after the other; without a batching rule in MLX.

    mx.view(x, dtype)

is of the last axis: before 0.32.4 MLX's rule misplaces a mapped axis behind it. The bits of a
number are integers, and constants of every derivative.

Source: mlx/primitives.cpp, `Pad` (whose vjp and jvp know nothing of `v`), `AsStrided`, `View`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from ..core import levels
from ..core.fronted import fronted
from ..core.interception import intercept, original
from ..core.primitive import Arrays, Axes, Primitive
from ..core.tracers import is_tracer
from ..core.versions import MLX, SELECT_JVP_BUG
from ._devices import within
from .windows import Window, write

# Pads -------------------------------------------------------------------------------------------


@intercept(mx, "pad")
def pad(
    a: mx.array,
    pad_width: Any,
    mode: str = "constant",
    constant_values: Any = 0,
    *,
    stream: Any = None,
) -> mx.array:
    raw, stack = original(mx, "pad"), levels.active()
    if stack and mode == "constant":
        of_array = isinstance(constant_values, mx.array) and is_tracer(constant_values)
        if of_array or (MLX < (0, 32, 4) and "vmap" in stack):
            padded = raw(a, pad_width, mode, 0, stream=stream)
            with within(stream):
                return _written(a, padded.shape, _widths(pad_width, a.ndim), constant_values)
    elif SELECT_JVP_BUG and mode == "edge" and "jvp" in stack:
        with within(stream):
            for axis, (low, high) in enumerate(_widths(pad_width, a.ndim)):
                n = a.shape[axis]
                places = mx.clip(mx.arange(-low, n + high), 0, n - 1)
                a = mx.take(a, places, axis=axis) if low or high else a
            return a
    return raw(a, pad_width, mode, constant_values, stream=stream)


def _written(
    a: mx.array, shape: tuple[int, ...], widths: Sequence[tuple[int, int]], value: Any
) -> mx.array:
    if shape == a.shape:
        return a
    value = value if isinstance(value, mx.array) else mx.array(value)
    around = mx.broadcast_to(value.astype(a.dtype), shape)
    window: Window = tuple((low, low + n, 1) for (low, _), n in zip(widths, a.shape))
    return write(around, a, window, "set")


def _widths(pad_width: Any, ndim: int) -> list[tuple[int, int]]:
    if isinstance(pad_width, int):
        return [(pad_width, pad_width)] * ndim
    widths = list(pad_width)
    if isinstance(widths[0], int):
        return [(widths[0], widths[-1])] * ndim
    return [(low, high) for low, high in widths * (ndim if len(widths) == 1 else 1)]


# Strided views ----------------------------------------------------------------------------------


def _gathered(x: mx.array, *, shape: Any, strides: Any, offset: int) -> list[mx.array]:
    places = mx.array(offset)
    for i, (n, stride) in enumerate(zip(shape, strides)):
        step = mx.arange(n) * stride
        places = places + mx.reshape(step, (n,) + (1,) * (len(shape) - 1 - i))
    return [fronted(original(mx, "take")(mx.reshape(x, (-1,)), places, 0))]


def _view(x: mx.array, *, shape: Any, strides: Any, offset: int) -> list[mx.array]:
    # MLX refuses what a reshape to one dimension leaves strided, as it does of x[::2].
    return [original(mx, "as_strided")(mx.contiguous(x), shape, strides, offset)]


def _view_batch(
    size: int, arrays: Arrays, axes: Axes, *, shape: Any, strides: Any, offset: int
) -> tuple[list[mx.array], list[int]]:
    x = mx.moveaxis(arrays[0], axes[0] or 0, 0)
    strides = (math.prod(x.shape[1:]), *strides)
    return _strided(x, shape=(size, *shape), strides=strides, offset=offset), [0]


_strided = Primitive("as_strided", decomposition=_gathered, lowering=_view, batch=_view_batch)


@intercept(mx, "as_strided")
def as_strided(
    a: mx.array,
    /,
    shape: Any = None,
    strides: Any = None,
    offset: int = 0,
    *,
    stream: Any = None,
) -> mx.array:
    checked = original(mx, "as_strided")(a, shape, strides, offset, stream=stream)
    if "vmap" not in levels.active():
        return checked
    if strides is None:
        sizes = checked.shape
        strides = [math.prod(sizes[i + 1 :]) for i in range(len(sizes))]
    with within(stream):
        return _strided(a, shape=checked.shape, strides=tuple(strides), offset=offset)[0]


# Views as another dtype ---------------------------------------------------------------------------


def _viewing(owner: Any) -> None:
    @intercept(owner, "view")
    def view(a: Any, dtype: mx.Dtype, *args: Any, **kwargs: Any) -> mx.array:
        if isinstance(a, mx.array):
            if MLX < (0, 32, 4):
                a = fronted(a)
            if levels.differentiates() and not mx.issubdtype(dtype, mx.inexact):
                a = mx.stop_gradient(a)
        return original(owner, "view")(a, dtype, *args, **kwargs)


for _owner in (mx, mx.array):
    _viewing(_owner)
