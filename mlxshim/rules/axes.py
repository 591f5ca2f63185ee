"""Several axes at once: expand_dims, squeeze, reductions.

MLX's batching rule of ExpandDims decides whether a new axis comes before the mapped one by the
mapped axis' place in the input. With several new axes that is wrong unless the mapped axis is the
first, or the new ones all but the first come last: the result has a transposed shape, or the right
shape and wrong numbers. Squeeze's vjp, Reduce's jvp and every index are made of it. One axis at a
time is always right, and moves nothing.

A reduction over no entries of an array that is not row contiguous, which the mapped axis makes of
many, is whatever was in the memory on the CPU, or does not end. Where the result is a constant, it
is one here: no derivative, whose backward pass may sum over nothing as well, goes through it.

Source: mlx/primitives.cpp, `ExpandDims::vmap`, `Squeeze::vjp`, `Reduce::jvp`;
mlx/backend/cpu/reduce.cpp, `reduction_op`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from ..core import levels
from ..core.fronted import fronted
from ..core.interception import intercept, original
from ..core.versions import MLX
from .complex import lengths, refuse_reverse
from .complex import std as complex_std


def _unsafe(axes: Any, ndim: int) -> list[int] | None:
    """`axes` of an array of `ndim` dimensions, in order, if they must not be expanded at once."""
    if not isinstance(axes, (tuple, list)) or len(axes) < 2 or "vmap" not in levels.active():
        return None
    if any(type(axis) is not int or not -ndim <= axis < ndim for axis in axes):
        return None  # MLX's own message
    ordered = sorted({axis % ndim for axis in axes})
    if len(ordered) != len(axes):
        return None
    others = ndim - len(ordered)
    # `axis - j` dimensions that stay come before the j-th of the axes.
    return ordered if any(axis - j < others for j, axis in enumerate(ordered) if j) else None


def _within(a: mx.array, axis: Any) -> mx.array:
    """`a`, whose mapped axis comes first where a derivative around this vmap is mapped itself.

    An axis that is mapped further out is then one of several that stay, as in the sample.
    """
    stack = levels.active()
    if type(axis) is int or stack.count("vmap") < 2:
        return a
    outer, inner = stack.index("vmap"), len(stack) - 1 - stack[::-1].index("vmap")
    return fronted(a) if any(kind != "vmap" for kind in stack[outer:inner]) else a


def _expand(a: mx.array, axes: Sequence[int], stream: Any) -> mx.array:
    for axis in axes:
        a = original(mx, "expand_dims")(a, axis, stream=stream)
    return a


def _squeeze(a: mx.array, axes: Sequence[int], stream: Any) -> mx.array:
    for axis in reversed(axes):
        a = original(mx, "squeeze")(a, axis, stream=stream)
    return a


@intercept(mx, "expand_dims")
def expand_dims(a: mx.array, axis: Any, *, stream: Any = None) -> mx.array:
    several = isinstance(axis, (tuple, list)) and _unsafe(axis, a.ndim + len(axis))
    if not several:
        return original(mx, "expand_dims")(a, axis, stream=stream)
    return _expand(a, several, stream)


def _squeezing(owner: Any) -> None:
    @intercept(owner, "squeeze")
    def squeeze(a: mx.array, axis: Any = None, *, stream: Any = None) -> mx.array:
        if "vmap" in levels.active():
            axes = [i for i, n in enumerate(a.shape) if n == 1] if axis is None else axis
            several = _unsafe(axes, a.ndim)
            if several:
                return _squeeze(a, several, stream)
        return original(owner, "squeeze")(a, axis, stream=stream)


# Reductions -------------------------------------------------------------------------------------


_OF_NOTHING = {"sum": 0, "prod": 1, "any": 0, "all": 1}


def _over_nothing(
    owner: Any, name: str, a: mx.array, axis: Any, keepdims: bool, *, stream: Any = None
) -> mx.array:
    out = original(owner, name)(a, axis, keepdims, stream=stream)  # for its shape and dtype
    # To a bare number mx.full does not give the dtype bool.
    return mx.full(out.shape, mx.array(_OF_NOTHING[name], out.dtype), stream=stream)


def _summing(owner: Any, name: str) -> None:
    """Sums keep the reduced axes and lose them one by one."""

    @intercept(owner, name)
    def reduce(
        a: mx.array, axis: Any = None, keepdims: bool = False, *args: Any, **kwargs: Any
    ) -> mx.array:
        if name in ("var", "std"):
            refuse_reverse(name, a)
        if not a.size:
            if name in _OF_NOTHING:
                return _over_nothing(owner, name, a, axis, keepdims, *args, **kwargs)
            a = mx.contiguous(a)  # not a number, nor is its derivative
        if name == "std" and (out := complex_std(a, axis, keepdims, *args, **kwargs)) is not None:
            return out
        a = _within(a, axis)
        several = None if keepdims else _unsafe(axis, a.ndim)
        if not several:
            return original(owner, name)(a, axis, keepdims, *args, **kwargs)
        out = original(owner, name)(a, axis, True, *args, **kwargs)
        return _squeeze(out, several, kwargs.get("stream"))


def _selecting(owner: Any, name: str) -> None:
    """Extrema and products have expand_dims in their derivative: the reduced axes go last."""

    @intercept(owner, name)
    def reduce(a: mx.array, axis: Any = None, keepdims: bool = False, *, stream: Any = None) -> Any:
        if name == "prod":
            refuse_reverse(name, a)
        if not a.size and name in _OF_NOTHING:
            return _over_nothing(owner, name, a, axis, keepdims, stream=stream)
        a = _within(a, axis)
        several = _unsafe(axis, a.ndim)
        if not several:
            return original(owner, name)(a, axis, keepdims, stream=stream)
        a = _to_the_end(a, several, stream)
        out = original(owner, name)(a, _last(several), False, stream=stream)
        if not keepdims:
            return out
        if isinstance(out, mx.array):
            return _expand(out, several, stream)
        return tuple(_expand(x, several, stream) for x in out)


def _asking(owner: Any, name: str) -> None:
    @intercept(owner, name)
    def reduce(
        a: mx.array, axis: Any = None, keepdims: bool = False, *, stream: Any = None
    ) -> mx.array:
        if a.size:
            return original(owner, name)(a, axis, keepdims, stream=stream)
        return _over_nothing(owner, name, a, axis, keepdims, stream=stream)


def _to_the_end(a: mx.array, axes: Sequence[int], stream: Any) -> mx.array:
    stay = [i for i in range(a.ndim) if i not in axes]
    return mx.transpose(a, (*stay, *axes), stream=stream)


def _last(axes: Sequence[int]) -> tuple[int, ...]:
    return tuple(range(-len(axes), 0))


def _norm(owner: Any, name: str) -> None:
    @intercept(owner, name)
    def norm(
        a: mx.array,
        /,
        ord: Any = None,
        axis: Any = None,
        keepdims: bool = False,
        *,
        stream: Any = None,
    ) -> mx.array:
        if not _is_of_singular_values(ord, axis, a.ndim):
            a = a if (found := lengths(a, stream)) is None else found
        a = a if a.size else mx.contiguous(a, stream=stream)
        several = _unsafe(axis, a.ndim)
        if axis is None or not several:
            return original(owner, name)(a, ord, axis, keepdims, stream=stream)
        # In the caller's order, which a matrix norm tells apart.
        a = _to_the_end(a, [i % a.ndim for i in axis], stream)
        out = original(owner, name)(a, ord, _last(several), False, stream=stream)
        return _expand(out, several, stream) if keepdims else out


def _is_of_singular_values(ord: Any, axis: Any, ndim: int) -> bool:
    """Whether a norm is not that of the lengths of complex entries."""
    count = len(axis) if isinstance(axis, (tuple, list)) else 1 if axis is not None else ndim
    return ord == "nuc" or (ord in (2, -2) and count != 1)


_norm(mx.linalg, "norm")
if hasattr(mx, "matrix_norm"):
    _norm(mx, "matrix_norm")
#: plain_0_31.py and sorting.py have them.
_ELSEWHERE = ({"logsumexp"} if MLX < (0, 32, 0) else set()) | (
    {"median"} if MLX < (0, 32, 4) else set()
)


@intercept(mx, "einsum")
def einsum(*operands: Any, **options: Any) -> mx.array:
    """What it sums it squeezes at once: the mapped axis of its cotangent must come first."""
    placed = [_within(x, None) if isinstance(x, mx.array) else x for x in operands]
    return fronted(original(mx, "einsum")(*placed, **options))


_squeezing(mx)
_squeezing(mx.array)
for _owner in (mx, mx.array):
    for _name in {"sum", "mean", "var", "std", "logsumexp"} - _ELSEWHERE:
        _summing(_owner, _name)
    for _name in {"max", "min", "prod", "median", "minmax"} - _ELSEWHERE:
        if hasattr(_owner, _name):
            _selecting(_owner, _name)
    for _name in ("any", "all"):
        _asking(_owner, _name)


# The place of an extremum of all entries ---------------------------------------------------------


def _placing(owner: Any, name: str) -> None:
    @intercept(owner, name)
    def place(
        a: mx.array, /, axis: int | None = None, keepdims: bool = False, *, stream: Any = None
    ) -> mx.array:
        raw = original(owner, name)
        if axis is not None or not keepdims or "vmap" not in levels.active():
            return raw(a, axis, keepdims, stream=stream)
        return mx.reshape(raw(a, stream=stream), (1,) * a.ndim, stream=stream)


for _owner in (mx, mx.array):
    for _name in ("argmax", "argmin"):
        _placing(_owner, _name)
