"""The dtype that MLX computes in; it has no public `result_type` in 0.31."""

from __future__ import annotations

import mlx.core as mx

HALVES = (mx.float16, mx.bfloat16)
FLOATING = (mx.float16, mx.bfloat16, mx.float32, mx.float64)


def promoted(*arrays: mx.array) -> mx.Dtype | None:
    """The floating dtype of an operation on these arrays, None if it is none."""
    first = arrays[0].dtype
    if first in FLOATING and all(x.dtype == first for x in arrays):
        return first
    dtypes = {x.dtype for x in arrays}
    if mx.complex64 in dtypes:
        return None
    floating = dtypes.intersection(FLOATING)
    if len(floating) < 2:
        return next(iter(floating), None)
    return mx.float64 if mx.float64 in floating else mx.float32


def cast(x: mx.array, dtype: mx.Dtype) -> mx.array:
    """`x.astype(dtype)`, which inside a transform is not free where it does nothing."""
    return x if x.dtype == dtype else x.astype(dtype)
