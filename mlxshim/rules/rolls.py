"""`mx.roll` by a number that is mapped: every sample gathers what it has shifted.

MLX wants the number itself, which a mapped one does not have; one that is not traced is MLX's.

Source: mlx/ops.cpp, `roll`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from ..core.errors import ArgumentError
from ..core.interception import intercept, original
from ..core.tracers import is_tracer
from ._folding import on_stream


@intercept(mx, "roll")
def roll(a: mx.array, shift: Any, axis: Any = None, *, stream: Any = None) -> mx.array:
    shifts = list(shift) if isinstance(shift, (tuple, list)) else [shift]
    if not any(isinstance(s, mx.array) and is_tracer(s) for s in shifts):
        return original(mx, "roll")(a, shift, axis, stream=stream)
    shifts = [_number(s) for s in shifts]
    if axis is None:
        flat = mx.flatten(a, stream=stream)
        return mx.reshape(on_stream(stream, _rolled, flat, [sum(shifts)], [0]), a.shape)
    if isinstance(axis, int):
        shifts, axes = [sum(shifts)], [axis]
    else:
        axes = list(axis)
        shifts = shifts if isinstance(shift, (tuple, list)) else shifts * len(axes)
    if len(shifts) < len(axes):
        raise ArgumentError(
            f"[roll] shift has {len(shifts)} numbers for {len(axes)} axes: give each axis one."
        )
    for i in axes:
        if not -a.ndim <= i < a.ndim:
            raise ArgumentError(f"[roll] axis {i} is out of range for shape {tuple(a.shape)}.")
    return on_stream(stream, _rolled, a, shifts, axes)


def _number(shift: Any) -> Any:
    if not isinstance(shift, mx.array):
        return shift
    if shift.ndim or not mx.issubdtype(shift.dtype, mx.integer):
        raise ArgumentError(
            f"[roll] shift must be an integer, or a tuple of integers, for each sample; found an "
            f"array of shape {tuple(shift.shape)} and dtype {shift.dtype}."
        )
    return shift.astype(mx.int32)


def _rolled(a: mx.array, shifts: Sequence[Any], axes: Sequence[int]) -> mx.array:
    for shift, axis in zip(shifts, axes):
        count = a.shape[axis]
        if count:
            a = mx.take(a, mx.remainder(mx.arange(count) - shift, count), axis)
    return a
