"""Floating numbers made integers or truths: where a derivative ends.

    x.astype(mx.int32)    mx.where(x, a, b)    mx.logical_and(x, y), or

MLX gives the result a cotangent of its own dtype, and a sum of truths, which is the cotangent of
one that was broadcast, is an integer: `[astype] Type of cotangents does not match primal output
type`.

Source: mlx/primitives.cpp, `AsType::vjp`; mlx/ops.cpp, `where`, `logical_and`.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from ..core import levels
from ..core.interception import intercept, original
from ..core.versions import MLX
from ._discrete import discrete


@intercept(mx.array, "astype")
def astype(x: mx.array, dtype: mx.Dtype, stream: Any = None) -> mx.array:
    if levels.differentiates() and not mx.issubdtype(dtype, mx.inexact):
        x = mx.stop_gradient(x)
    return original(mx.array, "astype")(x, dtype, stream)


def as_truth(x: Any) -> Any:
    """What MLX is to make a truth of."""
    return discrete(x) if isinstance(x, mx.array) and x.dtype != mx.bool_ else x


def _logical(name: str) -> None:
    @intercept(mx, name)
    def call(a: Any, b: Any, /, *, stream: Any = None) -> mx.array:
        return original(mx, name)(as_truth(a), as_truth(b), stream=stream)


for _name in ("logical_and", "logical_or"):
    _logical(_name)

if MLX >= (0, 32, 0):  # plain_0_31.py has one of its own

    @intercept(mx, "where")
    def where(condition: Any, x: Any, y: Any, /, *, stream: Any = None) -> mx.array:
        return original(mx, "where")(as_truth(condition), x, y, stream=stream)
