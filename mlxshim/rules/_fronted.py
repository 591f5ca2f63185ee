"""Moving a mapped axis to the front where MLX's rules need it there."""

from __future__ import annotations

import mlx.core as mx

from ..core import levels


def fronted(x: mx.array) -> mx.array:
    """`x`, whose mapped axis, and that of its cotangent, are moved to the front by a reshape."""
    if x.ndim == 0 or "vmap" not in levels.active():
        return x
    return mx.squeeze(mx.reshape(x, (1, *x.shape)), 0)
