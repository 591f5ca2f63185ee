"""Attention of ragged lengths, brought to CUDA's fused backward.

MLX 0.32 calls it where the query length is a multiple of 128, and decomposes elsewhere. With a key
length that is no multiple of 128 that call writes out of bounds: it corrupts memory and takes the
process down. Here both lengths are filled up, and the further rows dropped:

* a causal call gets as many further keys as queries, in the future of every query that counts;
* any other gets further keys that a mask hides, one value for each key where there was no mask.

What is hidden has weight zero and what is dropped a cotangent of zero, so the gradients are exact.

Source: mlx/fast.cpp, mlx/backend/cuda/scaled_dot_product_attention.cpp
(`ScaledDotProductAttentionVJP::use_fallback`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import mlx.core as mx

#: CUDA's fused backward takes lengths that are multiples of this, and no others.
TILE = 128


def padding(q: mx.array, k: mx.array, v: mx.array, causal: bool) -> tuple[int, int] | None:
    """How many further queries and keys CUDA's fused backward needs; None if it is not reached."""
    if q.dtype.size != 2 or mx.metal.is_available():
        return None  # float32 has no such kernel
    length, keys, dim, value_dim = q.shape[2], k.shape[2], q.shape[3], v.shape[3]
    if dim % 8 or dim > 128 or value_dim % 8 or value_dim > 128 or (causal and length > keys):
        return None
    if length < TILE // 2:
        return None  # cheap as it is
    return filling(length, keys, causal)


def filling(length: int, keys: int, causal: bool, tile: int = TILE) -> tuple[int, int]:
    """How many rows and keys bring both lengths to a multiple of `tile`."""
    rows = -length % tile
    return rows, rows if causal and (keys + rows) % tile == 0 else -keys % tile


def padded(
    fun: Callable[..., list[mx.array]],
    extra: tuple[int, int],
    q: mx.array,
    k: mx.array,
    v: mx.array,
    *rest: mx.array,
    causal: bool,
    has_mask: bool,
    **static: Any,
) -> list[mx.array]:
    """`fun` of attention's arguments, filled up by `extra` queries and keys."""
    rows, keys = extra
    length = k.shape[2]
    if has_mask:
        rest = (_filled_mask(rest[0], length, rows, keys), *rest[1:])
    elif causal and rows != keys:
        rest = (_causal_mask(q.shape[2], length, rows, keys, q.dtype), *rest)
        causal, has_mask = False, True
    elif not causal and keys:
        rest = (_key_mask(length, keys, q.dtype), *rest)
        has_mask = True
    if keys:
        k, v = _more_rows(k, keys), _more_rows(v, keys)
    static.update(causal=causal, has_mask=has_mask)
    out = fun(_more_rows(q, rows) if rows else q, k, v, *rest, **static)
    return [x[:, :, : q.shape[2]] for x in out] if rows else out


def _more_rows(x: mx.array, extra: int) -> mx.array:
    return mx.pad(x, [(0, 0), (0, 0), (0, extra), (0, 0)])


def _filled_mask(mask: mx.array, length: int, rows: int, keys: int) -> mx.array:
    if rows and mask.ndim > 1 and mask.shape[-2] > 1:
        # The last row again: a row of zeros or False could be one that sees nothing.
        widths = [(0, 0)] * (mask.ndim - 2) + [(0, rows), (0, 0)]
        mask = mx.pad(mask, widths, mode="edge")
    if not keys:
        return mask
    if mask.ndim == 0 or mask.shape[-1] == 1:
        mask = mx.broadcast_to(mask, (*mask.shape[:-1], length))
    hidden = mx.array(False) if mask.dtype == mx.bool_ else mx.array(-float("inf"), mask.dtype)
    return mx.pad(mask, [(0, 0)] * (mask.ndim - 1) + [(0, keys)], constant_values=hidden)


@functools.lru_cache(maxsize=64)
def _key_mask(length: int, keys: int, dtype: mx.Dtype) -> mx.array:
    return mx.array([0.0] * length + [-float("inf")] * keys, dtype)


def _causal_mask(q_length: int, length: int, rows: int, keys: int, dtype: mx.Dtype) -> mx.array:
    """One matrix for all heads: the kernel's own causal mask would hide the wrong keys."""
    last = mx.minimum(mx.arange(q_length + rows) + (length - q_length), length - 1)
    seen = mx.arange(length + keys) <= mx.expand_dims(last, 1)
    return mx.where(seen, mx.array(0, dtype), mx.array(-float("inf"), dtype))
