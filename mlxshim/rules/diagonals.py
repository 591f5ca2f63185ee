"""Diagonals, which MLX gathers: the mapped axis of a cotangent must come first.

    diag(x)    diagonal(x)    trace(x) = sum(diagonal(x))

That of a trace is copied from one number: MLX's scatter reads past the end of it.

Source: mlx/ops.cpp, `diagonal` and `trace`; mlx/primitives.cpp, `Scatter::vmap`.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from ..core import levels
from ..core.fronted import fronted
from ..core.interception import intercept, original
from ._discrete import constant_if_empty


def _diagonal(owner: Any) -> None:
    @intercept(owner, "diagonal")
    def diagonal(a: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        return fronted(original(owner, "diagonal")(constant_if_empty(a), *args, **kwargs))

    @intercept(owner, "diag")
    def diag(a: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        out = original(owner, "diag")(constant_if_empty(a), *args, **kwargs)
        return fronted(out) if a.ndim == 2 else out


for _owner in (mx, mx.array):
    _diagonal(_owner)


@intercept(mx, "trace")
def trace(
    a: mx.array,
    /,
    offset: int = 0,
    axis1: int = 0,
    axis2: int = 1,
    dtype: mx.Dtype | None = None,
    *,
    stream: Any = None,
) -> mx.array:
    a = constant_if_empty(a)
    out = original(mx, "trace")(a, offset, axis1, axis2, dtype, stream=stream)
    if "vmap" not in levels.active():
        return out
    entries = fronted(original(mx, "diagonal")(a, offset, axis1, axis2, stream=stream))
    return mx.sum(entries.astype(out.dtype), axis=-1, stream=stream).astype(out.dtype)
