"""MLX's own transforms, for mlxshim itself.

`mx.grad` and its kind stand for mlxshim's inside `patched()`; these never do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx

from . import levels

grad, value_and_grad = mx.grad, mx.value_and_grad
_vmap, _vjp, _jvp = mx.vmap, mx.vjp, mx.jvp


def vjp(fun: Any, primals: list[mx.array], cotangents: list[mx.array]) -> Any:
    try:
        return _vjp(fun, primals, cotangents)
    finally:
        levels.unmark()


def jvp(fun: Any, primals: list[mx.array], tangents: list[mx.array]) -> Any:
    try:
        return _jvp(fun, primals, tangents)
    finally:
        levels.unmark()


def vmap(fun: Callable[..., Any], in_axes: Any = 0, out_axes: Any = 0) -> Callable[..., Any]:
    return levels.mapping(_vmap(fun, in_axes, out_axes))
