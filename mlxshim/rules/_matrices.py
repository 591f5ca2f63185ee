"""Stacks of matrices, and flat indices into them."""

from __future__ import annotations

import math

import mlx.core as mx

from . import _devices
from ._dtypes import HALVES
from ._folding import front, pad_dims


def stack(x: mx.array) -> mx.array:
    """(A..., M, K) -> (A, M, K)"""
    return mx.reshape(x, (count_of(x), *x.shape[-2:])) if x.ndim != 3 else x


def count_of(x: mx.array) -> int:
    return math.prod(x.shape[:-2])


def counting(x: mx.array) -> mx.array:
    return mx.reshape(mx.arange(count_of(x), dtype=mx.uint32), x.shape[:-2])


def offset(
    indices: mx.array | None, axis: int | None, size: int, ndim: int, step: int
) -> mx.array | None:
    """The indices of all samples, those of sample n into the n-th `step` matrices."""
    if indices is None or (axis is None and step == 0):
        return indices
    indices = pad_dims(
        mx.expand_dims(indices, 0) if axis is None else front(indices, axis, 0), 1 + ndim
    )
    if step == 0:
        return indices
    starts = mx.arange(0, size * step, step, dtype=mx.uint32)
    return indices + mx.reshape(starts, (size, *(1,) * ndim))


def widened(*arrays: mx.array) -> list[mx.array]:
    """In float32 what is to be multiplied by segments or by indices, on the CPU.

    Its kernel of indices takes nothing else, and that of segments is wrong in half precision
    (mlx/backend/cpu/masked_mm.cpp, 0.31.1 to 0.32.4).
    """
    return [x.astype(mx.float32) if too_narrow(x) else x for x in arrays]


def too_narrow(x: mx.array) -> bool:
    return x.dtype in HALVES and not _devices.gpu()
