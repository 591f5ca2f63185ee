"""Attention and its backward pass in plain MLX operations, whose own transforms are right.

    P = softmax(scale * Q K^T + mask)      O = P V
    dP = dO V^T           dS = P * (dP - rowsum(dP * P))
    dV = P^T dO           dQ = scale * dS K           dK = scale * dS^T Q

The queries of a group share their K/V head as rows of one matmul, so both matmuls have equal batch
dimensions: no broadcast, no repeated K/V.

Source: mlx/fast.cpp (the decomposition).
"""

from __future__ import annotations

import functools
from array import array
from typing import Any

import mlx.core as mx

from ..core import levels
from ..core.interception import original
from ._constants import constant
from ._mlx_0_31 import keep_where, matmul

FLOOR = {t: mx.finfo(t).min for t in (mx.float64, mx.float32, mx.float16, mx.bfloat16)}


def decompose(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    *rest: mx.array,
    scale: float,
    causal: bool,
    has_mask: bool,
    **newer: Any,
) -> list[mx.array]:
    """Attention; `rest` are the mask, if it is an array, and the sinks, if there are any."""
    batch, heads, length, _ = q.shape
    queries = by_group(q * constant(scale, q.dtype), k)
    probs = _probabilities(queries, k, rest, heads, length, causal, has_mask)
    out = matmul(probs, v)
    return [out if heads == k.shape[1] else mx.reshape(out, (batch, heads, length, -1))]


def decompose_vjp(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    *others: mx.array,
    scale: float,
    causal: bool,
    has_mask: bool,
    **newer: Any,
) -> list[mx.array]:
    """The gradients of q, k and v; `others` end with the cotangent."""
    *rest, cotangent = others
    heads, length = q.shape[1:3]
    queries = by_group(q * constant(scale, q.dtype), k)
    probs = _probabilities(queries, k, tuple(rest), heads, length, causal, has_mask)
    cotangent = by_group(cotangent, k)
    d_probs = matmul(cotangent, mx.swapaxes(v, -1, -2))
    weighed = d_probs * probs
    d_scores = weighed - probs * mx.sum(weighed, axis=-1, keepdims=True)
    # Where nothing is seen the probabilities are uniform, and no score had a part in that.
    if causal and length > k.shape[2]:
        d_scores = d_scores * past(queries.shape[2], length, k.shape[2]).astype(probs.dtype)
    elif has_mask and rest[0].dtype == mx.bool_:
        shape = d_scores.shape
        full = mx.reshape(d_scores, (shape[0], heads, length, shape[-1]))
        d_scores = mx.reshape(full * rest[0].astype(probs.dtype), shape)
    dq = mx.reshape(matmul(d_scores, k) * constant(scale, q.dtype), q.shape)
    dk = matmul(mx.swapaxes(d_scores, -1, -2), queries)
    return [dq, dk, matmul(mx.swapaxes(probs, -1, -2), cotangent)]


def by_group(x: mx.array, k: mx.array) -> mx.array:
    """(B, H, L, D) -> (B, Hkv, H / Hkv * L, D)"""
    batch, heads, _, dim = x.shape
    return x if heads == k.shape[1] else mx.reshape(x, (batch, k.shape[1], -1, dim))


def _probabilities(
    queries: mx.array,
    k: mx.array,
    rest: tuple[mx.array, ...],
    heads: int,
    length: int,
    causal: bool,
    has_mask: bool,
) -> mx.array:
    """softmax, (B, Hkv, H / Hkv * Lq, Lk); the queries are scaled, and rows of their group."""
    scores = matmul(queries, mx.swapaxes(k, -1, -2))
    if causal:
        scores = without_future(scores, length)
    if not rest:
        return mx.softmax(scores, axis=-1, precise=True)
    shape = scores.shape
    if shape[1] == heads:
        return _masked_softmax(scores, rest, has_mask)
    scores = mx.reshape(scores, (shape[0], heads, length, shape[3]))
    return mx.reshape(_masked_softmax(scores, rest, has_mask), shape)


def without_future(scores: mx.array, q_length: int) -> mx.array:
    """`scores`, at the floor where a row does not see the key."""
    shape = scores.shape

    def seen() -> mx.array:  # by every sample, head and layer: one node, as large as the scores
        keys = past(shape[2], q_length, shape[3])
        return original(mx, "broadcast_to")(keys, shape)

    return keep_where(levels.shared((past, shape, q_length), seen), scores, FLOOR[scores.dtype])


def past(rows: int, q_length: int, k_length: int) -> mx.array:
    """Which keys each row sees; the rows are those of all the queries of a group."""
    return _positions(rows, q_length, k_length) >= _steps(k_length)


# Held by value, so a trace that is not evaluated can share them; from a buffer, which is quick.


@functools.lru_cache(maxsize=64)
def _steps(length: int) -> mx.array:
    return _array(memoryview(array("i", range(length))))


@functools.lru_cache(maxsize=64)
def _positions(rows: int, q_length: int, k_length: int) -> mx.array:
    """The last key that each row sees."""
    if not rows:
        return mx.zeros((0, 1), mx.int32)
    last = array("i", range(k_length - q_length, k_length)) * (rows // q_length)
    return _array(memoryview(last).cast("B").cast("i", shape=[rows, 1]))


def _array(buffer: Any) -> mx.array:
    return mx.array(buffer)


def _masked_softmax(scores: mx.array, rest: tuple[mx.array, ...], has_mask: bool) -> mx.array:
    heads = scores.shape[1]
    if has_mask:
        mask, floor = rest[0], FLOOR[scores.dtype]
        scores = keep_where(mask, scores, floor) if mask.dtype == mx.bool_ else scores + mask
    if len(rest) == has_mask:
        return mx.softmax(scores, axis=-1, precise=True)
    # A sink is one more key, with a score of its own and no value. Written out rather than
    # concatenated: the derivatives of a concatenated score crash in 0.31.1.
    sink = mx.reshape(rest[-1], (heads, 1, 1))
    dtype = scores.dtype
    if dtype.size < 4:
        scores, sink = scores.astype(mx.float32), sink.astype(mx.float32)
    top = mx.stop_gradient(mx.maximum(mx.max(scores, axis=-1, keepdims=True), sink))
    weights = mx.exp(scores - top)
    total = mx.sum(weights, axis=-1, keepdims=True) + mx.exp(sink - top)
    return (weights / total).astype(dtype)
