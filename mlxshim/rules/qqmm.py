"""`mx.qqmm`: Y = X W^T with both rounded to a quantization.

X mapped: samples are further rows; W mapped alone: further rows of W. The rest (both mapped, or a
global scale: the kernel takes one matrix and one scale) is a loop over samples of fused calls.

Source: mlx/primitives.cpp, `QQMatmul::vjp`.
"""

from __future__ import annotations

import functools
from typing import Any

import mlx.core as mx

from ..core.interception import intercept, original
from ..core.primitive import Arrays, Axes, Primitive
from ._folding import front, loop_batch, may_be_mapped, on_stream
from ._mlx_0_31 import matmul
from .quantization import dequantized, parameters, requantized


@intercept(mx, "qqmm")
def qqmm(
    x: mx.array,
    w: mx.array,
    scales: mx.array | None = None,
    group_size: int | None = None,
    bits: int | None = None,
    mode: str = "nvfp4",
    global_scale_x: mx.array | None = None,
    global_scale_w: mx.array | None = None,
    *,
    stream: Any = None,
) -> mx.array:
    pair = (global_scale_x, global_scale_w)
    out = original(mx, "qqmm")(x, w, scales, group_size, bits, mode, *pair, stream=stream)
    if not may_be_mapped(out):
        return out
    arrays = [p for p in (x, w, scales, *pair) if p is not None]
    static = {"packed": scales is not None, **parameters(mode, group_size, bits)}
    return on_stream(stream, qqmm_, *arrays, **static)[0]


def _qqmm_fused(
    x: mx.array, w: mx.array, *rest: mx.array, packed: bool, **static: Any
) -> list[mx.array]:
    scales = rest[0] if packed else None
    pair = rest[packed:] or (None, None)
    named = {"global_scale_x": pair[0], "global_scale_w": pair[1]}
    return [original(mx, "qqmm")(x, w, scales, **static, **named)]


def _qqmm_decomposed(
    x: mx.array, w: mx.array, *rest: mx.array, packed: bool, **static: Any
) -> list[mx.array]:
    scale_x, scale_w = rest[packed:] or (None, None)
    x = requantized(x, scale_x, **static)
    if packed:
        w = dequantized(w, rest[0], *rest[2:], dtype=x.dtype, **static)
    else:
        w = requantized(w, scale_w, **static)
    return [matmul(x, mx.swapaxes(w, -1, -2))]


def _qqmm_batch(
    size: int, arrays: Arrays, axes: Axes, *, packed: bool, **static: Any
) -> tuple[list[mx.array], list[int]]:
    bind = functools.partial(qqmm_, packed=packed, **static)
    parts = 2 + packed
    scales_shared = all(a is None for a in axes[parts:])
    if scales_shared and all(a is None for a in axes[1:parts]):
        return bind(front(arrays[0], axes[0], size), *arrays[1:]), [0]
    if scales_shared and axes[0] is None:
        weight = [mx.flatten(front(p, a, size), 0, 1) for p, a in zip(arrays[1:], axes[1:parts])]
        out = bind(arrays[0], *weight, *arrays[parts:])[0]
        return [mx.unflatten(out, -1, (size, -1))], [out.ndim - 1]
    return loop_batch(bind, size, arrays, axes)


def _qqmm_vjp(
    primals: Arrays, cotangents: Arrays, outputs: Arrays, *, packed: bool, **static: Any
) -> list[mx.array]:
    """MLX quantizes the cotangent too, along the dimension that is summed over."""
    x, w, *pair = primals
    if packed:
        raise ValueError("[qqmm] has a gradient only for a w that is not quantized.")
    cotangent = cotangents[0]
    bind = functools.partial(qqmm_, packed=False, **static)
    largest = [mx.max(mx.abs(cotangent)).astype(mx.float32)] if pair else []
    of_x = bind(cotangent, mx.swapaxes(w, -1, -2), *largest, *pair[1:])[0]
    rows = mx.reshape(cotangent, (-1, cotangent.shape[-1]))
    inputs = mx.reshape(x, (-1, x.shape[-1]))
    of_w = bind(mx.swapaxes(rows, -1, -2), mx.swapaxes(inputs, -1, -2), *largest, *pair[:1])[0]
    return [of_x, of_w, *(mx.zeros_like(p) for p in pair)]


qqmm_ = Primitive(
    "qqmm",
    decomposition=_qqmm_decomposed,
    lowering=_qqmm_fused,
    batch=_qqmm_batch,
    vjp=_qqmm_vjp,
)
