"""Scaled dot-product attention: `mx.fast.scaled_dot_product_attention`.

    O = softmax(scale * Q K^T + mask) V              Q: (B, H, Lq, D)   K: (B, Hkv, Lk, D)
                                                     V: (B, Hkv, Lk, Dv), Hkv divides H

Source: mlx/fast.cpp (arguments, the decomposition), mlx/backend/cuda/scaled_dot_product_attention.*
and mlx/backend/metal/scaled_dot_product_attention.cpp (when a kernel is fused). Sharing K/V by
folding queries into the heads of a group: Ainslie et al., "GQA", 2023.
"""

from __future__ import annotations

import functools
from typing import Any

import mlx.core as mx

from ..core import levels, native
from ..core.interception import intercept, original
from ..core.primitive import Arrays, Axes, Primitive
from ._devices import gpu as _gpu
from ._dtypes import promoted
from ._folding import sample_shape
from ._partial import not_boolean, vjp_at
from .attention_folds import (
    batch,
    fold,
    fold_all,
    unfold,
)
from .attention_large import by_halves, is_large
from .attention_long import attention as in_blocks
from .attention_long import budget, exceeds_budget
from .attention_plain import decompose, decompose_vjp
from .attention_ragged import padded, padding

# The call --------------------------------------------------------------------------------------


@intercept(mx.fast, "scaled_dot_product_attention")
def scaled_dot_product_attention(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    *,
    scale: float,
    mask: Any = None,
    sinks: mx.array | None = None,
    stream: Any = None,
    **newer: Any,
) -> mx.array:
    stack = levels.active()
    has_mask = isinstance(mask, mx.array)
    asked = None
    if "vmap" in stack and sinks is None and stream is None and not newer:
        asked = (
            *("attention", scale, None if has_mask else mask),
            *(tuple(stack), mx.default_device(), budget()),
        )
        known = (
            Primitive.again(asked, q, k, v, mask) if has_mask else Primitive.again(asked, q, k, v)
        )
        if known is not None:
            return known[0]
    large = exceeds_budget(q, k, stack)
    if (
        stack == ["grad"]
        and not large
        and not (_gpu(stream) and (has_mask or sinks is not None or _is_ragged(q, k, v, mask)))
    ):
        # MLX's own node and derivative: nothing to gain by standing in between.
        return _raw(q, k, v, scale=scale, mask=mask, sinks=sinks, stream=stream, **newer)
    if newer:  # an explicit default is no request
        newer = {name: value for name, value in newer.items() if value}
    dtype = _check(q, k, v, scale, mask, sinks, newer)

    arrays = [q, k, v]
    if not (q.dtype == k.dtype == v.dtype):
        arrays = [x.astype(dtype) for x in arrays]
    if has_mask:
        arrays.append(mask if mask.dtype in (dtype, mx.bool_) else mask.astype(dtype))
    if sinks is not None:
        arrays.append(sinks.astype(dtype))
    static = {"scale": float(scale), "causal": not has_mask and mask == "causal"}
    static["has_mask"] = has_mask
    if stream is not None:
        with mx.stream(stream):
            return _dispatch(arrays, static, stack, large, newer)
    if arrays[0] is not q or (has_mask and arrays[3] is not mask):
        asked = None  # they had to be cast first
    return _dispatch(arrays, static, stack, large, newer, asked)


def _dispatch(
    arrays: list[mx.array],
    static: dict[str, Any],
    stack: list[Any],
    large: bool,
    newer: dict[str, Any],
    asked: Any = None,
) -> mx.array:
    if large and not newer and not _fuses(arrays, static, stack):
        return in_blocks(*arrays, **static)[0]
    if newer or ("vmap" in stack and _fuses(arrays, static, stack)):
        out = attention(*arrays, **static, **newer)[0]
        if asked is not None:
            Primitive.asked(asked)
        return out
    if stack == ["grad"]:
        extra = padding(arrays[0], arrays[1], arrays[2], static["causal"])
        if len(arrays) == 3 and extra and not is_large(*arrays):
            return padded(_fused, extra, *arrays, **static)[0]
        return attention.differentiable(*arrays, **static)[0]
    # No kernel to reach, or a derivative that no kernel has: MLX's own operations, whose
    # transforms keep the probabilities instead of computing them twice.
    return decompose(*arrays, **static)[0]


