"""Normalisation over the last axis: `mx.fast.rms_norm`, `mx.fast.layer_norm`.

    y = n(x) * weight + bias            x: (..., D)    weight, bias: (D,), each may be missing
    n(x) = x / sqrt(mean(x^2) + eps)                        rms_norm, which has no bias
    n(x) = (x - mean(x)) / sqrt(var(x) + eps)               layer_norm

Every row stands for itself, so samples are further rows wherever the mapped axis lies, unless it is
the last. A mapped weight or bias is one operation after the fused one without it. Backward, with
n' the derivative of n and a cotangent c of y, for each sample

    dx = n'(x)^T (c * weight)    dweight = sum over rows of c * n(x)    dbias = sum over rows of c

where MLX's fused backward gives dx, and weight and bias gradients summed over all rows it is given:
right for one sample, so those of each sample are written out.

MLX's own transforms of both are right, but decomposed. On the CPU there is nothing else to reach.
On CUDA the backward pass of layer_norm is wrong for some widths, under plain grad too.

Source: mlx/fast.cpp, mlx/backend/cuda/rms_norm.cu, mlx/backend/cuda/layer_norm.cu,
mlx/backend/metal/normalization.cpp.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from ..core import levels, native
from ..core.interception import intercept, original
from ..core.primitive import Arrays, Axes, Primitive
from . import _devices
from ._constants import constant
from ._folding import front, is_ours
from ._plans import planned
from ._sums import sums_of_rows

# The calls -------------------------------------------------------------------------------------


@intercept(mx.fast, "rms_norm")
def rms_norm(x: mx.array, weight: mx.array | None, eps: float, *, stream: Any = None) -> mx.array:
    if not is_ours(x):
        return original(mx.fast, "rms_norm")(x, weight, eps, stream=stream)
    return _bind("rms_norm", x, weight, None, eps, stream)


@intercept(mx.fast, "layer_norm")
def layer_norm(
    x: mx.array,
    weight: mx.array | None,
    bias: mx.array | None,
    eps: float,
    *,
    stream: Any = None,
) -> mx.array:
    if not is_ours(x) and not ("grad" in levels.active() and _has_tail(x)):
        return original(mx.fast, "layer_norm")(x, weight, bias, eps, stream=stream)
    return _bind("layer_norm", x, weight, bias, eps, stream)


def _bind(
    name: str, x: mx.array, weight: mx.array | None, bias: mx.array | None, eps: float, stream: Any
) -> mx.array:
    if stream is not None:
        with mx.stream(stream):
            return _bind(name, x, weight, bias, eps, None)
    given = [a for a in (x, weight, bias) if a is not None]

    def call() -> tuple[mx.array, list[mx.array]]:
        arrays, form = given, {"name": name, "weighted": weight is not None, "eps": eps}
        if any(a.dtype != x.dtype for a in arrays):
            # MLX casts to what it will return, before anything else.
            dtype = _fused(*arrays, **form)[0].dtype
            arrays = [a.astype(dtype) for a in arrays]
        bind = norm if "vmap" in levels.active() else norm.differentiable
        return bind(*arrays, **form)[0], arrays

    return planned((name, weight is None, eps), given, stream, call)


def _has_tail(x: mx.array) -> bool:
    """Whether the rows end between two of the reads of CUDA's kernels.

    There the backward pass of layer_norm reads past its registers: wrong numbers (0.32.4).
    """
    return _devices.cuda() and x.ndim > 0 and x.shape[-1] * x.dtype.size % 16 != 0


def _fused(x: mx.array, *affine: mx.array, name: str, weighted: bool, eps: float) -> list[mx.array]:
    weight = affine[0] if weighted else None
    if name == "rms_norm":
        return [original(mx.fast, name)(x, weight, eps)]
    bias = affine[-1] if len(affine) > weighted else None
    return [original(mx.fast, name)(x, weight, bias, eps)]


def _plain_vjp(*arrays: mx.array, name: str, weighted: bool, eps: float) -> list[mx.array]:
    """The backward pass of n(x) * weight: what a trace holds, where MLX's own would be derived."""
    x, *weight, cotangent = arrays
    dtype = x.dtype
    if dtype.size < 4:
        x, cotangent = x.astype(mx.float32), cotangent.astype(mx.float32)
    if name == "layer_norm":
        x = x - mx.mean(x, axis=-1, keepdims=True)
    inverse = mx.rsqrt(mx.mean(x * x, axis=-1, keepdims=True) + constant(eps, x.dtype))
    n = x * inverse
    c = cotangent * weight[0] if weighted else cotangent
    dx = c - n * mx.mean(c * n, axis=-1, keepdims=True)
    if name == "layer_norm":
        dx = dx - mx.mean(c, axis=-1, keepdims=True)
    dx = (dx * inverse).astype(dtype)
    return [dx, _sum_of_rows(cotangent * n, 0).astype(dtype)] if weighted else [dx]


