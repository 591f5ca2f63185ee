"""Attention over a part of the keys, and what it takes to merge parts: the log-sum-exp of each row.

    S = scale * Q K^T      l = log sum exp S      O = exp(S - l) V
    of two parts:  O = w O1 + (1 - w) O2,  w = exp(l1) / (exp(l1) + exp(l2)) = sigmoid(l1 - l2)

K/V that samples share are read once: the queries of all samples are rows of one product, forward
and for the gradient of the queries. The log-sum-exp is of float32 and read off the softmax, in
which the greatest score m of a row has the greatest weight p: l = m - log p.

Backward, with cotangents c of O and e of l:  dS = P * (c V^T - rowsum(c * O) + e).

MLX's fused attention keeps its log-sum-exp to itself, so parts are plain operations. Where little
would be copied for a fused call of the concatenated keys and values, that is what is called.

Source: Juravsky et al., "Hydragen", 2024 (a shared prefix); Dao et al., "Flash-Decoding", 2023 (the
merge).
"""

from __future__ import annotations

import functools
from typing import Any

import mlx.core as mx

from ..core import levels, native
from ..core.interception import original
from ..core.primitive import Arrays, Axes, Primitive
from . import _devices
from ._constants import constant
from ._folding import sample_ndim, sample_shape
from ._mlx_0_31 import matmul
from .attention_folds import batch, fold, fold_all, unfold
from .attention_plain import by_group, without_future

#: Bytes of keys and values that a GPU copies in the time that it takes to start the operations of
#: the parts. Measured on an H100.
SMALL_COPY = 96 << 20


def _scores(q: mx.array, k: mx.array, scale: float, causal: bool) -> mx.array:
    """(B, Hkv, G * Lq, Lk)"""
    queries = by_group(q * constant(scale, q.dtype), k)
    scores = matmul(queries, mx.swapaxes(k, -1, -2))
    if causal and q.shape[2] > 1:
        scores = without_future(scores, q.shape[2])
    return scores


def forward(
    q: mx.array, k: mx.array, v: mx.array, *, scale: float, causal: bool, **_: Any
) -> list[mx.array]:
    """O (B, H, Lq, Dv) and l (B, H, Lq, 1)."""
    scores = _scores(q, k, scale, causal)
    weights = mx.softmax(scores, axis=-1, precise=True)
    top, most = (mx.max(x, axis=-1, keepdims=True) for x in (scores, weights))
    if scores.dtype.size < 4:
        top, most = top.astype(mx.float32), most.astype(mx.float32)
    total = top - mx.log(most)
    shape = q.shape[:3]
    return [mx.reshape(matmul(weights, v), (*shape, -1)), mx.reshape(total, (*shape, 1))]


def _d_scores(arrays: Arrays, scale: float, causal: bool) -> tuple[mx.array, mx.array, mx.array]:
    """P and dS, and the cotangent of O by group."""
    q, k, v, out, total, cotangent, of_total = arrays
    scores = _scores(q, k, scale, causal).astype(total.dtype)
    weights = mx.exp(scores - by_group(total, k))
    c = cotangent.astype(total.dtype)
    d = mx.sum(c * out.astype(total.dtype), axis=-1, keepdims=True) - of_total
    c = by_group(cotangent, k)
    of_weights = matmul(c, mx.swapaxes(v, -1, -2)).astype(total.dtype)
    return weights, weights * (of_weights - by_group(d, k)), c


def _query_vjp(*arrays: mx.array, scale: float, causal: bool, **_: Any) -> list[mx.array]:
    q, k = arrays[:2]
    ds = _d_scores(arrays, scale, causal)[1].astype(q.dtype)
    return [mx.reshape(matmul(ds, k) * constant(scale, q.dtype), q.shape)]


