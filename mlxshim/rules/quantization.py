"""Quantized matrices made and undone: `mx.quantize`, `mx.dequantize`.

    W[n, g] = scales[n, g] * Q[n, g] + biases[n, g]

Q is packed into uint32 along its last dimension, and `group_size` entries share a scale. The modes
"mxfp4", "mxfp8" and "nvfp4" have floating-point entries, scales of one byte and no biases (OCP
Microscaling Formats 1.0). Samples are further leading dimensions.

Source: mlx/ops.cpp (shapes, dtypes, the fallbacks of quantize and dequantize).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import mlx.core as mx

from ..core import native
from ..core.interception import intercept, original
from ..core.primitive import Arrays, Axes, Primitive
from ._folding import front, loop_batch, may_be_mapped, on_stream
from .fp8 import fp8_values, read_as_fp8, rounded_to_fp8

#: (group size, bits) where the caller gives none: mlx/ops.cpp, quantization_params_from_mode.
DEFAULTS = {"affine": (64, 4), "mxfp4": (32, 4), "mxfp8": (32, 8), "nvfp4": (16, 4)}


def parameters(mode: str, group_size: int | None, bits: int | None) -> dict[str, Any]:
    size, width = DEFAULTS[mode]
    return {"group_size": group_size or size, "bits": bits or width, "mode": mode}


@intercept(mx, "quantize")
def quantize(
    w: mx.array,
    /,
    group_size: int | None = None,
    bits: int | None = None,
    mode: str = "affine",
    *,
    global_scale: mx.array | None = None,
    stream: Any = None,
) -> Any:
    out = original(mx, "quantize")(
        w, group_size, bits, mode, global_scale=global_scale, stream=stream
    )
    if not may_be_mapped(out[0]):
        return out
    arrays = [w] if global_scale is None else [w, global_scale]
    return tuple(on_stream(stream, quantize_, *arrays, **parameters(mode, group_size, bits)))


@intercept(mx, "dequantize")
def dequantize(
    w: mx.array,
    /,
    scales: mx.array,
    biases: mx.array | None = None,
    group_size: int | None = None,
    bits: int | None = None,
    mode: str = "affine",
    global_scale: mx.array | None = None,
    dtype: mx.Dtype | None = None,
    *,
    stream: Any = None,
) -> mx.array:
    out = original(mx, "dequantize")(
        w, scales, biases, group_size, bits, mode, global_scale, dtype, stream=stream
    )
    if not may_be_mapped(out):
        return out
    arrays = [x for x in (w, scales, biases, global_scale) if x is not None]
    static = {"dtype": dtype, **parameters(mode, group_size, bits)}
    return on_stream(stream, dequantize_, *arrays, **static)[0]


def _quantize_fused(w: mx.array, *global_scale: mx.array, **static: Any) -> list[mx.array]:
    scale = {"global_scale": global_scale[0]} if global_scale else {}
    return list(original(mx, "quantize")(w, **scale, **static))


def _quantize_decomposed(
    w: mx.array, *global_scale: mx.array, group_size: int, bits: int, mode: str
) -> list[mx.array]:
    if mode == "affine":  # MLX's node carries its own decomposition
        return _quantize_fused(w, group_size=group_size, bits=bits, mode=mode)
    groups = mx.unflatten(w, -1, (-1, group_size))
    largest = mx.max(mx.abs(groups), axis=-1, keepdims=True)
    scales = largest / mx.array(6.0 if bits == 4 else 448.0, w.dtype)
    if mode == "nvfp4":
        encode = mx.array(448.0 * 6.0) / global_scale[0] if global_scale else mx.array(1.0)
        packed_scales = rounded_to_fp8(scales * encode)[0]
        groups = groups / read_as_fp8(packed_scales, dtype=w.dtype)[0] * encode
    else:
        exponent = mx.log2(scales + (scales == 0).astype(w.dtype))
        exponent = mx.ceil(exponent) if _scales_round_up() else mx.round(exponent)
        groups = groups / mx.power(mx.array(2.0, w.dtype), exponent)
        packed_scales = (exponent.astype(mx.int32) + 127).astype(mx.uint8)
    if bits == 4:
        distance = mx.abs(mx.expand_dims(groups, -1) - _fp4_values(w.dtype))
        codes = mx.argmin(distance, axis=-1)
    else:
        codes = rounded_to_fp8(groups)[0]
    codes = mx.unflatten(mx.flatten(codes.astype(mx.uint32), -2, -1), -1, (-1, 32 // bits))
    packed = mx.sum(mx.left_shift(codes, _shifts(bits)), axis=-1).astype(mx.uint32)
    return [packed, mx.squeeze(packed_scales, -1)]


def _dequantize_fused(
    w: mx.array, scales: mx.array, *rest: mx.array, dtype: mx.Dtype | None, **static: Any
) -> list[mx.array]:
    biases, scale = (rest[0], None) if static["mode"] == "affine" else (None, (*rest, None)[0])
    fun = original(mx, "dequantize")
    return [fun(w, scales, biases, **static, global_scale=scale, dtype=dtype)]


def _dequantize_decomposed(
    w: mx.array, scales: mx.array, *rest: mx.array, dtype: mx.Dtype | None, **static: Any
) -> list[mx.array]:
    return [dequantized(w, scales, *rest, dtype=dtype, **static)]


def dequantized(
    w: mx.array,
    scales: mx.array,
    *rest: mx.array,
    dtype: mx.Dtype | None,
    group_size: int,
    bits: int,
    mode: str,
) -> mx.array:
    """The whole matrix, by operations that can be transformed."""
    if mode == "affine":
        static = {"group_size": group_size, "bits": bits, "mode": mode}
        return _dequantize_fused(w, scales, *rest, dtype=dtype, **static)[0]
    dtype = dtype or mx.bfloat16
    codes = mx.right_shift(mx.expand_dims(w, -1), _shifts(bits)) & mx.array(2**bits - 1, mx.uint32)
    values = mx.take(_fp4_values(dtype) if bits == 4 else fp8_values(dtype), codes)
    groups = mx.unflatten(mx.flatten(values, -2, -1), -1, (-1, group_size))
    factors = mx.take(fp8_values(dtype) if mode == "nvfp4" else _powers(dtype), scales)
    if rest:
        factors = factors * (rest[0] / mx.array(448.0 * 6.0)).astype(dtype)
    return mx.flatten(groups * mx.expand_dims(factors, -1), -2, -1)


@functools.cache
def _scales_round_up() -> bool:
    """MLX rounds the exponent of a power-of-two scale up, 0.32.2 and older to the nearest."""
    scales = original(mx, "quantize")(mx.full((1, 32), 7.2), mode="mxfp4")[1]
    return scales.item() == 128


@functools.lru_cache(maxsize=8)
def _shifts(bits: int) -> mx.array:
    return mx.array(list(range(0, 32, bits)), mx.uint32)


@functools.lru_cache(maxsize=8)
def _fp4_values(dtype: mx.Dtype) -> mx.array:
    positive = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    return mx.array([*positive, *(-v for v in positive)], dtype)


@functools.lru_cache(maxsize=8)
def _powers(dtype: mx.Dtype) -> mx.array:
    return mx.power(mx.array(2.0, dtype), mx.array(list(range(-127, 129)), dtype))


def _leading_batch(
    bind: Callable[..., list[mx.array]],
    parts: int,
    size: int,
    arrays: Arrays,
    axes: Axes,
    **static: Any,
) -> tuple[list[mx.array], list[int]]:
    """Samples are a further leading dimension of the first `parts` arrays; the rest are shared."""
    if any(a is not None for a in axes[parts:]):
        return loop_batch(bind, size, arrays, axes, **static)
    folded = [front(x, a, size) for x, a in zip(arrays[:parts], axes)]
    outputs = bind(*folded, *arrays[parts:], **static)
    return outputs, [0] * len(outputs)


def _quantize_batch(size: int, arrays: Arrays, axes: Axes, **static: Any) -> Any:
    return _leading_batch(quantize_, 1, size, arrays, axes, **static)


def _dequantize_batch(size: int, arrays: Arrays, axes: Axes, **static: Any) -> Any:
    parts = 3 if static["mode"] == "affine" else 2
    return _leading_batch(dequantize_, parts, size, arrays, axes, **static)


def _dequantize_vjp(
    primals: Arrays, cotangents: Arrays, outputs: Arrays, *, dtype: Any, **static: Any
) -> list[mx.array]:
    w, scales, *rest = primals
    if static["mode"] == "affine":
        of_w = cotangents[0].astype(scales.dtype)
        return [mx.zeros_like(w), *affine_gradients(of_w, w, scales, rest[0], **static)]

    def of_scale(*scale: mx.array) -> list[mx.array]:
        return _dequantize_decomposed(w, scales, *scale, dtype=dtype, **static)

    found = native.vjp(of_scale, rest, list(cotangents))[1] if rest else []
    return [mx.zeros_like(w), mx.zeros_like(scales), *found]


def affine_gradients(
    of_w: mx.array, w: mx.array, scales: mx.array, biases: mx.array, **static: Any
) -> list[mx.array]:
    """The gradients of scales and biases, given that of the dequantized matrix."""
    groups = mx.unflatten(of_w, -1, (-1, static["group_size"]))
    levels_ = dequantize_(w, mx.ones_like(scales), mx.zeros_like(biases), dtype=None, **static)[0]
    levels_ = mx.unflatten(levels_, -1, (-1, static["group_size"]))
    return [mx.sum(groups * levels_, axis=-1), mx.sum(groups, axis=-1)]


quantize_ = Primitive(
    "quantize",
    decomposition=_quantize_decomposed,
    lowering=_quantize_fused,
    batch=_quantize_batch,
)
dequantize_ = Primitive(
    "dequantize",
    decomposition=_dequantize_decomposed,
    lowering=_dequantize_fused,
    batch=_dequantize_batch,
    vjp=_dequantize_vjp,
)


def requantized(x: mx.array, global_scale: mx.array | None, **static: Any) -> mx.array:
    """`x` rounded to what it is after quantization."""
    scale = [] if global_scale is None else [global_scale]
    return dequantized(*_quantize_decomposed(x, *scale, **static), *scale, dtype=x.dtype, **static)
