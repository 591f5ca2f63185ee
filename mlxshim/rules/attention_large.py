"""Attention whose gradient needs more workspace than CUDA's fused backward is given.

MLX 0.32.4 counts the bytes of a kernel's workspace in 32 bits: from 2 GiB on the allocation fails,
from 4 GiB on the kernel writes outside of it and the process is lost. The gradient of a larger call
is put together from those of its halves: of the batch, of the heads with their keys and values, or
of the queries of one head of keys, whose gradients then are a sum.

Source: mlx/backend/cuda/utils.cpp (`allocate_workspace`), mlx/backend/cuda/cudnn_utils.cpp.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

#: Bytes of workspace that a call may come to need.
WORKSPACE = 2**31 - 1


def is_large(q: mx.array, k: mx.array, v: mx.array) -> bool:
    """Whether a half precision call on CUDA is beyond what MLX can give its backward pass.

    The kernel accumulates the gradient of the queries in float32, and has those of keys and values
    once for each query head: 4 bytes for each at most.
    """
    batch, heads, length, dim = q.shape
    entries = length * dim + k.shape[2] * (dim + v.shape[3])
    return 4 * batch * heads * entries > WORKSPACE and not mx.metal.is_available()


def by_halves(
    vjp: Callable[..., list[mx.array]],
    q: mx.array,
    k: mx.array,
    v: mx.array,
    *others: mx.array,
    has_mask: bool,
) -> list[mx.array]:
    """`vjp(q, k, v, [mask], [sinks], cotangent)` -> gradients of q, k and v, from those of halves.

    One row with one query head has no halves, and is given as it is.
    """
    batch, heads = q.shape[:2]
    kv_heads = k.shape[1]
    if batch == heads == 1:
        return vjp(q, k, v, *others)
    axis = 0 if batch > 1 else 1
    shared = axis == 1 and kv_heads == 1
    cut = (heads if shared else kv_heads if axis else batch) // 2
    rows = cut if shared or not axis else cut * (heads // kv_heads)
    *rest, cotangent = others

    def half(i: int) -> list[mx.array]:
        keys = (k, v) if shared else (_part(x, axis, cut, i) for x in (k, v))
        more = list(rest)
        if has_mask:
            more[0] = _part_of_mask(rest[0], axis, rows, i)
        if len(rest) > has_mask and axis:
            more[-1] = _part(rest[-1], 0, rows, i)  # the sinks are the heads'
        return vjp(_part(q, axis, rows, i), *keys, *more, _part(cotangent, axis, rows, i))

    dq, dk, dv = zip(half(0), half(1))
    if shared:
        return [mx.concatenate(list(dq), axis), dk[0] + dk[1], dv[0] + dv[1]]
    return [mx.concatenate(list(parts), axis) for parts in (dq, dk, dv)]


def _part(x: mx.array, axis: int, cut: int, i: int) -> mx.array:
    window = slice(cut, None) if i else slice(cut)
    return x[(slice(None),) * axis + (window,)]


def _part_of_mask(mask: mx.array, axis: int, cut: int, i: int) -> mx.array:
    """Of a mask that is broadcast to (batch, heads, rows, keys)."""
    axis += mask.ndim - 4
    return _part(mask, axis, cut, i) if axis >= 0 and mask.shape[axis] > 1 else mask
