"""Slices that begin at an array.

    mx.slice(x, start, axes, size)    mx.slice_update(y, u, start, axes)

MLX maps them where the start is unmapped, but for updates: unmapped ones reach the first sample
only, as in windows.py. Here a mapped start is one start for each sample, which MLX indexes with
start + 0, 1, 2, …; each of the two is the other's derivative.

A start of shape (*batch, k) holds the starts of k axes; x, y and u begin with the dimensions of
the batch, and `axes` counts them too.

Source: mlx/primitives.cpp, `DynamicSlice` and `DynamicSliceUpdate`; mlx/backend/cpu/primitives.cpp,
`compute_dynamic_offset`; mlx/backend/cpu/copy.cpp, `copy_general_general`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from ..core import levels
from ..core.interception import intercept, original
from ..core.primitive import Arrays, Axes, Primitive
from ..core.versions import MLX, SELECT_JVP_BUG
from ._devices import within
from ._discrete import discrete

Ints = tuple[int, ...]


# By indices -------------------------------------------------------------------------------------


def _key(start: mx.array, shape: Ints, axes: Ints, sizes: Sequence[int]) -> tuple[Any, ...]:
    """The indices of a slice of an array of that shape; whole axes at the end stay slices."""
    batch = start.ndim - 1
    count = max((i + 1 for i, n in enumerate(shape) if i < batch or n != sizes[i] or i in axes))
    key: list[mx.array] = []
    for i in range(count):
        index = mx.reshape(mx.arange(sizes[i]), (-1,) + (1,) * (count - 1 - i))
        if i in axes:
            first = mx.take(start, axes.index(i), axis=-1)
            index = index + mx.reshape(first, (*first.shape, *(1,) * (count - batch)))
        key.append(index)
    return tuple(key)


def _indexed(x: mx.array, start: mx.array, *, axes: Ints, sizes: Ints) -> list[mx.array]:
    return [x[_key(start, x.shape, axes, sizes)]]


def _index_assigned(y: mx.array, u: mx.array, start: mx.array, *, axes: Ints) -> list[mx.array]:
    # A value only: the node that it is put into has the derivatives.
    new = mx.stop_gradient(y)
    new[_key(start, y.shape, axes, u.shape)] = mx.stop_gradient(u)
    return [new]


# The two primitives -----------------------------------------------------------------------------


def _direct(start: mx.array) -> bool:
    """Whether MLX's own operation serves.

    On the CPU it takes the buffer of a start of 8 bytes or more for its own, and frees it before
    it is read: numbers out of a foreign array, or a crash.
    """
    return start.size == 1 and start.ndim == 1


def _direct_read(start: mx.array) -> bool:
    """The same of a slice: the CPU's kernel of 0.31 copies as many entries as the array has."""
    return _direct(start) and MLX >= (0, 32, 0)


def _direct_write(start: mx.array) -> bool:
    """The same of an update, whose jvp reads tangents out of bounds in 0.31."""
    return _direct(start) and not (SELECT_JVP_BUG and "jvp" in levels.active())


def _alone(start: mx.array) -> mx.array:
    """A start in a buffer of its own, of 4 bytes."""
    return mx.max(start.astype(mx.int32), keepdims=True)


def _read(x: mx.array, start: mx.array, *, axes: Ints, sizes: Ints) -> list[mx.array]:
    if _direct_read(start):
        return [original(mx, "slice")(x, _alone(start), axes, sizes)]
    return _indexed(x, start, axes=axes, sizes=sizes)


def _read_batch(
    size: int, arrays: Arrays, mapped: Axes, *, axes: Ints, sizes: Ints
) -> tuple[list[mx.array], list[int]]:
    (x, start), place, axes = _batched(size, arrays, mapped, axes)
    return [read(x, start, axes, (*sizes[:place], size, *sizes[place:]))], [place]


def _read_vjp(
    primals: Arrays, cotangents: Arrays, outputs: Arrays, *, axes: Ints, sizes: Ints
) -> list[mx.array]:
    x, start = primals
    return [write(mx.zeros_like(x), cotangents[0], start, axes), mx.zeros_like(start)]


def _read_jvp(primals: Arrays, tangents: Any, *, axes: Ints, sizes: Ints) -> list[mx.array]:
    to_x = mx.zeros_like(primals[0]) if tangents[0] is None else tangents[0]
    return [read(to_x, primals[1], axes, sizes)]


def _write(y: mx.array, u: mx.array, start: mx.array, *, axes: Ints) -> list[mx.array]:
    if _direct_write(start):
        return [original(mx, "slice_update")(y, u, _alone(start), axes)]
    return _index_assigned(y, u, start, axes=axes)


