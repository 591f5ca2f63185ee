"""Rotary position embedding: `mx.fast.rope`.

    y = R(theta) x      theta = (t + offset) scale / freqs,  t the place along the axis of length T

x: (B, ..., T, D), offset an int, a scalar or (B,), freqs (dims / 2,). Pairs of entries are rotated
by the angles theta; entries after `dims` stay. The rotation is linear in x and its transpose turns
the other way: the cotangent goes through the same operation with -scale, so that this primitive is
closed under differentiation. MLX decomposes it under vmap; here the samples are further rows of one
fused call, and a mapped offset is the offset per row that the operation takes.

Source: mlx/fast.cpp; Su et al., "RoFormer", 2021.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import mlx.core as mx

from ..core import levels
from ..core.interception import intercept, original
from ..core.primitive import Arrays, Axes, Primitive
from ._constants import constant
from ._devices import fuses as _fuses


@intercept(mx.fast, "rope")
def rope(
    x: mx.array,
    dims: int,
    *,
    traditional: bool,
    base: float | None,
    scale: float,
    offset: Any,
    freqs: mx.array | None = None,
    stream: Any = None,
) -> mx.array:
    if not _fuses(levels.active(), stream) or not _fits(x, dims, base, offset, freqs):
        return original(mx.fast, "rope")(
            x,
            dims,
            traditional=traditional,
            base=base,
            scale=scale,
            offset=offset,
            freqs=freqs,
            stream=stream,
        )
    arrays = [x, offset if isinstance(offset, mx.array) else constant(offset, mx.int32)]
    if freqs is not None:
        arrays.append(freqs.astype(mx.float32))
    static = {"dims": dims, "traditional": bool(traditional), "base": base, "scale": scale}
    if stream is not None:
        with mx.stream(stream):
            return rotation(*arrays, **static)[0]
    return rotation(*arrays, **static)[0]


def _fits(x: Any, dims: Any, base: Any, offset: Any, freqs: Any) -> bool:
    """What does not fit is for MLX to refuse."""
    if not isinstance(x, mx.array) or x.ndim < 3 or not mx.issubdtype(x.dtype, mx.floating):
        return False
    if isinstance(offset, mx.array):
        if offset.ndim > 1 or offset.size not in (1, x.shape[0]):
            return False
        if not mx.issubdtype(offset.dtype, mx.integer):
            return False
    elif not isinstance(offset, int):
        return False
    if not isinstance(dims, int) or not 0 < dims <= x.shape[-1] or dims % 2:
        return False
    if freqs is None:
        return base is not None
    return base is None and isinstance(freqs, mx.array) and freqs.shape == (dims // 2,)


# The decomposition and the lowering ------------------------------------------------------------


def _decompose(
    x: mx.array,
    offset: mx.array,
    *freqs: mx.array,
    dims: int,
    traditional: bool,
    base: float | None,
    scale: float,
) -> list[mx.array]:
    half, length = dims // 2, x.shape[-2]
    if offset.size > 1:
        offset = mx.reshape(offset, (-1, *(1,) * (x.ndim - 1)))
    elif offset.ndim:
        offset = mx.reshape(offset, ())
    places = mx.reshape(mx.arange(length, dtype=mx.float32), (length, 1))
    if freqs:
        inverse = mx.reciprocal(freqs[0])
    else:
        assert base is not None
        inverse = mx.exp(mx.arange(0, -half, -1, dtype=mx.float32) * (math.log(base) / half))
    theta = (places + offset) * scale * inverse
    cos, sin = mx.cos(theta).astype(x.dtype), mx.sin(theta).astype(x.dtype)
    if traditional:
        a, b = x[..., :dims:2], x[..., 1:dims:2]
    else:
        a, b = x[..., :half], x[..., half:dims]
    turned = [a * cos - b * sin, a * sin + b * cos]
    if traditional:
        out = mx.flatten(mx.stack(turned, axis=-1), -2, -1)
        parts = [out]
    else:
        parts = turned
    if dims < x.shape[-1]:
        parts = [*parts, x[..., dims:]]
    return [mx.concatenate(parts, axis=-1) if len(parts) > 1 else parts[0]]


def _lowering(
    x: mx.array, offset: mx.array, *freqs: mx.array, dims: int, **static: Any
) -> list[mx.array]:
    given = freqs[0] if freqs else None
    return [original(mx.fast, "rope")(x, dims, offset=offset, freqs=given, **static)]


# The rules -------------------------------------------------------------------------------------


def _batch(
    size: int, arrays: Arrays, axes: Axes, **static: Any
) -> tuple[list[mx.array], list[int]]:
    (x, offset, *freqs), (axis, offset_axis, *freqs_axes) = arrays, axes
    if freqs and freqs_axes[0] is not None:  # no kernel takes frequencies for each row
        mapped: Any = mx.vmap(functools.partial(_decompose, **static), in_axes=tuple(axes))
        return mapped(*arrays), [0]
    if offset_axis is None and offset.size == 1:
        assert axis is not None
        if axis >= x.ndim - 2:
            x, axis = mx.moveaxis(x, axis, 0), 0
        return rotation(x, mx.reshape(offset, ()), *freqs, **static), [axis]
    # An offset for every row: (N * B,)
    x = mx.broadcast_to(x, (size, *x.shape)) if axis is None else mx.moveaxis(x, axis, 0)
    offsets = offset[None] if offset_axis is None else mx.moveaxis(offset, offset_axis, 0)
    offsets = mx.broadcast_to(mx.reshape(offsets, (offsets.shape[0], -1)), x.shape[:2])
    out = rotation(mx.flatten(x, 0, 1), mx.flatten(offsets), *freqs, **static)[0]
    return [mx.unflatten(out, 0, x.shape[:2])], [0]


def _vjp(
    primals: Arrays, cotangents: Arrays, outputs: Arrays, *, scale: float, **static: Any
) -> list[mx.array]:
    x, offset, *freqs = primals
    ct = cotangents[0]
    grads = [rotation(ct, offset, *freqs, scale=-scale, **static)[0], mx.zeros_like(offset)]
    if freqs:
        grads += mx.vjp(lambda f: _decompose(x, offset, f, scale=scale, **static), freqs, [ct])[1]
    return grads


rotation = Primitive("rope", decomposition=_decompose, lowering=_lowering, batch=_batch, vjp=_vjp)
