"""Indexing: reading and writing at ints, slices, None, arrays, lists and boolean masks.

    x[i]    mx.take    y[i] = u    y[mask] = u    x.at[i].add(u)

What has no array in it chooses a *window* (windows.py). What has one is gathered and scattered by
MLX, whose batching rules are right but for the places of two mapped axes: that of the cotangent of
a gather, and before 0.32.4 that of the updates of a scatter, must come first, which a reshape
brings about; and for indices of 8 and 16 bits, in which a scatter counts the samples.

A mask is a gather of the updates in their order and a `where`: the vjp of MLX's own operation
counts the mask across samples.

Source: mlx/primitives.cpp, `Gather`, `Scatter`, `MaskedScatter`; python/src/indexing.cpp.
"""

from __future__ import annotations

from types import EllipsisType
from typing import Any

import mlx.core as mx

from ..core import levels
from ..core.fronted import fronted
from ..core.interception import intercept, original
from ..core.versions import MLX, TWO_TANGENTS_BUG
from ._devices import within
from ._discrete import constant_if_empty, discrete
from ._keys import as_update, has_arrays, mask_of, parted, shaped_as, traced, updated, window_of
from ._one_entry import ONE_ENTRY_BUG, plain_steps
from ._scattered import multiplied
from .windows import become, read, reads_itself

# Reading ----------------------------------------------------------------------------------------


@intercept(mx.array, "__getitem__")
def __getitem__(x: mx.array, key: Any) -> mx.array:
    raw = original(mx.array, "__getitem__")
    if not (key is None or key is Ellipsis or type(key) is slice):
        x = constant_if_empty(x)
    if ONE_ENTRY_BUG:
        key = plain_steps(x, key)
        if reads_itself():
            part = _read_itself(x, key)
            if part is not None:
                return part
    key = discrete(key)
    kind = type(key)
    if kind is slice or key is None or kind is EllipsisType or "vmap" not in levels.active():
        return raw(x, key)
    if kind is int:
        key = (key,)
    if kind is tuple or kind is int:
        return _read(x, key, raw)
    return fronted(raw(x, _widened(key)))


def _read_itself(x: mx.array, key: Any) -> mx.array | None:
    """`x[key]` by our own node; None where it is no window, or all there is."""
    found = window_of(key, x.shape)
    if found is None:
        return None
    raw, (window, dims) = original(mx.array, "__getitem__"), found
    if not raw(x, key).size:
        return raw(mx.stop_gradient(x), key)
    if all(b == (0, n, 1) for b, n in zip(window, x.shape)):
        return None
    part = read(x, window)
    gone = [i for i, d in enumerate(d for d in dims if d is not None) if d is False]
    if gone:
        part = mx.squeeze(part, gone)
    new = [i for i, d in enumerate(d for d in dims if d is not False) if d is None]
    return mx.expand_dims(part, new) if new else part


def _read(x: mx.array, key: tuple[Any, ...], raw: Any) -> mx.array:
    nones = sum(k is None for k in key)
    ints = arrays = 0
    for k in key:
        if isinstance(k, (mx.array, list)):
            arrays += 1
        elif k is not None and not isinstance(k, (slice, EllipsisType)):
            ints += 1
    if not arrays and not ints and nones < 2:
        return raw(x, key)
    if any(k is Ellipsis for k in key):
        i = next(i for i, k in enumerate(key) if k is Ellipsis)
        missing = x.ndim - (len(key) - nones - 1)
        key = (*key[:i], *(slice(None),) * missing, *key[i + 1 :])
    if nones:  # a new axis is an axis of one that is taken whole
        x = mx.expand_dims(x, [i for i, k in enumerate(key) if k is None])
        key = tuple(slice(None) if k is None else k for k in key)
    if arrays:  # beside which an int is gathered, not squeezed
        return fronted(raw(x, tuple(_widened(k) for k in key)))
    dropped = [i for i, k in enumerate(key) if not isinstance(k, slice)]
    if len(key) > x.ndim or any(
        type(key[i]) is not int or not -x.shape[i] <= key[i] < x.shape[i] for i in dropped
    ):
        return raw(x, key)  # MLX's own message, or what it makes of it
    key = tuple(slice(k % n, k % n + 1) if type(k) is int else k for k, n in zip(key, x.shape))
    return mx.squeeze(raw(x, key), dropped)