def _is_ragged(q: Any, k: Any, v: Any, mask: Any) -> bool:
    """Whether MLX's own derivative would decompose the call, or bring the process down."""
    if not all(isinstance(x, mx.array) and x.ndim == 4 for x in (q, k, v)):
        return False  # refused further on
    extra = padding(q, k, v, mask == "causal")
    return extra is not None and (any(extra) or is_large(q, k, v))


def _raw(*args: Any, **kwargs: Any) -> mx.array:
    return original(mx.fast, "scaled_dot_product_attention")(*args, **kwargs)


def _check(
    q: Any, k: Any, v: Any, scale: Any, mask: Any, sinks: Any, newer: dict[str, Any]
) -> mx.Dtype:
    """The dtype to compute in; what MLX refuses is refused here, in its words where it has any."""
    if isinstance(q, mx.array) and isinstance(k, mx.array) and isinstance(v, mx.array):
        qs, ks, vs = q.shape, k.shape, v.shape
        dtype = promoted(q, k, v)
        if (
            len(qs) == len(ks) == len(vs) == 4
            and qs[0] == ks[0] == vs[0]
            and qs[3] == ks[3]
            and ks[1:3] == vs[1:3]
            and ks[1] > 0
            and qs[1] % ks[1] == 0
            and dtype is not None
            and isinstance(scale, (int, float))
            and (mask is None or _mask_fits(mask, (*qs[:3], ks[2]), dtype))
            and (sinks is None or _sinks_fit(sinks, qs[1], dtype))
        ):
            return dtype
    _raw(q, k, v, scale=scale, mask=mask, sinks=sinks, **newer)
    shapes = ", ".join(str(getattr(x, "shape", type(x).__name__)) for x in (q, k, v))
    raise ValueError(
        f"[scaled_dot_product_attention] cannot take queries, keys and values of shapes {shapes} "
        f"with mask {getattr(mask, 'shape', mask)} and sinks {getattr(sinks, 'shape', sinks)}."
    )


def _mask_fits(mask: Any, full: tuple[int, ...], dtype: mx.Dtype) -> bool:
    if isinstance(mask, str):
        return mask == "causal"
    if not isinstance(mask, mx.array) or mask.ndim > 4 or not _promotes(mask, dtype):
        return False
    return all(m in (1, n) for m, n in zip(reversed(mask.shape), reversed(full)))


def _sinks_fit(sinks: Any, heads: int, dtype: mx.Dtype) -> bool:
    return isinstance(sinks, mx.array) and sinks.shape == (heads,) and _promotes(sinks, dtype)


def _promotes(x: mx.array, dtype: mx.Dtype) -> bool:
    return x.dtype == dtype or promoted(x, mx.zeros((), dtype)) == dtype


# What the device has ---------------------------------------------------------------------------


def _fuses(arrays: list[mx.array], static: dict[str, Any], stack: list[Any]) -> bool:
    """Whether the batch written by hand would reach a fused kernel, forward and backward.

    A wrong answer costs speed, never correctness.
    """
    if "jvp" in stack or stack.count("grad") > 1 or not _gpu():
        return False  # tangents and second derivatives are decomposed everywhere
    training = "grad" in stack
    if mx.metal.is_available():
        return not training  # Metal trains unfused by design
    q, k, v = arrays[:3]
    length, dim, value_dim = q.shape[2], q.shape[3], v.shape[3]
    if training and padding(q, k, v, static["causal"]) is None:
        return False
    if static["causal"] and length > k.shape[2]:
        return False
    if q.dtype != mx.float32:
        return dim % 8 == 0 and dim <= 128 and value_dim % 8 == 0 and value_dim <= 128
    return length < 4 and dim == value_dim and dim in (64, 96, 128) and not static["has_mask"]


