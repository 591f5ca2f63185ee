"""`mx.fast.rope` in operations that are intercepted one by one, for MLX before 0.32.4.

There the forward derivative of its gradient goes through slices whose own is wrong, or brings the
process down (`SliceUpdate::jvp`): those that Python sees are repaired, those inside rope are not.

Delete this file, and what imports it, when 0.32.4 is the oldest version served.

Source: mlx/fast.cpp, `rope`.
"""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx


def turned(
    x: mx.array,
    offset: Any,
    freqs: mx.array | None,
    *,
    dims: int,
    traditional: bool,
    base: float | None,
    scale: float,
) -> mx.array:
    """`mx.fast.rope` of an `x` of shape (batch, ..., length, features)."""
    half = dims // 2
    if isinstance(offset, mx.array) and offset.size > 1:
        offset = mx.reshape(offset, (-1, *(1,) * (x.ndim - 2)))
    positions = (mx.arange(x.shape[-2], dtype=mx.float32) + offset) * scale
    if freqs is not None:
        inverse = 1 / freqs.astype(mx.float32)
    else:
        assert base is not None
        inverse = mx.exp(mx.arange(0, -half, -1, dtype=mx.float32) * (math.log(base) / half))
    angles = mx.expand_dims(positions, -1) * inverse
    cos, sin = mx.cos(angles).astype(x.dtype), mx.sin(angles).astype(x.dtype)
    rest = [x[..., dims:]] if dims < x.shape[-1] else []
    if traditional:
        pairs = mx.unflatten(x[..., :dims], -1, (half, 2))
        first, second = pairs[..., 0], pairs[..., 1]
        both = mx.stack([first * cos - second * sin, first * sin + second * cos], axis=-1)
        return mx.concatenate([mx.flatten(both, -2, -1), *rest], axis=-1)
    first, second = x[..., :half], x[..., half:dims]
    both = [first * cos - second * sin, first * sin + second * cos]
    return mx.concatenate([*both, *rest], axis=-1)
