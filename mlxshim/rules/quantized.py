"""Products with quantized matrices: `mx.quantized_matmul`. How they are quantized: quantization.py.

    Y = X W^T,  W[n, g] = scales[n, g] * Q[n, g] + biases[n, g]     X: (..., M, K)   Q: (..., N, K)

or Y = X W where `transpose` is False. One call of the kernel for all samples:

* X mapped and W not: samples are further rows, W is read as it is, never copied and never
  dequantized; the same for the gradient with respect to X, which is the same operation with
  `transpose` flipped, and for tangents.
* W mapped and X not, `transpose` True, W of two dimensions: samples are further rows of W.
* both mapped: samples are the batch. A part of W that is not mapped where another part is (packed
  entries shared, scales per sample) is copied for each sample: kernels want one layout for all.

Gradients with respect to scales and biases contract the gradient of W, which is formed as MLX forms
it, for each sample. The decomposition, which dequantizes W, is evaluated only if an argument is a
tracer of `grad` or `mx.compile` but nothing is mapped after all.

Source: mlx/primitives.cpp (`QuantizedMatmul::vjp`), mlx/backend/cuda/quantized/quantized.cpp (what
kernels take: the last two dimensions of Q, scales and biases contiguous, their batch contiguous or
shared).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from ..core.interception import intercept, original
from ..core.primitive import Arrays, Axes, Primitive
from ._dtypes import cast
from ._folding import (
    broadcast_shape,
    front,
    may_be_mapped,
    on_stream,
    pad_dims,
    sample_ndim,
    sum_to,
)
from ._mlx_0_31 import matmul
from ._plans import planned
from .quantization import affine_gradients, dequantized, parameters


@intercept(mx, "quantized_matmul")
def quantized_matmul(
    x: mx.array,
    w: mx.array,
    /,
    scales: mx.array,
    biases: mx.array | None = None,
    transpose: bool = True,
    group_size: int | None = None,
    bits: int | None = None,
    mode: str = "affine",
    *,
    stream: Any = None,
) -> mx.array:
    form = (transpose, group_size, bits, mode)
    given = [x, w, scales] if biases is None else [x, w, scales, biases]

    def call() -> tuple[mx.array, list[mx.array]]:
        # MLX's own call checks the arguments; where nothing is traced it is the answer.
        out = original(mx, "quantized_matmul")(x, w, scales, biases, *form, stream=stream)
        if any(p.ndim != w.ndim for p in given[1:]) or w.size == 0 or not may_be_mapped(out):
            return out, []
        arrays = given
        if w.ndim > 2 >= x.ndim:  # MLX has no batch for those, and reads the first matrix alone
            arrays = [x, *(p[(0,) * (w.ndim - 2)] for p in given[1:])]
        if mode == "affine":
            arrays = [p if p.dtype == w.dtype else cast(p, out.dtype) for p in arrays]
        static = {"transpose": transpose, **parameters(mode, group_size, bits)}
        return on_stream(stream, qmm, *arrays, **static)[0], arrays

    return planned(("quantized_matmul", *form), given, stream, call)


def _qmm_decomposed(
    x: mx.array, *weight: mx.array, transpose: bool, **static: Any
) -> list[mx.array]:
    full = dequantized(*weight, dtype=x.dtype, **static)
    return [matmul(x, mx.swapaxes(full, -1, -2) if transpose else full)]


def _qmm_fused(
    x: mx.array,
    w: mx.array,
    scales: mx.array,
    biases: mx.array | None = None,
    **static: Any,
) -> list[mx.array]:
    return [original(mx, "quantized_matmul")(x, w, scales, biases, **static)]


def _qmm_batch(
    size: int, arrays: Arrays, axes: Axes, *, transpose: bool, **static: Any
) -> tuple[list[mx.array], list[int]]:
    x, *weight = arrays
    x_axis, *w_axes = axes
    bind = functools.partial(qmm, transpose=transpose, **static)
    matrix = sample_ndim(weight[0], w_axes[0]) == 2
    if x_axis is not None and all(a is None for a in w_axes):
        if matrix:  # every leading dimension of x is one of rows
            if x_axis == x.ndim - 1:
                x, x_axis = mx.moveaxis(x, x_axis, 0), 0
            return bind(x, *weight), [x_axis]
        x = mx.moveaxis(x, x_axis, -3)  # (..., S, M, K): rows of each matrix
        out = bind(mx.flatten(x, -3, -2), *weight)[0]
        return [mx.unflatten(out, -2, (size, -1))], [out.ndim - 2]
    weight = [front(p, a, size) for p, a in zip(weight, w_axes)]
    if matrix and transpose and x_axis is None:  # rows of W
        out = bind(x, *(mx.flatten(p, 0, 1) for p in weight))[0]
        return [mx.unflatten(out, -1, (size, -1))], [out.ndim - 1]
    if matrix:
        x = front(x, x_axis, size)
        out = bind(mx.reshape(x, (size, -1, x.shape[-1])), *(mx.contiguous(p) for p in weight))[0]
        return [mx.reshape(out, (*x.shape[:-1], out.shape[-1]))], [0]
    x = front(x, x_axis, size)
    ndim = max(x.ndim, weight[0].ndim)
    x, *weight = (pad_dims(p, ndim) for p in (x, *weight))
    batch = broadcast_shape(x.shape[:-2], weight[0].shape[:-2])
    x = mx.broadcast_to(x, (*batch, *x.shape[-2:]))
    weight = [mx.contiguous(mx.broadcast_to(p, (*batch, *p.shape[-2:]))) for p in weight]
    return bind(x, *weight), [0]


def _qmm_vjp(
    primals: Arrays, cotangents: Arrays, outputs: Arrays, *, transpose: bool, **static: Any
) -> list[mx.array]:
    x, w, *rest = primals
    cotangent = cotangents[0]
    of_x = sum_to(qmm(cotangent, w, *rest, transpose=not transpose, **static)[0], x.shape)
    if static["mode"] != "affine":  # bytes, no derivative
        return [of_x, mx.zeros_like(w), mx.zeros_like(rest[0])]
    if w.ndim == 2:
        x = mx.reshape(x, (-1, x.shape[-1]))
        cotangent = mx.reshape(cotangent, (-1, cotangent.shape[-1]))
    elif x.shape[:-2] != cotangent.shape[:-2]:
        x = mx.broadcast_to(x, (*cotangent.shape[:-2], *x.shape[-2:]))
    left, right = (cotangent, x) if transpose else (x, cotangent)
    of_w = matmul(mx.swapaxes(left, -1, -2), right)
    of_w = sum_to(of_w, (*w.shape[:-1], of_w.shape[-1]))
    return [of_x, mx.zeros_like(w), *affine_gradients(of_w, w, *rest, **static)]


def _qmm_jvp(primals: Arrays, tangents: Sequence[mx.array | None], **static: Any) -> list[mx.array]:
    """Y is linear in X, and linear in (scales, biases)."""
    x, w, *rest = primals
    of_x, _, *of_rest = tangents
    terms = []
    if of_x is not None:
        terms += qmm(of_x, *primals[1:], **static)
    if static["mode"] == "affine" and any(t is not None for t in of_rest):
        full = [mx.zeros_like(p) if t is None else t for p, t in zip(rest, of_rest)]
        terms += qmm(x, w, *full, **static)
    return [sum(terms[1:], terms[0]) if terms else mx.zeros_like(qmm(*primals, **static)[0])]


qmm = Primitive(
    "quantized_matmul",
    decomposition=_qmm_decomposed,
    lowering=_qmm_fused,
    batch=_qmm_batch,
    vjp=_qmm_vjp,
    jvp=_qmm_jvp,
)
