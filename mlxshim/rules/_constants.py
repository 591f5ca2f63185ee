"""Scalars that decompositions use, made once.

`x * 0.5` makes a new array of the scalar at every trace: an allocation, on CUDA one in memory that
the device has just used. A cached one holds its value from the start and belongs to no stream.
"""

from __future__ import annotations

import functools

import mlx.core as mx


@functools.lru_cache(maxsize=256)
def constant(value: float, dtype: mx.Dtype) -> mx.array:
    """`value` as an array of no dimensions."""
    return mx.array(value, dtype)