_NARROW = (mx.uint8, mx.int8, mx.uint16, mx.int16)


def _widened(index: Any) -> Any:
    """An array of indices of a dtype in which samples can be counted; anything else as it is."""
    if isinstance(index, mx.array) and index.dtype in _NARROW:
        return index.astype(mx.int32)
    return index


@intercept(mx, "take")
def take(x: mx.array, indices: Any, axis: int | None = None, *, stream: Any = None) -> mx.array:
    raw = original(mx, "take")
    x = constant_if_empty(x)
    if type(indices) is int and reads_itself():
        if axis is None:
            x, axis = mx.reshape(x, (-1,)), 0
        if -x.ndim <= axis < x.ndim:
            with within(stream):
                return x[(*(slice(None),) * (axis % x.ndim), indices)]
    indices = discrete(indices)
    if not isinstance(indices, mx.array) or "vmap" not in levels.active():
        return raw(x, indices, axis, stream=stream)
    return fronted(raw(x, _widened(indices), axis, stream=stream))


@intercept(mx, "put_along_axis")
def put_along_axis(
    a: mx.array, /, indices: mx.array, values: Any, axis: int | None = None, *, stream: Any = None
) -> mx.array:
    raw = original(mx, "put_along_axis")
    return raw(a, discrete(indices), values, axis, stream=stream)


@intercept(mx, "take_along_axis")
def take_along_axis(
    a: mx.array, /, indices: mx.array, axis: int | None = -1, *, stream: Any = None
) -> mx.array:
    if "vmap" in levels.active() and 0 in (a.size, indices.size):
        # Its cotangent would have no mapped axis: mlx/ops.cpp, `scatter_add_axis`.
        a = mx.zeros(a.shape, a.dtype)
    return original(mx, "take_along_axis")(a, discrete(indices), axis, stream=stream)


# Writing ----------------------------------------------------------------------------------------


def _concerned() -> bool:
    stack = levels.active()
    return "vmap" in stack or (TWO_TANGENTS_BUG and "jvp" in stack)


@intercept(mx.array, "__setitem__")
def __setitem__(y: mx.array, key: Any, value: Any) -> None:
    raw = original(mx.array, "__setitem__")
    key = discrete(key)
    if ONE_ENTRY_BUG:
        key = plain_steps(y, key)
    nothing = _nothing(y, key)
    if nothing is not None:
        mx.broadcast_arrays(nothing, as_update(value, y.dtype))  # which may refuse
        return None
    apart = parted(y, key, value) if type(key) is tuple else None
    if apart is not None:
        outer, inner, value = apart
        if outer is None:
            y[inner] = value
        else:
            part = y[outer]
            part[inner] = value
            y[outer] = part
        return None
    if not _concerned():
        return raw(y, key, value)
    mask = mask_of(key)
    if mask is not None:
        if not y.size:
            return None  # MLX divides by the size of what is below a mask
        return (
            become(y, _set_where(y, mask, value)) if traced(y, mask, value) else raw(y, key, value)
        )
    new = updated(y, key, value, "set")
    if new is not None:
        return become(y, new)
    if not _MISPLACED:
        return raw(y, _all_widened(key), value)
    new = _in_front(y)
    raw(new, _all_widened(key), _in_front(value))
    return become(y, _in_front(new))