def _key_vjp(*arrays: mx.array, scale: float, causal: bool, **_: Any) -> list[mx.array]:
    q, k = arrays[:2]
    weights, ds, c = _d_scores(arrays, scale, causal)
    queries = by_group(q * constant(scale, q.dtype), k)
    return [
        matmul(mx.swapaxes(ds.astype(q.dtype), -1, -2), queries),
        matmul(mx.swapaxes(weights.astype(q.dtype), -1, -2), c),
    ]


# The rules -------------------------------------------------------------------------------------


def _batch(
    size: int, arrays: Arrays, axes: Axes, **static: Any
) -> tuple[list[mx.array], list[int]]:
    return batch(part, size, arrays, axes, **static)


def _batch_query_vjp(
    size: int, arrays: Arrays, axes: Axes, **static: Any
) -> tuple[list[mx.array], list[int]]:
    q, k, v, *of_rows = arrays
    if axes[1] is None and axes[2] is None and sample_ndim(q, axes[0]) == 4:
        length = sample_shape(q, axes[0])[2]
        if length == 1 or not static["causal"]:  # samples are further rows
            rows = [fold(x, a, size, 2) for x, a in zip((q, *of_rows), (axes[0], *axes[3:]))]
            static["causal"] = False
            grads = query_vjp(rows[0], k, v, *rows[1:], **static)
            return [unfold(g, 2, size) for g in grads], [2]
    return _batch_of_batch(query_vjp, size, arrays, axes, **static)


def _batch_of_batch(
    bind: Any, size: int, arrays: Arrays, axes: Axes, **static: Any
) -> tuple[list[mx.array], list[int]]:
    folded, _ = fold_all(size, arrays[:3], axes[:3], False)
    folded += [fold(x, a, size, 0) for x, a in zip(arrays[3:], axes[3:])]
    grads = [unfold(g, 0, size) for g in bind(*folded, **static)]
    return grads, [0] * len(grads)


def _vjp(primals: Arrays, cotangents: Arrays, outputs: Arrays, **static: Any) -> list[mx.array]:
    given = [*primals, *outputs, *cotangents]
    return [*query_vjp(*given, **static), *key_vjp(*given, **static)]


def _vjp_of(
    plain: Any, primals: Arrays, cotangents: Arrays, outputs: Arrays, **static: Any
) -> list[mx.array]:
    """A second derivative, for which O and l are functions of q, k and v."""
    q, k, v, out, total, *others = primals

    def whole(q: mx.array, k: mx.array, v: mx.array, *others: mx.array) -> list[mx.array]:
        return plain(q, k, v, *forward(q, k, v, **static), *others, **static)

    grads = native.vjp(whole, [q, k, v, *others], list(cotangents))[1]
    return [*grads[:3], mx.zeros_like(out), mx.zeros_like(total), *grads[3:]]


part = Primitive("attention_part", decomposition=forward, lowering=forward, batch=_batch, vjp=_vjp)
query_vjp = Primitive(
    "attention_part_query_vjp",
    decomposition=_query_vjp,
    lowering=_query_vjp,
    batch=_batch_query_vjp,
    vjp=functools.partial(_vjp_of, _query_vjp),
)
key_vjp = Primitive(
    "attention_part_key_vjp",
    decomposition=_key_vjp,
    lowering=_key_vjp,
    batch=functools.partial(_batch_of_batch, lambda *xs, **static: key_vjp(*xs, **static)),
    vjp=functools.partial(_vjp_of, _key_vjp),
)


# Two parts -------------------------------------------------------------------------------------
#
# Arrays: q (R * B, H, L, D); keys and values of the prompt (B, Hkv, P, D), each for every Bth row;
# own keys and values (R * B, Hkv, P', D), causal.


