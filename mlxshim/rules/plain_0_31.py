"""Repairs of plain operations for MLX 0.31.1 and 0.31.2, and refusals where none is cheap.

    Select::jvp      reads tangents out of bounds unless all three arguments have one. Here all do:
                     each gets a zero that depends on the others.
    ArcTan2::jvp     the same, for two.
    LogSumExp::jvp   forgets to sum.
    Divide::vmap     divides integers as floats.
    Scatter::vmap with updates (the gradient of an index and of a diagonal) misplaces an inner
    mapped axis: a reshape brings it to the front.

Imported only on these versions; delete it, and what imports it, when 0.32.0 is the oldest served.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from ..core import levels
from ..core.interception import intercept, original
from ..core.primitive import Arrays, Axes, Primitive
from .complex import refuse_reverse
from .truths import as_truth

# Forward derivatives ----------------------------------------------------------------------------


def _nothing(*arrays: mx.array) -> mx.array:
    """False, of a shape that broadcasts with the arrays, with a tangent where any of them has."""
    false = mx.array(False)
    for x in arrays:
        corner = x[(slice(0, 1),) * x.ndim]
        false = mx.logical_and(mx.logical_or(false, mx.isnan(corner)), mx.array(False))
    return false


@intercept(mx, "where")
def where(condition: Any, x: Any, y: Any, /, *, stream: Any = None) -> mx.array:
    condition = as_truth(condition)
    arrays = [z for z in (condition, x, y) if isinstance(z, mx.array)]
    if "jvp" in levels.active() and arrays:
        nothing = _nothing(*arrays)
        if not isinstance(condition, mx.array) or condition.dtype != mx.bool_:
            condition = mx.array(condition).astype(mx.bool_)
        condition = mx.logical_or(condition, nothing)
        x, y = _as_arrays(x, y)
        x, y = x + nothing.astype(x.dtype), y + nothing.astype(y.dtype)
    return original(mx, "where")(condition, x, y, stream=stream)


def _as_arrays(x: Any, y: Any) -> tuple[mx.array, mx.array]:
    """Scalars as arrays of the dtype that MLX gives them beside the other."""
    like = original(mx, "where")(mx.array(True), x, y).dtype
    x, y = (z if isinstance(z, mx.array) else mx.array(z, like) for z in (x, y))
    return x, y


def _triangle(name: str, offset: int) -> None:
    @intercept(mx, name)
    def triangle(x: mx.array, k: int = 0, *, stream: Any = None) -> mx.array:
        if "jvp" not in levels.active():
            return original(mx, name)(x, k, stream=stream)
        mask = mx.tri(x.shape[-2], x.shape[-1], k - offset, mx.bool_)
        zero = mx.zeros((), x.dtype)
        return mx.where(mask, zero, x) if offset else mx.where(mask, x, zero)


_triangle("tril", 0)
_triangle("triu", 1)


@intercept(mx, "nan_to_num")
def nan_to_num(
    x: Any, nan: Any = 0, posinf: Any = None, neginf: Any = None, *, stream: Any = None
) -> mx.array:
    floating = isinstance(x, mx.array) and mx.issubdtype(x.dtype, mx.floating)
    if not floating or "jvp" not in levels.active():
        return original(mx, "nan_to_num")(x, nan, posinf, neginf, stream=stream)
    limits = mx.finfo(x.dtype)
    x = mx.where(mx.isposinf(x), limits.max if posinf is None else posinf, x)
    x = mx.where(mx.isneginf(x), limits.min if neginf is None else neginf, x)
    return mx.where(mx.isnan(x), nan, x)


@intercept(mx, "arctan2")
def arctan2(a: Any, b: Any, *, stream: Any = None) -> mx.array:
    if "jvp" in levels.active():
        a, b = _as_arrays(a, b)
        nothing = _nothing(a, b)
        a, b = a + nothing.astype(a.dtype), b + nothing.astype(b.dtype)
    return original(mx, "arctan2")(a, b, stream=stream)


def _logsumexp(owner: Any) -> None:
    @intercept(owner, "logsumexp")
    def logsumexp(
        a: mx.array, axis: Any = None, keepdims: bool = False, *, stream: Any = None
    ) -> mx.array:
        refuse_reverse("logsumexp", a)
        stack = levels.active()
        if not ("jvp" in stack or ("vmap" in stack and type(axis) is not int)):
            return original(owner, "logsumexp")(a, axis, keepdims, stream=stream)
        sizes = mx.real(a) if a.dtype == mx.complex64 else a
        top = mx.stop_gradient(mx.max(sizes, axis=axis, keepdims=True))
        limits = mx.finfo(top.dtype)  # an infinite top would leave NaNs
        top = mx.minimum(mx.maximum(top, limits.min), limits.max)
        out = mx.log(mx.sum(mx.exp(a - top), axis=axis, keepdims=True)) + top
        return out if keepdims else mx.sum(out, axis=axis)


_logsumexp(mx)
_logsumexp(mx.array)


@intercept(mx, "softmax")
def softmax(a: mx.array, *args: Any, **kwargs: Any) -> mx.array:
    refuse_reverse("softmax", a)
    return original(mx, "softmax")(a, *args, **kwargs)


# Integer division -------------------------------------------------------------------------------


def _quotient(a: mx.array, b: mx.array) -> list[mx.array]:
    # In a trace it is thrown away, unless both are unmapped: then it is right.
    return [original(mx, "floor_divide")(mx.stop_gradient(a), mx.stop_gradient(b))]


def _batch(size: int, arrays: Arrays, axes: Axes) -> tuple[list[mx.array], list[int]]:
    ndim = max(x.ndim - (axis is not None) for x, axis in zip(arrays, axes))
    return integer_quotient(*(front(x, axis, ndim) for x, axis in zip(arrays, axes))), [0]


def front(x: mx.array, axis: int | None, ndim: int) -> mx.array:
    """`x`, its mapped axis in front of `ndim` dimensions; an unmapped one broadcasts as it is."""
    if axis is None:
        return x
    x = mx.moveaxis(x, axis, 0)
    return mx.reshape(x, (x.shape[0], *(1,) * (1 + ndim - x.ndim), *x.shape[1:]))


integer_quotient = Primitive(
    "floor_divide", decomposition=_quotient, lowering=_quotient, batch=_batch
)


def _floor_divide(owner: Any, name: str, *, reflected: bool = False, assigns: bool = False) -> None:
    @intercept(owner, name)
    def floor_divide(a: Any, b: Any, *args: Any, **kwargs: Any) -> mx.array:
        raw = original(owner, name)
        if "vmap" not in levels.active():
            return raw(a, b, *args, **kwargs)
        x, y = _as_arrays(b, a) if reflected else _as_arrays(a, b)
        if not (_integer(x) and _integer(y)):
            return raw(a, b, *args, **kwargs)
        out = integer_quotient(x, y)[0]
        if not assigns:
            return out
        a *= False  # the same array object, which others may hold too
        a += out
        return a


def _integer(x: mx.array) -> bool:
    return mx.issubdtype(x.dtype, mx.integer)


_floor_divide(mx, "floor_divide")
_floor_divide(mx.array, "__floordiv__")
_floor_divide(mx.array, "__rfloordiv__", reflected=True)
_floor_divide(mx.array, "__ifloordiv__", assigns=True)
