"""Running extrema: `mx.cummax`, `mx.cummin`, whose derivative does not die of what is no number.

MLX sends each cotangent to the entry that equals the extremum so far. Not a number equals nothing:
where none does yet the index is -1, as an unsigned one, and the process dies of it. In a derivative
such entries count as infinite, and what they make of the result is a constant. (MLX 0.31 has no
derivative of these.)

Source: mlx/primitives.cpp, `Scan::vjp`.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from ..core import levels
from ..core.interception import intercept, original
from ._constants import constant


def _running(owner: Any, name: str, least: float) -> None:
    @intercept(owner, name)
    def running(a: mx.array, /, *args: Any, **kwargs: Any) -> mx.array:
        raw = original(owner, name)
        if not levels.differentiates() or not mx.issubdtype(a.dtype, mx.floating):
            return raw(a, *args, **kwargs)
        value = raw(mx.stop_gradient(a), *args, **kwargs)
        number = raw(mx.where(mx.isnan(a), constant(least, a.dtype), a), *args, **kwargs)
        return mx.where(number == value, number, value)


for _owner in (mx, mx.array):
    _running(_owner, "cummax", -float("inf"))
    _running(_owner, "cummin", float("inf"))
