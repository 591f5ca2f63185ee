"""What a key says: the window that ints and slices choose, arrays apart from it, a mask, updates.

Source: python/src/indexing.cpp.
"""

from __future__ import annotations

import operator
from types import EllipsisType
from typing import Any

import mlx.core as mx

from ..core.interception import original
from ..core.tracers import is_tracer
from .windows import Window, is_whole, of_all, write


def parted(
    y: mx.array, key: tuple[Any, ...], value: Any
) -> tuple[tuple[Any, ...] | None, tuple[Any, ...], Any] | None:
    """The window, what indexes it, and the updates: slices, ints and new axes kept from arrays.

    The vjp of MLX's scatter takes a slice behind an array, whole or not, for one entry, and its
    updates for as many dimensions as the array: `y[i, 1:] = u` is `p = y[:, 1:]; p[i] = u;
    y[:, 1:] = p`, and `y[i, :] = u` is `y[i] = u`.
    """
    arrays = [k for k in key if isinstance(k, (mx.array, list))]
    there = sum(k is not None and k is not Ellipsis for k in key)
    if not arrays or there > y.ndim or sum(k is Ellipsis for k in key) > 1:
        return None  # nothing to do, or MLX's own message
    if len(arrays) == len(key) or any(mask_of(k) is not None for k in arrays):
        return None
    at = next((i for i, k in enumerate(key) if k is Ellipsis), len(key))
    whole = (slice(None),) * (y.ndim - there)
    outer: list[Any] = []
    inner: list[Any] = []
    for k in (*key[:at], *whole, *key[at + 1 :]):
        if k is None or isinstance(k, (mx.array, list)):
            inner.append(k)
            outer += [slice(None)] * (k is not None)
        elif isinstance(k, slice):
            n = y.shape[len(outer)]
            outer.append(slice(None) if k.indices(n) == (0, n, 1) else k)
            inner.append(slice(None))
        elif type(k) is int:
            outer.append(k)
        else:
            return None
    window = tuple(outer) if any(k != slice(None) for k in outer) else None
    part = y if window is None else original(mx.array, "__getitem__")(y, window)
    new_axes = len(arrays) == 1 and any(k is None for k in inner)
    if new_axes:
        value = as_update(value, y.dtype)
        indexed = original(mx.array, "__getitem__")(part, tuple(inner))
        extra = max(value.ndim - indexed.ndim, 0)
        if any(n != 1 for n in value.shape[:extra]):
            return None
        value = mx.broadcast_to(mx.reshape(value, value.shape[extra:]), indexed.shape)
        inner = [k for k in inner if k is not None]
        value = mx.reshape(value, original(mx.array, "__getitem__")(part, tuple(inner)).shape)
    while isinstance(inner[-1], slice):
        inner.pop()
    behind = key[-1] is Ellipsis or isinstance(key[-1], slice)
    return (window, tuple(inner), value) if window or new_axes or behind else None


def has_arrays(key: Any) -> bool:
    return any(isinstance(k, (mx.array, list)) for k in (key if type(key) is tuple else (key,)))


def shaped_as(u: mx.array, shape: tuple[int, ...]) -> mx.array | None:
    """`u` broadcast to that shape, as updates are; None if it does not fit."""
    extra = max(u.ndim - len(shape), 0)
    if any(n != 1 for n in u.shape[:extra]):
        return None
    u = mx.reshape(u, u.shape[extra:]) if extra else u
    fits = all(n in (1, m) for n, m in zip(u.shape[::-1], shape[::-1]))
    return mx.broadcast_to(u, shape) if fits else None


def traced(*operands: Any) -> bool:
    return any(isinstance(x, mx.array) and is_tracer(x) for x in operands)


def updated(y: mx.array, key: Any, value: Any, op: str) -> mx.array | None:
    """`y` with its window at `key` updated; None where MLX's own function is to do it."""
    found = window_of(key, y.shape)
    if found is None or not traced(y, value):
        return None
    window, dims = found
    if any(stop is not None and step > 0 and stop <= start for start, stop, step in window):
        return None
    whole = is_whole(window, y.shape)
    if whole and op == "set":
        return None  # of which nothing is left
    u = as_update(value, y.dtype)
    if op == "subtract":
        u, op = mx.negative(u), "add"
    elif op == "divide":
        u, op = mx.reciprocal(u), "multiply"
    shape = _placed(u.shape, dims)
    if shape is None:
        return None
    if shape != u.shape:
        u = mx.reshape(u, shape)
    u = u.astype(y.dtype)
    # As MLX has it: of two equals `maximum` takes the first, a window's update would take both.
    return of_all(y, u, op) if whole else write(y, u, window, op)


def window_of(key: Any, shape: tuple[int, ...]) -> tuple[Window, list[bool | None]] | None:
    """The window at `key`, and what its dimensions are in `y[key]`: there, gone, or new (None)."""
    keys = list(key) if type(key) is tuple else [key]
    missing = len(shape) - sum(k is not None and k is not Ellipsis for k in keys)
    dots = [i for i, k in enumerate(keys) if k is Ellipsis]
    if missing < 0 or len(dots) > 1:
        return None
    at = dots[0] if dots else len(keys)
    keys[at : at + 1] = [slice(None)] * missing
    window: list[tuple[int, int | None, int]] = []
    dims: list[bool | None] = []
    for k in keys:
        if k is None:
            dims.append(None)
            continue
        n = shape[len(window)]
        if isinstance(k, slice):
            start, stop, step = k.indices(n)
            if not range(start, stop, step):
                stop, step = start, 1
            window.append((start, None if stop < 0 else stop, step))
            dims.append(True)
            continue
        if isinstance(k, (mx.array, list, bool)):
            return None
        try:
            i = operator.index(k)
        except TypeError:
            return None
        if not -n <= i < n:
            return None
        window.append((i % n, i % n + 1, 1))
        dims.append(False)
    return tuple(window), dims


def _placed(shape: tuple[int, ...], dims: list[bool | None]) -> tuple[int, ...] | None:
    """The shape of updates in the dimensions of the array, None where it does not fit."""
    there = [d for d in dims if d is not False]
    extra = len(shape) - len(there)
    if any(n != 1 for n in shape[: max(extra, 0)]):
        return None
    sizes = iter((1,) * -extra + shape[max(extra, 0) :])
    placed: list[int] = []
    for d in dims:
        if d is False:
            placed.append(1)
            continue
        n = next(sizes)
        if d:
            placed.append(n)
        elif n != 1:
            return None
    return tuple(placed)


def as_update(value: Any, like: mx.Dtype) -> mx.array:
    """What MLX makes of a value to be assigned to an array of dtype `like`."""
    if isinstance(value, mx.array):
        return value
    if type(value) is float:
        return mx.array(value, like if mx.issubdtype(like, mx.floating) else mx.float32)
    if type(value) is int and like != mx.bool_:
        return mx.array(value, like)
    return mx.array(value)


def mask_of(key: Any) -> mx.array | None:
    if isinstance(key, mx.array):
        return key if key.dtype == mx.bool_ else None
    if isinstance(key, (slice, tuple, int, EllipsisType)) and not isinstance(key, bool):
        return None
    if isinstance(key, bool) or str(getattr(key, "dtype", "")) == "bool":
        return mx.array(key)
    if isinstance(key, list) and key:
        return mask_of(mx.array(key))
    return None
