"""Windows: the part of an array that ints and slices choose, written to under vmap.

    y[1:, ::-2] = u    x.at[..., 3].add(u)    mx.pad(x, 1)

are one primitive, `write`: a window (a start, a stop and a step for each axis), an operation, and
updates of the window's shape, or 1 where they are the same all along an axis. A mapped axis is one
more axis of the window, taken whole.

MLX's batching rule gives unmapped updates an axis of 1, where its kernel reads the size of the
batch: only the first sample is written. Its vjp writes zeros that are never mapped, so that with
mapped updates the gradient is wrong in the same way. It has no jvp but for set and add, and
before 0.32.4 none of these unless both arguments have a tangent.

Source: mlx/primitives.cpp, `SliceUpdate`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx

from ..core import levels
from ..core.interception import original
from ..core.primitive import Arrays, Axes, Primitive
from ..core.versions import MLX, TWO_TANGENTS_BUG

#: (start, stop, step) of each axis, as a slice has them.
Window = tuple[tuple[int, "int | None", int], ...]

_OPERATIONS: dict[str, Callable[[mx.array, mx.array], mx.array]] = {
    "add": mx.add,
    "multiply": mx.multiply,
    "maximum": mx.maximum,
    "minimum": mx.minimum,
}


_LINEAR = ("set", "add")


def key_of(window: Window) -> tuple[slice, ...]:
    return tuple(slice(*bounds) for bounds in window)


def is_whole(window: Window, shape: tuple[int, ...]) -> bool:
    """Whether every entry is in it, in order."""
    return all(
        key.step > 0 and len(range(*key.indices(n))) == n for key, n in zip(key_of(window), shape)
    )


def read(x: mx.array, window: Window) -> mx.array:
    """The window of `x`; MLX's own rules for it are right, but for what `reads_itself` says."""
    if not reads_itself():
        return original(mx.array, "__getitem__")(x, key_of(window))
    bound = _read if "vmap" in levels.active() else _read.differentiable
    return bound(x, window=window)[0]


def reads_itself() -> bool:
    """Whether a window must be read by our node: MLX's pulls back to an update without a jvp."""
    stack = levels.active()
    return TWO_TANGENTS_BUG and "grad" in stack and "jvp" in stack


def put(y: mx.array, u: mx.array, window: Window) -> mx.array:
    """A new array by MLX's own assignment."""
    new = y.__copy__()  # another handle of the same array
    original(mx.array, "__setitem__")(new, key_of(window), u)
    return new


def of_all(y: mx.array, u: mx.array, op: str) -> mx.array:
    """What an update of the window of all entries is: an operation element by element."""
    return _OPERATIONS[op](y, mx.broadcast_to(u, y.shape))


def become(y: mx.array, value: mx.array) -> None:
    """Make `y`, an object that others may hold too, the array that `value` is."""
    original(mx.array, "__setitem__")(y, None, value)


# Reading ----------------------------------------------------------------------------------------


def _part(x: mx.array, *, window: Window) -> list[mx.array]:
    # Of a node that has the derivatives.
    return [original(mx.array, "__getitem__")(mx.stop_gradient(x), key_of(window))]


def _part_batch(
    size: int, arrays: Arrays, axes: Axes, *, window: Window
) -> tuple[list[mx.array], list[int]]:
    axis = axes[0] or 0
    return [read(arrays[0], (*window[:axis], (0, size, 1), *window[axis:]))], [axis]


def _part_vjp(
    primals: Arrays, cotangents: Arrays, outputs: Arrays, *, window: Window
) -> list[mx.array]:
    return [write(mx.zeros_like(primals[0]), cotangents[0], window, "set")]


def _part_jvp(primals: Arrays, tangents: Arrays, *, window: Window) -> list[mx.array]:
    return [read(tangents[0], window)]


_read = Primitive(
    "array.__getitem__",
    decomposition=_part,
    lowering=lambda x, *, window: [original(mx.array, "__getitem__")(x, key_of(window))],
    batch=_part_batch,
    vjp=_part_vjp,
    jvp=_part_jvp,
)

