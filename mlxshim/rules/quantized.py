"""Quantized matrices: `mx.quantized_matmul`, `mx.qqmm`, `mx.quantize`, `mx.dequantize`, fp8.

    Y = X W^T,  W[n, g] = scales[n, g] * Q[n, g] + biases[n, g]     X: (..., M, K)   Q: (..., N, K)

or Y = X W where `transpose` is False; Q is packed into uint32 along its last dimension, and
`group_size` entries share a scale. The modes "mxfp4", "mxfp8" and "nvfp4" have floating-point
entries, scales of one byte and no biases (OCP Microscaling Formats 1.0).

Source: mlx/ops.cpp (shapes, dtypes, the fallbacks of quantize and dequantize), mlx/primitives.cpp
(`QuantizedMatmul::vjp`, `QQMatmul::vjp`), mlx/backend/cuda/quantized/quantized.cpp (what kernels
take: the last two dimensions of Q, scales and biases contiguous, their batch contiguous or shared).

One call of the kernel for all samples:

* quantized_matmul, X mapped and W not: samples are further rows, W is read as it is, never copied
  and never dequantized; the same for the gradient with respect to X, which is the same operation
  with `transpose` flipped, and for tangents.
* W mapped and X not, `transpose` True, W of two dimensions: samples are further rows of W.
* both mapped: samples are the batch. A part of W that is not mapped where another part is (packed
  entries shared, scales per sample) is copied for each sample: kernels want one layout for all.
* quantize, dequantize: samples are further leading dimensions; to_fp8, from_fp8: by element.
* qqmm, X mapped: further rows; W mapped alone: further rows of W. The rest (both mapped, or a
  global scale: the kernel takes one matrix and one scale) is a loop over samples of fused calls.

Gradients with respect to scales and biases contract the gradient of W, which is formed as MLX forms
it, for each sample. The decomposition, which dequantizes W, is evaluated only if an argument is a
tracer of `grad` or `mx.compile` but nothing is mapped after all.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from ..core import levels, native
from ..core.interception import intercept, original
from ..core.primitive import Arrays, Axes, Primitive
from ._mlx_0_31 import matmul
from ._tracers import is_tracer

#: (group size, bits) where the caller gives none: mlx/ops.cpp, quantization_params_from_mode.
DEFAULTS = {"affine": (64, 4), "mxfp4": (32, 4), "mxfp8": (32, 8), "nvfp4": (16, 4)}


def may_be_mapped(result: mx.array) -> bool:
    """Whether the call that MLX answered with `result` can depend on a mapped argument."""
    return "vmap" in levels.active() and is_tracer(result)


def parameters(mode: str, group_size: int | None, bits: int | None) -> dict[str, Any]:
    size, width = DEFAULTS[mode]
    return {"group_size": group_size or size, "bits": bits or width, "mode": mode}


def on_stream(stream: Any, fun: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if stream is None:
        return fun(*args, **kwargs)
    with mx.stream(stream):
        return fun(*args, **kwargs)


# Shapes ----------------------------------------------------------------------------------------


def front(x: mx.array, axis: int | None, size: int) -> mx.array:
    """`x` with its mapped axis first; an unmapped one as a view that repeats it."""
    if axis is None:
        return mx.broadcast_to(mx.expand_dims(x, 0), (size, *x.shape))
    return x if axis == 0 else mx.moveaxis(x, axis, 0)


def pad_dims(x: mx.array, ndim: int, keep: int = 1) -> mx.array:
    """`x` with dimensions of one after its first `keep`, up to `ndim` in all."""
    missing = ndim - x.ndim
    return mx.expand_dims(x, tuple(range(keep, keep + missing))) if missing > 0 else x


def sum_to(x: mx.array, shape: Sequence[int]) -> mx.array:
    """The transpose of broadcasting an array of that shape."""
    extra = x.ndim - len(shape)
    axes = [*range(extra)]
    axes += [extra + i for i, n in enumerate(shape) if n == 1 and x.shape[extra + i] != 1]
    return mx.reshape(mx.sum(x, axis=axes), shape) if axes else x


def broadcast_shape(*shapes: tuple[int, ...]) -> tuple[int, ...]:
    """What shapes that fit each other broadcast to."""
    ndim = max(len(s) for s in shapes)
    padded = [(1,) * (ndim - len(s)) + tuple(s) for s in shapes]
    return tuple(next((n for n in sizes if n != 1), 1) for sizes in zip(*padded))


def sample_ndim(x: mx.array, axis: int | None) -> int:
    return x.ndim - (axis is not None)


def loop_batch(
    bind: Callable[..., list[mx.array]], size: int, arrays: Arrays, axes: Axes, **static: Any
) -> tuple[list[mx.array], list[int]]:
    """The batching rule of an operation without a batch dimension: a call for each sample."""
    samples = [
        bind(*(x if a is None else mx.take(x, i, a) for x, a in zip(arrays, axes)), **static)
        for i in range(size)
    ]
    outputs = [mx.stack(list(column)) for column in zip(*samples)]
    return outputs, [0] * len(outputs)


# quantized_matmul ------------------------------------------------------------------------------


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
    # MLX's own call checks the arguments; where nothing is traced it is the answer.
    out = original(mx, "quantized_matmul")(
        x, w, scales, biases, transpose, group_size, bits, mode, stream=stream
    )
    weight = [w, scales] if biases is None else [w, scales, biases]
    # MLX reads the first matrix only of several that meet fewer dimensions of x: not ours to serve.
    plain = all(p.ndim == w.ndim for p in weight) and (w.ndim == 2 or x.ndim > 2)
    if not plain or not may_be_mapped(out):
        return out
    if mode == "affine":
        x, weight = x.astype(out.dtype), [w, *(p.astype(out.dtype) for p in weight[1:])]
    static = {"transpose": transpose, **parameters(mode, group_size, bits)}
    return on_stream(stream, qmm, x, *weight, **static)[0]


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


def affine_gradients(
    of_w: mx.array, w: mx.array, scales: mx.array, biases: mx.array, **static: Any
) -> list[mx.array]:
    """The gradients of scales and biases, given that of the dequantized matrix."""
    groups = mx.unflatten(of_w, -1, (-1, static["group_size"]))
    levels_ = dequantize_(w, mx.ones_like(scales), mx.zeros_like(biases), dtype=None, **static)[0]
    levels_ = mx.unflatten(levels_, -1, (-1, static["group_size"]))
    return [mx.sum(groups * levels_, axis=-1), mx.sum(groups, axis=-1)]


qmm = Primitive(
    "quantized_matmul",
    decomposition=_qmm_decomposed,
    lowering=_qmm_fused,
    batch=_qmm_batch,
    vjp=_qmm_vjp,
    jvp=_qmm_jvp,
)


# quantize and dequantize -----------------------------------------------------------------------


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
        packed_scales = _to_fp8_decomposed(scales * encode)[0]
        groups = groups / _from_fp8_decomposed(packed_scales, dtype=w.dtype)[0] * encode
    else:
        exponent = mx.log2(scales + (scales == 0).astype(w.dtype))
        exponent = mx.ceil(exponent) if _scales_round_up() else mx.round(exponent)
        groups = groups / mx.power(mx.array(2.0, w.dtype), exponent)
        packed_scales = (exponent.astype(mx.int32) + 127).astype(mx.uint8)
    if bits == 4:
        distance = mx.abs(mx.expand_dims(groups, -1) - _fp4_values(w.dtype))
        codes = mx.argmin(distance, axis=-1)
    else:
        codes = _to_fp8_decomposed(groups)[0]
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
    values = mx.take(_fp4_values(dtype) if bits == 4 else _fp8_values(dtype), codes)
    groups = mx.unflatten(mx.flatten(values, -2, -1), -1, (-1, group_size))
    factors = mx.take(_fp8_values(dtype) if mode == "nvfp4" else _powers(dtype), scales)
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
def _fp8_values(dtype: mx.Dtype) -> mx.array:
    return original(mx, "from_fp8")(mx.array(list(range(256)), mx.uint8), dtype)


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


# qqmm ------------------------------------------------------------------------------------------


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


def requantized(x: mx.array, global_scale: mx.array | None, **static: Any) -> mx.array:
    """`x` rounded to what it is after quantization."""
    scale = [] if global_scale is None else [global_scale]
    return dequantized(*_quantize_decomposed(x, *scale, **static), *scale, dtype=x.dtype, **static)


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


# fp8 -------------------------------------------------------------------------------------------


@intercept(mx, "to_fp8")
def to_fp8(x: mx.array, *, stream: Any = None) -> mx.array:
    out = original(mx, "to_fp8")(x, stream=stream)
    return on_stream(stream, to_fp8_, x)[0] if may_be_mapped(out) else out


@intercept(mx, "from_fp8")
def from_fp8(x: mx.array, dtype: mx.Dtype = mx.bfloat16, *, stream: Any = None) -> mx.array:
    out = original(mx, "from_fp8")(x, dtype, stream=stream)
    return on_stream(stream, from_fp8_, x, dtype=dtype)[0] if may_be_mapped(out) else out


def _to_fp8_decomposed(x: mx.array) -> list[mx.array]:
    """Round to nearest even, saturate: the bits of mlx/backend/cpu/simd and of metal/fp8.h."""
    bits = mx.view(x.astype(mx.float32), mx.uint32)
    sign = bits & mx.array(0x80000000, mx.uint32)
    bits = bits ^ sign
    # Below the smallest normal number an addition of floats does the rounding.
    denormal = mx.array(141 << 23, mx.uint32)
    small = mx.view(mx.view(bits, mx.float32) + mx.view(denormal, mx.float32), mx.uint32) - denormal
    odd = mx.right_shift(bits, mx.array(20, mx.uint32)) & mx.array(1, mx.uint32)
    normal = bits + mx.array(((7 - 127) << 23) % 2**32 + 0x7FFFF, mx.uint32) + odd
    normal = mx.right_shift(normal, mx.array(20, mx.uint32))
    code = mx.where(bits < mx.array(121 << 23, mx.uint32), small, normal)
    code = mx.where(bits >= mx.array(543 << 21, mx.uint32), mx.array(0x7E, mx.uint32), code)
    return [(code | mx.right_shift(sign, mx.array(24, mx.uint32))).astype(mx.uint8)]


def _from_fp8_decomposed(x: mx.array, *, dtype: mx.Dtype) -> list[mx.array]:
    return [mx.take(_fp8_values(dtype), x)]


def _to_fp8_batch(size: int, arrays: Arrays, axes: Axes) -> Any:
    return to_fp8_(*arrays), list(axes)


def _from_fp8_batch(size: int, arrays: Arrays, axes: Axes, **static: Any) -> Any:
    return from_fp8_(*arrays, **static), list(axes)


to_fp8_ = Primitive(
    "to_fp8",
    decomposition=_to_fp8_decomposed,
    lowering=lambda x: [original(mx, "to_fp8")(x)],
    batch=_to_fp8_batch,
)
from_fp8_ = Primitive(
    "from_fp8",
    decomposition=_from_fp8_decomposed,
    lowering=lambda x, dtype: [original(mx, "from_fp8")(x, dtype)],
    batch=_from_fp8_batch,
)