def _fused_vjp(*arrays: mx.array, **form: Any) -> list[mx.array]:
    if form["name"] == "layer_norm" and _has_tail(arrays[0]):
        return _plain_vjp(*arrays, **form)
    *primals, cotangent = arrays
    return native.vjp(lambda *xs: _fused(*xs, **form), primals, [cotangent])[1]


def backward(
    x: mx.array, weight: mx.array | None, cotangent: mx.array, *, name: str, eps: float
) -> list[mx.array]:
    """The gradients of x and, if there is one, the weight: for what differentiates by hand."""
    given = [x, cotangent] if weight is None else [x, weight, cotangent]
    return _fused_vjp(*given, name=name, weighted=weight is not None, eps=eps)


def takes_weight(name: str) -> bool:
    """Whether dx of rows that share a weight is sooner there with it than by c * weight first.

    MLX adds up the weight's gradient over all rows, too, which nobody asks for. The kernel of
    rms_norm does that on the way, and rows without a weight get another kernel (on CUDA
    `rms_norm_vjp_small_fallback`); that of layer_norm writes c * n(x) out and reads it and c again.
    """
    return name == "rms_norm"


# The rules -------------------------------------------------------------------------------------


def _batch(
    size: int, arrays: Arrays, axes: Axes, *, weighted: bool, **form: Any
) -> tuple[list[mx.array], list[int]]:
    x, *affine = arrays
    axis, *affine_axes = axes
    if not any(a is not None for a in affine_axes):
        assert axis is not None  # something is mapped
        if axis == x.ndim - 1:
            x, axis = mx.moveaxis(x, axis, 0), 0
        return norm(x, *affine, weighted=weighted, **form), [axis]

    rows = x.ndim - (axis is not None)
    x = x if axis is None else mx.moveaxis(x, axis, 0)
    fused = weighted and affine_axes[0] is None  # then only the bias is mapped
    y = norm(x, *affine[:fused], weighted=fused, **form)[0]
    for i in range(fused, len(affine)):
        term = _beside(affine[i], affine_axes[i], rows)
        y = y * term if i < weighted else y + term
    return [y], [0]


def _batch_vjp(
    size: int, arrays: Arrays, axes: Axes, *, weighted: bool, **form: Any
) -> tuple[list[mx.array], list[int]]:
    x, *weight, cotangent = arrays
    rows = x.ndim - (axes[0] is not None)
    xs, cotangents = front(x, axes[0], size), front(cotangent, axes[-1], size)
    if not weighted:
        return norm_vjp(xs, cotangents, weighted=False, **form), [0]
    if axes[1] is None and takes_weight(form["name"]):
        dx = norm_vjp(xs, weight[0], cotangents, weighted=True, **form)[0]
    else:
        weighed = cotangents * _beside(weight[0], axes[1], rows)
        dx = norm_vjp(xs, weighed, weighted=False, **form)[0]
    normalised = norm(x if axes[0] is None else xs, weighted=False, **form)[0]
    return [dx, sums_of_rows(cotangents * normalised)], [0, 0]


def _vjp(
    primals: Arrays, cotangents: Arrays, outputs: Arrays, *, weighted: bool, **form: Any
) -> list[mx.array]:
    x, *affine = primals
    grads = norm_vjp(x, *affine[:weighted], cotangents[0], weighted=weighted, **form)
    if len(affine) > weighted:
        grads.append(_sum_of_rows(cotangents[0], 0))
    return grads


def _beside(x: mx.array, axis: int | None, ndim: int) -> mx.array:
    """A weight or bias in the shape to meet (N, *rows, D), `ndim` dimensions beside the N."""
    if axis is None:
        return x
    x = mx.moveaxis(x, axis, 0)
    return mx.expand_dims(x, tuple(range(1, ndim))) if ndim > 1 else x


def _sum_of_rows(x: mx.array, first: int) -> mx.array:
    axes = tuple(range(first, x.ndim - 1))
    return mx.sum(x, axis=axes) if axes else x


# The value in a trace is MLX's own node: its transforms are right, if slow, and in a trace it is
# transformed and thrown away. One call builds it, where plain operations would be eight. Its own
# backward pass MLX would have to derive from those eight; ours is written out.
norm = Primitive("norm", decomposition=_fused, lowering=_fused, batch=_batch, vjp=_vjp)
norm_vjp = Primitive("norm_vjp", decomposition=_plain_vjp, lowering=_fused_vjp, batch=_batch_vjp)
