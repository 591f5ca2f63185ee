"""Sums over rows, such as the gradients of a norm's weight and of a bias are."""

from __future__ import annotations

import functools

import mlx.core as mx

from . import _devices
from ._dtypes import HALVES


def sums_of_rows(x: mx.array) -> mx.array:
    """(samples, ..., width) -> (samples, width): what lies between is summed."""
    if x.ndim == 2:
        return x
    if x.dtype not in HALVES or not _devices.gpu():
        return mx.sum(x, axis=tuple(range(1, x.ndim - 1)))
    # CUDA adds columns up in half precision (mlx/backend/cuda/reduce/col_reduce.cu); a product
    # accumulates in float32.
    rows = mx.flatten(x, 1, -2)
    return mx.squeeze(mx.matmul(_ones(rows.shape[1], x.dtype), rows), 1)


@functools.lru_cache(maxsize=16)
def _ones(size: int, dtype: mx.Dtype) -> mx.array:
    return mx.array([[1.0] * size], dtype)  # a value from the start: of no stream