# Writing ----------------------------------------------------------------------------------------


def _value(y: mx.array, u: mx.array, *, window: Window, op: str) -> list[mx.array]:
    # Of a node that has the derivatives.
    return _in_two(mx.stop_gradient(y), mx.stop_gradient(u), window, op)


def _in_two(y: mx.array, u: mx.array, window: Window, op: str) -> list[mx.array]:
    return [put(y, u if op == "set" else _OPERATIONS[op](read(y, window), u), window)]


def _lowering(y: mx.array, u: mx.array, *, window: Window, op: str) -> list[mx.array]:
    if op == "set" or MLX < (0, 32, 0):  # which would scatter
        return _in_two(y, u, window, op)
    return [getattr(original(mx.array, "at").fget(y)[key_of(window)], op)(u)]


def _batch(
    size: int, arrays: Arrays, axes: Axes, *, window: Window, op: str
) -> tuple[list[mx.array], list[int]]:
    (y, u), (axis, from_axis) = arrays, axes
    if axis is None:
        axis, y = 0, mx.broadcast_to(y, (size, *y.shape))
    if from_axis is None:
        u = mx.expand_dims(u, axis)
    elif from_axis != axis:
        u = mx.moveaxis(u, from_axis, axis)
    window = (*window[:axis], (0, size, 1), *window[axis:])
    return [write(y, u, window, op)], [axis]


def _vjp(
    primals: Arrays, cotangents: Arrays, outputs: Arrays, *, window: Window, op: str
) -> list[mx.array]:
    (y, u), ct, out = primals, cotangents[0], outputs[0]
    part = read(ct, window)
    if op == "set":
        to_y = write(ct, mx.zeros((1,) * ct.ndim, ct.dtype), window, "set")
    elif op == "add":
        to_y = ct
    elif op == "multiply":
        to_y = write(ct, u, window, "multiply")
        part = part * read(y, window)
    else:  # the whole cotangent goes to each of two equals
        zero = mx.zeros((), ct.dtype)
        kept, taken = mx.equal(out, y), mx.equal(read(out, window), u)
        to_y = mx.where(mx.stop_gradient(kept), ct, zero)
        part = mx.where(mx.stop_gradient(taken), part, zero)
    return [to_y, _sum_to(part, u.shape)]


def _jvp(primals: Arrays, tangents: Any, *, window: Window, op: str) -> list[mx.array]:
    (y, u), (to_y, to_u) = primals, _full(primals, tangents)
    if op in _LINEAR:
        return [write(to_y, to_u, window, op)]
    part, to_part = read(y, window), read(to_y, window)
    if op == "multiply":
        to_out = to_part * u + part * to_u
    else:
        to_out = mx.where(mx.equal(_OPERATIONS[op](part, u), part), to_part, to_u)
    return [write(to_y, to_out, window, "set")]


def _full(primals: Arrays, tangents: Any) -> list[mx.array]:
    return [mx.zeros_like(x) if t is None else t for x, t in zip(primals, tangents)]


def _sum_to(x: mx.array, shape: tuple[int, ...]) -> mx.array:
    axes = [i for i, (n, m) in enumerate(zip(x.shape, shape)) if n != m]
    return mx.sum(x, axis=axes, keepdims=True) if axes else x


_rules: dict[str, Any] = {"decomposition": _value, "batch": _batch, "vjp": _vjp, "jvp": _jvp}
_write = Primitive("array.__setitem__", lowering=_lowering, **_rules)
_pushed = Primitive("array.__setitem__", lowering=_value, **_rules)


def write(y: mx.array, u: mx.array, window: Window, op: str) -> mx.array:
    """`y` with `u` set, added, … in the window; `u` has as many dimensions, and `y`'s dtype."""
    stack = levels.active()
    if "jvp" in stack and "vmap" not in stack and (TWO_TANGENTS_BUG or op not in _LINEAR):
        return _pushed.differentiable(y, u, window=window, op=op)[0]
    return _write(y, u, window=window, op=op)[0]
