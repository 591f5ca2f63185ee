"""Floating-point numbers of one byte: `mx.to_fp8`, `mx.from_fp8` (e4m3). Samples are by element.

Source: mlx/fp8 of the backends, mlx/backend/cpu/simd and mlx/backend/metal/kernels/fp8.h.
"""

from __future__ import annotations

import functools
from typing import Any

import mlx.core as mx

from ..core.interception import intercept, original
from ..core.primitive import Arrays, Axes, Primitive
from ._folding import may_be_mapped, on_stream


@intercept(mx, "to_fp8")
def to_fp8(x: mx.array, *, stream: Any = None) -> mx.array:
    out = original(mx, "to_fp8")(x, stream=stream)
    return on_stream(stream, to_fp8_, x)[0] if may_be_mapped(out) else out


@intercept(mx, "from_fp8")
def from_fp8(x: mx.array, dtype: mx.Dtype = mx.bfloat16, *, stream: Any = None) -> mx.array:
    out = original(mx, "from_fp8")(x, dtype, stream=stream)
    return on_stream(stream, from_fp8_, x, dtype=dtype)[0] if may_be_mapped(out) else out


def rounded_to_fp8(x: mx.array) -> list[mx.array]:
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


@functools.lru_cache(maxsize=8)
def fp8_values(dtype: mx.Dtype) -> mx.array:
    return original(mx, "from_fp8")(mx.array(list(range(256)), mx.uint8), dtype)


def read_as_fp8(x: mx.array, *, dtype: mx.Dtype) -> list[mx.array]:
    return [mx.take(fp8_values(dtype), x)]


def _to_fp8_batch(size: int, arrays: Arrays, axes: Axes) -> Any:
    return to_fp8_(*arrays), list(axes)


def _from_fp8_batch(size: int, arrays: Arrays, axes: Axes, **static: Any) -> Any:
    return from_fp8_(*arrays, **static), list(axes)


to_fp8_ = Primitive(
    "to_fp8",
    decomposition=rounded_to_fp8,
    lowering=lambda x: [original(mx, "to_fp8")(x)],
    batch=_to_fp8_batch,
)
from_fp8_ = Primitive(
    "from_fp8",
    decomposition=read_as_fp8,
    lowering=lambda x, dtype: [original(mx, "from_fp8")(x, dtype)],
    batch=_from_fp8_batch,
)