def _merged(
    of_part: Any, q: mx.array, pk: mx.array, pv: mx.array, k: mx.array, v: mx.array, scale: float
) -> mx.array:
    batch, length = pk.shape[0], q.shape[2]
    repeats = q.shape[0] // batch
    if repeats == 1:
        out, total = of_part(q, pk, pv, scale, False)
    else:  # as further rows of the prompt's queries: (B, H, R * L, D)
        rows = mx.moveaxis(mx.unflatten(q, 0, (repeats, batch)), 0, 2)
        out, total = (
            mx.flatten(mx.moveaxis(mx.unflatten(x, 2, (repeats, length)), 2, 0), 0, 1)
            for x in of_part(mx.flatten(rows, 2, 3), pk, pv, scale, False)
        )
    own, own_total = of_part(q, k, v, scale, length > 1)
    # Not own + w (out - own): the few own keys have by far the greater output, in whose rounding
    # that of a long prompt would be lost. The weights are of float32, and so are both products.
    ahead = total - own_total
    return (mx.sigmoid(ahead) * out + mx.sigmoid(-ahead) * own).astype(q.dtype)


def _plain_part(*arrays: Any) -> list[mx.array]:
    *qkv, scale, causal = arrays
    return forward(*qkv, scale=scale, causal=causal)


def _bound_part(*arrays: Any) -> list[mx.array]:
    *qkv, scale, causal = arrays
    bind = part if "vmap" in levels.active() else part.differentiable
    return bind(*qkv, scale=scale, causal=causal, has_mask=False)


def _both(*arrays: mx.array, scale: float) -> list[mx.array]:
    return [_merged(_plain_part, *arrays, scale)]  # pyright: ignore


def _both_fused(*arrays: mx.array, scale: float) -> list[mx.array]:
    q, pk, pv, k, v = arrays
    repeats = q.shape[0] // pk.shape[0]
    if not _devices.gpu() or repeats * (pk.nbytes + pv.nbytes) + k.nbytes + v.nbytes > SMALL_COPY:
        return _both(*arrays, scale=scale)
    keys, values = (
        mx.concatenate([p if repeats == 1 else mx.tile(p, (repeats, 1, 1, 1)), x], axis=2)
        for p, x in ((pk, k), (pv, v))
    )
    raw = original(mx.fast, "scaled_dot_product_attention")
    return [raw(q, keys, values, scale=scale, mask="causal" if q.shape[2] > 1 else None)]


def _batch_both(
    size: int, arrays: Arrays, axes: Axes, *, scale: float
) -> tuple[list[mx.array], list[int]]:
    q, pk, pv, k, v = arrays
    q, k, v = (fold(x, axes[i], size, 0) for i, x in ((0, q), (3, k), (4, v)))
    if axes[1] is not None or axes[2] is not None:
        batch = sample_shape(pk, axes[1])[0]
        pk, pv = fold(pk, axes[1], size, 0), fold(pv, axes[2], size, 0)
        repeats = q.shape[0] // (size * batch)
        if repeats > 1:  # (N, R, B, ...) -> (R, N, B, ...)
            order = (size, repeats, batch)
            q, k, v = (
                mx.flatten(mx.swapaxes(mx.unflatten(x, 0, order), 0, 1), 0, 2) for x in (q, k, v)
            )
            (out,) = prompt(q, pk, pv, k, v, scale=scale)
            out = mx.unflatten(out, 0, (repeats, size, batch))
            return [mx.flatten(mx.swapaxes(out, 0, 1), 1, 2)], [0]
    return [unfold(prompt(q, pk, pv, k, v, scale=scale)[0], 0, size)], [0]


def _vjp_both(
    primals: Arrays, cotangents: Arrays, outputs: Arrays, *, scale: float
) -> list[mx.array]:
    def fun(*xs: mx.array) -> list[mx.array]:
        return [_merged(_bound_part, *xs, scale)]  # pyright: ignore

    return native.vjp(fun, list(primals), list(cotangents))[1]


prompt = Primitive(
    "prompt_attention",
    decomposition=_both,
    lowering=_both_fused,
    batch=_batch_both,
    vjp=_vjp_both,
)
