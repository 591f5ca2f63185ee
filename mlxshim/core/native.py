"""MLX's own transforms, for mlxshim itself.

`mx.grad` and its kind stand for mlxshim's inside `patched()`; these never do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx

from . import levels

grad, value_and_grad, vjp, jvp = mx.grad, mx.value_and_grad, mx.vjp, mx.jvp
_vmap = mx.vmap


def vmap(fun: Callable[..., Any], in_axes: Any = 0, out_axes: Any = 0) -> Callable[..., Any]:
    return levels.mapping(_vmap(fun, in_axes, out_axes))
