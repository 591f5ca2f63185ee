"""Normalisation over the last axis: `mx.fast.rms_norm` and `mx.fast.layer_norm`.

    rms:    y = w * x_hat         x_hat = x n         n = (mean(x^2) + eps)^(-1/2)
    layer:  y = w * x_hat + b     x_hat = (x - mean(x)) n, n of what is left
    dx = n (g - [mean(g)] - x_hat mean(g x_hat)), g = w ct        [layer only]
    dw = sum over rows of ct x_hat                db = sum over rows of ct

x: (..., D), w and b: (D,). MLX decomposes both under vmap; here the samples are further rows of one
fused call. An unmapped w or b is free. A mapped one is applied after the fused call without it.
The gradient of an unmapped w is per sample, where the fused backward sums over all rows: it is the
sum above, and costs nothing to those who do not ask for it.

Source: mlx/fast.cpp; Zhang & Sennrich, "Root Mean Square Layer Normalization", 2019; Ba et al.,
"Layer Normalization", 2016.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from ..core import levels
from ..core.interception import intercept, original
from ..core.primitive import Arrays, Axes, Primitive
from ._constants import constant
from ._devices import fuses as _fuses
from ._dtypes import promoted


@intercept(mx.fast, "rms_norm")
def rms_norm(x: mx.array, weight: Any, eps: float, *, stream: Any = None) -> mx.array:
    if not _fuses(levels.active(), stream) or not _fits(x, weight):
        return original(mx.fast, "rms_norm")(x, weight, eps, stream=stream)
    return _bind(x, weight, None, eps, True, stream)


@intercept(mx.fast, "layer_norm")
def layer_norm(x: mx.array, weight: Any, bias: Any, eps: float, *, stream: Any = None) -> mx.array:
    if not _fuses(levels.active(), stream) or not (_fits(x, weight) and _fits(x, bias)):
        return original(mx.fast, "layer_norm")(x, weight, bias, eps, stream=stream)
    return _bind(x, weight, bias, eps, False, stream)


def _fits(x: Any, weight: Any) -> bool:
    """What does not fit is for MLX to refuse."""
    if not isinstance(x, mx.array) or x.ndim == 0:
        return False
    return weight is None or (isinstance(weight, mx.array) and weight.shape == x.shape[-1:])


def _bind(x: Any, weight: Any, bias: Any, eps: float, rms: bool, stream: Any) -> mx.array:
    arrays = [a for a in (x, weight, bias) if a is not None]
    dtype = promoted(*arrays)
    if dtype is None:
        return _raw(*arrays, eps=eps, rms=rms, weight=weight is not None, bias=bias is not None)
    arrays = [a if a.dtype == dtype else a.astype(dtype) for a in arrays]
    static = {"weight": weight is not None, "bias": bias is not None, "eps": eps, "rms": rms}
    if stream is not None:
        with mx.stream(stream):
            return norm(*arrays, **static)[0]
    return norm(*arrays, **static)[0]


def _named(arrays: Sequence[Any], weight: bool, bias: bool) -> tuple[Any, Any]:
    """The weight and the bias among the arrays that follow x, or their axes; None for none."""
    return (arrays[1] if weight else None), (arrays[1 + weight] if bias else None)


# The decomposition and the lowering ------------------------------------------------------------


def _normalised(x: mx.array, eps: float, rms: bool) -> tuple[mx.array, mx.array]:
    """x_hat and n, in float32."""
    x = x.astype(mx.float32)
    if not rms:
        x = x - mx.mean(x, axis=-1, keepdims=True)
    variance = mx.mean(mx.square(x), axis=-1, keepdims=True)
    n = mx.rsqrt(variance + constant(eps, mx.float32))
    return x * n, n


def _decompose(
    x: mx.array, *wb: mx.array, eps: float, rms: bool, weight: bool, bias: bool
) -> list[mx.array]:
    w, b = _named((x, *wb), weight, bias)
    return [_affine(_normalised(x, eps, rms)[0].astype(x.dtype), w, b)]


def _affine(x: mx.array, w: mx.array | None, b: mx.array | None) -> mx.array:
    x = x if w is None else x * w
    return x if b is None else x + b


def _raw(x: mx.array, *wb: mx.array, eps: float, rms: bool, weight: bool, bias: bool) -> mx.array:
    w, b = _named((x, *wb), weight, bias)
    if rms:
        return original(mx.fast, "rms_norm")(x, w, eps)
    return original(mx.fast, "layer_norm")(x, w, b, eps)


def _decomposed_vjp(
    *arrays: mx.array, eps: float, rms: bool, weight: bool, bias: bool
) -> list[mx.array]:
    *primals, ct = arrays
    x, (w, _) = primals[0], _named(primals, weight, bias)
    x_hat, n = _normalised(x, eps, rms)
    g = (ct if w is None else ct * w).astype(mx.float32)
    dx = g - x_hat * mx.mean(g * x_hat, axis=-1, keepdims=True)
    if not rms:
        dx = dx - mx.mean(g, axis=-1, keepdims=True)
    rows = list(range(x.ndim - 1))
    grads = [(dx * n).astype(x.dtype)]
    if weight:
        grads.append(mx.sum(ct * x_hat.astype(ct.dtype), axis=rows))
    if bias:
        grads.append(mx.sum(ct, axis=rows))
    return grads


def _fused_vjp(*arrays: mx.array, **static: Any) -> list[mx.array]:
    *primals, ct = arrays
    return mx.vjp(lambda *xs: [_raw(*xs, **static)], primals, [ct])[1]


# The rules -------------------------------------------------------------------------------------


def _front(x: mx.array, axis: int | None) -> mx.array:
    return x if axis is None else mx.moveaxis(x, axis, 0)


def _beside(w: mx.array, axis: int | None, ndim: int) -> mx.array:
    """A weight that multiplies (N, ..., D): one for each sample, or one for all."""
    if axis is None:
        return w
    return mx.reshape(
        mx.moveaxis(w, axis, 0), (w.shape[axis], *(1,) * (ndim - 2), w.shape[1 - axis])
    )


def _batch(
    size: int, arrays: Arrays, axes: Axes, *, weight: bool, bias: bool, **static: Any
) -> tuple[list[mx.array], list[int]]:
    x, axis = arrays[0], axes[0]
    (w, b), (w_axis, b_axis) = _named(arrays, weight, bias), _named(axes, weight, bias)
    if w_axis is None and b_axis is None:
        assert axis is not None
        if axis == x.ndim - 1:
            x, axis = mx.moveaxis(x, axis, 0), 0
        return norm(x, *arrays[1:], weight=weight, bias=bias, **static), [axis]
    # A mapped weight and whatever follows it are applied outside.
    inside = [w] if weight and w_axis is None else []
    y = norm(_front(x, axis), *inside, weight=bool(inside), bias=False, **static)[0]
    ndim = y.ndim + (axis is None)
    w = _beside(w, w_axis, ndim) if w is not None and not inside else None
    b = _beside(b, b_axis, ndim) if b is not None else None
    return [_affine(y, w, b)], [0]


def _vjp(primals: Arrays, cotangents: Arrays, outputs: Arrays, **static: Any) -> list[mx.array]:
    return norm_vjp(*primals, cotangents[0], **static)


def _batch_vjp(
    size: int, arrays: Arrays, axes: Axes, *, weight: bool, bias: bool, **static: Any
) -> tuple[list[mx.array], list[int]]:
    x, ct = (
        mx.broadcast_to(a, (size, *a.shape)) if axis is None else mx.moveaxis(a, axis, 0)
        for a, axis in ((arrays[0], axes[0]), (arrays[-1], axes[-1]))
    )
    (w, _), (w_axis, _) = _named(arrays, weight, bias), _named(axes, weight, bias)
    g, inside = ct, []
    if w is not None and w_axis is None:
        inside = [w]
    elif w is not None:
        g = ct * _beside(w, w_axis, x.ndim)
    flags = {"weight": bool(inside), "bias": False}
    grads = norm_vjp(x, *inside, g, **flags, **static)[:1]
    rows = list(range(1, x.ndim - 1))
    if weight:
        x_hat = norm(x, weight=False, bias=False, **static)[0]
        grads.append(mx.sum(ct * x_hat, axis=rows))
    if bias:
        grads.append(mx.sum(ct, axis=rows))
    return grads, [0] * len(grads)


norm = Primitive(
    "norm",
    decomposition=_decompose,
    lowering=lambda *arrays, **static: [_raw(*arrays, **static)],
    batch=_batch,
    vjp=_vjp,
)
norm_vjp = Primitive(
    "norm_vjp", decomposition=_decomposed_vjp, lowering=_fused_vjp, batch=_batch_vjp
)