class _At:
    """What `x.at` is in a transform."""

    __slots__ = ("_array", "_key")

    def __init__(self, array: mx.array) -> None:
        self._array = array
        self._key: Any = Ellipsis

    def __getitem__(self, key: Any) -> _At:
        self._key = discrete(key)
        return self

    def add(self, value: Any) -> mx.array:
        return self._apply("add", value)

    def subtract(self, value: Any) -> mx.array:
        return self._apply("subtract", value)

    def multiply(self, value: Any) -> mx.array:
        return self._apply("multiply", value)

    def divide(self, value: Any) -> mx.array:
        return self._apply("divide", value)

    def maximum(self, value: Any) -> mx.array:
        return self._apply("maximum", value)

    def minimum(self, value: Any) -> mx.array:
        return self._apply("minimum", value)

    def _apply(self, op: str, value: Any) -> mx.array:
        x, key = self._array, self._key
        nothing = _nothing(x, key)
        if nothing is not None:
            return x + mx.zeros((), x.dtype)
        if ONE_ENTRY_BUG:
            key = plain_steps(x, key)
        apart = parted(x, key, value) if type(key) is tuple else None
        if apart is not None:
            outer, inner, value = apart
            if outer is None:
                return getattr(x.at[inner], op)(value)
            new = x.__copy__()
            new[outer] = getattr(x[outer].at[inner], op)(value)
            return new
        if op in ("multiply", "divide") and levels.differentiates() and has_arrays(key):
            u = shaped_as(as_update(value, x.dtype).astype(x.dtype), x[key].shape)
            if u is not None and mx.issubdtype(x.dtype, mx.inexact) and traced(x, u):
                u = u if op == "multiply" else mx.reciprocal(u)
                constants = mx.stop_gradient(x), key, "multiply", mx.stop_gradient(u)
                return multiplied(x, key, u, _scattered(*constants))
        if not _concerned():
            return getattr(original(mx.array, "at").fget(x)[key], op)(value)
        new = None if key is None or key is Ellipsis else updated(x, key, value, op)
        if new is not None:
            return new
        return _scattered(x, key, op, value)


def _scattered(x: mx.array, key: Any, op: str, value: Any) -> mx.array:
    places = original(mx.array, "at").fget(_in_front(x))[_all_widened(key)]
    return _in_front(getattr(places, op)(_in_front(value)))


@intercept(mx.array, "at")
def at(x: mx.array) -> Any:
    return _At(x) if levels.active() else original(mx.array, "at").fget(x)


#: A scatter misplaces a mapped axis of the array, of the updates and of the cotangent that is not
#: the first.
_MISPLACED = MLX < (0, 32, 4)


def _in_front(x: Any) -> Any:
    return fronted(x) if _MISPLACED and isinstance(x, mx.array) and x.ndim else x


def _all_widened(key: Any) -> Any:
    return tuple(_widened(k) for k in key) if type(key) is tuple else _widened(key)


def _nothing(y: mx.array, key: Any) -> mx.array | None:
    """`y[key]`, if that has no entry: MLX's scatter of no updates misreads their shape."""
    if y.size and not any(map(_may_be_empty, key if type(key) is tuple else (key,))):
        return None
    if mask_of(key) is not None:
        return None
    part = original(mx.array, "__getitem__")(y, key)
    return part if part.size == 0 else None


def _may_be_empty(k: Any) -> bool:
    if isinstance(k, slice):
        return k.stop is not None or (k.start is not None and k.start != 0)
    return isinstance(k, mx.array) and k.size == 0


# Masks ------------------------------------------------------------------------------------------


def _set_where(y: mx.array, mask: mx.array, value: Any) -> mx.array:
    """`y` where the mask is False, else one update after the other."""
    below = y.shape[mask.ndim :]
    if mask.shape != y.shape[: mask.ndim]:
        raise ValueError(
            f"[array.__setitem__] A mask of shape {mask.shape} does not fit the first dimensions "
            f"of an array of shape {y.shape}."
        )
    u = as_update(value, y.dtype).astype(y.dtype)
    if u.ndim > len(below):
        if u.ndim > len(below) + 1:
            raise ValueError(
                f"[array.__setitem__] Updates of shape {u.shape} are too many for a mask of "
                f"shape {mask.shape} and an array of shape {y.shape}."
            )
        before = mx.cumsum(mx.flatten(mask).astype(mx.int32)) - 1
        order = mx.minimum(mx.maximum(before, 0), u.shape[0] - 1)
        u = take(u, mx.reshape(order, mask.shape), 0)
    return mx.where(mx.reshape(mask, (*mask.shape, *(1,) * len(below))), u, y)
