"""Products of segments: `mx.segmented_mm`.

    Y[i] = X[:, s_i:e_i] W[s_i:e_i, :]      X: (M, K)   W: (K, N)   segments: (..., 2)

X or W mapped alone are further rows or columns; otherwise samples follow one another along the
contraction, offset in the segments. MLX has no vmap, vjp or jvp of it.

Source: mlx/ops.cpp, `segmented_mm`.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from ..core import levels
from ..core.interception import intercept, original
from ..core.primitive import Arrays, Axes, Primitive
from ..core.tracers import is_tracer
from ._folding import front, on_stream
from ._matrices import widened
from ._mlx_0_31 import matmul


@intercept(mx, "segmented_mm")
def segmented_mm(
    a: mx.array, b: mx.array, /, segments: mx.array, *, stream: Any = None
) -> mx.array:
    out = original(mx, "segmented_mm")(a, b, segments, stream=stream)
    # MLX has no derivative either; the decomposition's serves wherever one is traced.
    if not levels.active() or not is_tracer(out):
        return out
    arrays = [a.astype(out.dtype), b.astype(out.dtype), segments.astype(mx.uint32)]
    return on_stream(stream, _bind_segmented, *arrays)[0]


def _bind_segmented(*arrays: mx.array) -> list[mx.array]:
    return segmented(*arrays) if "vmap" in levels.active() else segmented.differentiable(*arrays)


def _segmented_fused(a: mx.array, b: mx.array, segments: mx.array) -> list[mx.array]:
    return [original(mx, "segmented_mm")(*widened(a, b), segments).astype(a.dtype)]


def _segmented_decomposed(a: mx.array, b: mx.array, segments: mx.array) -> list[mx.array]:
    steps = mx.arange(a.shape[1], dtype=mx.uint32)
    ends = mx.reshape(segments, (-1, 2))
    inside = (steps >= ends[:, :1]) & (steps < ends[:, 1:])
    rows = mx.expand_dims(a, 0) * mx.expand_dims(inside.astype(a.dtype), 1)  # (I, M, K)
    out = matmul(mx.flatten(rows, 0, 1), b)
    return [mx.reshape(out, (*segments.shape[:-1], a.shape[0], b.shape[1]))]


def _segmented_batch(size: int, arrays: Arrays, axes: Axes) -> tuple[list[mx.array], list[int]]:
    a, b, segments = arrays
    a_axis, b_axis, s_axis = axes
    if b_axis is None and s_axis is None:
        rows = mx.flatten(front(a, a_axis, size), 0, 1)
        out = _bind_segmented(rows, b, segments)[0]
        return [mx.unflatten(out, -2, (size, -1))], [out.ndim - 2]
    if a_axis is None and s_axis is None:
        assert b_axis is not None
        columns = mx.flatten(mx.moveaxis(b, b_axis, 1), 1, 2)
        out = _bind_segmented(a, columns, segments)[0]
        return [mx.unflatten(out, -1, (size, -1))], [out.ndim - 1]
    if a_axis is None and b_axis is None:
        return _bind_segmented(a, b, front(segments, s_axis, size)), [0]
    b = front(b, b_axis, size)
    length = b.shape[1]
    a = mx.moveaxis(front(a, a_axis, size), 0, 1)  # (M, S, K)
    starts = mx.arange(0, size * length, length, dtype=mx.uint32)
    ends = mx.minimum(front(segments, s_axis, size), mx.array(length, mx.uint32))
    ends = ends + mx.reshape(starts, (size, *(1,) * (ends.ndim - 1)))
    return _bind_segmented(mx.flatten(a, 1, 2), mx.flatten(b, 0, 1), ends), [0]


segmented = Primitive(
    "segmented_mm",
    decomposition=_segmented_decomposed,
    lowering=_segmented_fused,
    batch=_segmented_batch,
)