# The lowerings ---------------------------------------------------------------------------------


def _fused(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    *rest: mx.array,
    scale: float,
    causal: bool,
    has_mask: bool,
    **newer: Any,
) -> list[mx.array]:
    mask = rest[0] if has_mask else "causal" if causal else None
    sinks = rest[-1] if len(rest) > has_mask else None
    call = original(mx.fast, "scaled_dot_product_attention")
    return [call(q, k, v, scale=scale, mask=mask, sinks=sinks, **newer)]


def _fused_vjp(
    q: mx.array, k: mx.array, v: mx.array, *others: mx.array, **static: Any
) -> list[mx.array]:
    if is_large(q, k, v) and q.shape[0] * q.shape[1] > 1 and _gpu():
        vjp = functools.partial(_fused_vjp, **static)
        return by_halves(vjp, q, k, v, *others, has_mask=static["has_mask"])
    *rest, cotangent = others
    # The sum of the outputs has a cotangent of stride zero, which the kernel does not take.
    cotangent = mx.contiguous(cotangent)
    extra = padding(q, k, v, static["causal"])
    call = functools.partial(padded, _fused, extra) if extra else _fused
    return native.vjp(lambda *qkv: call(*qkv, *rest, **static), [q, k, v], [cotangent])[1]


# The batching rules ----------------------------------------------------------------------------


def _batch(
    size: int, arrays: Arrays, axes: Axes, **static: Any
) -> tuple[list[mx.array], list[int]]:
    if (axes[1] is None) != (axes[2] is None) and sample_shape(arrays[0], axes[0])[0] != 1:
        # One of K and V would have to be copied for each sample to be a batch of the kernel.
        mapped = native.vmap(functools.partial(decompose, **static), in_axes=tuple(axes))
        return mapped(*arrays), [0]
    return batch(attention, size, arrays, axes, **static)


def _batch_vjp(
    size: int, arrays: Arrays, axes: Axes, **static: Any
) -> tuple[list[mx.array], list[int]]:
    """All gradients are per sample, so an unmapped q, k or v is one sample's worth for each."""
    *primals, cotangent = arrays
    *primal_axes, cotangent_axis = axes
    folded, dim = fold_all(size, primals, primal_axes, static["has_mask"])
    folded[:3] = [
        mx.contiguous(x) if axis is None else x for x, axis in zip(folded[:3], primal_axes)
    ]
    grads = attention_vjp(*folded, fold(cotangent, cotangent_axis, size, dim), **static)
    return [unfold(g, dim, size) for g in grads], [dim] * 3


# The vjp rule ----------------------------------------------------------------------------------


def _vjp(primals: Arrays, cotangents: Arrays, outputs: Arrays, **static: Any) -> list[mx.array]:
    grads = list(attention_vjp(*primals, cotangents[0], **static))
    grads += [mx.zeros_like(x) for x in primals[3:]]
    # No kernel gives these; the graph is lazy, so they cost nothing to those who do not ask.
    places = [i for i in not_boolean(primals) if i >= 3]
    if places:
        fun = functools.partial(decompose, **static)
        for i, g in zip(places, vjp_at(fun, primals, places, cotangents)):
            grads[i] = g
    return grads


attention = Primitive(
    "scaled_dot_product_attention",
    decomposition=decompose,
    lowering=_fused,
    batch=_batch,
    vjp=_vjp,
)
attention_vjp = Primitive(
    "scaled_dot_product_attention_vjp",
    decomposition=decompose_vjp,
    lowering=_fused_vjp,
    batch=_batch_vjp,
)