def _write_batch(
    size: int, arrays: Arrays, mapped: Axes, *, axes: Ints
) -> tuple[list[mx.array], list[int]]:
    (y, u, start), place, axes = _batched(size, arrays, mapped, axes)
    return [write(y, u, start, axes)], [place]


def _write_vjp(
    primals: Arrays, cotangents: Arrays, outputs: Arrays, *, axes: Ints
) -> list[mx.array]:
    (_, u, start), ct = primals, cotangents[0]
    to_y = write(ct, mx.zeros_like(u), start, axes)
    return [to_y, read(ct, start, axes, u.shape), mx.zeros_like(start)]


def _write_jvp(primals: Arrays, tangents: Any, *, axes: Ints) -> list[mx.array]:
    to_y, to_u = (mx.zeros_like(x) if t is None else t for x, t in zip(primals[:2], tangents))
    return [write(to_y, to_u, primals[2], axes)]


def _batched(
    size: int, arrays: Arrays, mapped: Axes, axes: Ints
) -> tuple[tuple[mx.array, ...], int, Ints]:
    """The arrays, all but an unmapped start mapped over one place, and the axes beside it."""
    *others, start = arrays
    # One start for each sample is one more dimension of the batch; else it is an axis like others.
    place = 0 if mapped[-1] is not None else start.ndim - 1
    if mapped[-1]:
        start = mx.moveaxis(start, mapped[-1], 0)
    moved = [
        mx.broadcast_to(mx.expand_dims(x, place), (*x.shape[:place], size, *x.shape[place:]))
        if axis is None
        else mx.moveaxis(x, axis, place)
        for x, axis in zip(others, mapped)
    ]
    return (*moved, start), place, tuple(a + (a >= place) for a in axes)


_slice = Primitive(
    "slice", decomposition=_indexed, lowering=_read, batch=_read_batch, vjp=_read_vjp, jvp=_read_jvp
)
_slice_update = Primitive(
    "slice_update",
    decomposition=_index_assigned,
    lowering=_write,
    batch=_write_batch,
    vjp=_write_vjp,
    jvp=_write_jvp,
)


def read(x: mx.array, start: mx.array, axes: Ints, sizes: Ints) -> mx.array:
    bound = _bound(_slice, _direct_read(start))
    return bound(x, start, axes=axes, sizes=sizes)[0]


def write(y: mx.array, u: mx.array, start: mx.array, axes: Ints) -> mx.array:
    """`y` with `u` at `start`; its shape is the slice's."""
    return _bound(_slice_update, _direct_write(start))(y, u, start, axes=axes)[0]


def _bound(primitive: Primitive, direct: bool) -> Any:
    # MLX has no forward derivative of an assignment at indices: under its own grad and jvp too.
    return primitive if direct or "vmap" in levels.active() else primitive.differentiable


# MLX's functions --------------------------------------------------------------------------------


def _concerned(start: mx.array) -> bool:
    stack = levels.active()
    return "vmap" in stack or (bool(stack) and (start.nbytes >= 8 or MLX < (0, 32, 0)))


@intercept(mx, "slice")
def slice_(
    a: mx.array, start_indices: mx.array, axes: Any, slice_size: Any, *, stream: Any = None
) -> mx.array:
    start_indices = discrete(start_indices)
    native = original(mx, "slice")(a, start_indices, axes, slice_size, stream=stream)
    if not _concerned(start_indices):
        return native
    with within(stream):
        return read(a, _flat(start_indices), _counted(axes, a.ndim), native.shape)


@intercept(mx, "slice_update")
def slice_update(
    a: mx.array, update: mx.array, start_indices: mx.array, axes: Any, *, stream: Any = None
) -> mx.array:
    start_indices = discrete(start_indices)
    native = original(mx, "slice_update")(a, update, start_indices, axes, stream=stream)
    if not _concerned(start_indices):
        return native
    axes = _counted(axes, a.ndim)
    with within(stream):
        # Dimensions that it lacks are broadcast, those that it has are the slice's.
        lacking = range(a.ndim - update.ndim)
        first = (1 if axis in axes else a.shape[axis] for axis in lacking)
        u = mx.broadcast_to(update.astype(a.dtype), (*first, *update.shape))
        return write(a, u, _flat(start_indices), axes)


def _flat(start: mx.array) -> mx.array:
    return mx.reshape(start, (-1,))


def _counted(axes: Any, ndim: int) -> Ints:
    return tuple(axis % ndim for axis in axes)
