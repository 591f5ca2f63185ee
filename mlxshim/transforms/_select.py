"""Selection by a scalar, whose derivatives are selections too.

    select(go, x, y)   x where go, else y            cotangents: keep(go, c), keep(not go, c)
    keep(go, x)        x where go, else zero         cotangent:  keep(go, c)
    gate(go, x)        x                             cotangent:  keep(go, c)

The gradient of MLX's `where` is a product with the condition: the NaN or infinity of whatever was
not selected comes through it, and on 0.31 its jvp crashes (mlx/primitives.cpp, `Select`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from ..core.opaque import in_front
from ..core.primitive import Arrays, Node, full, mapped_size


def select(go: mx.array, x: mx.array, y: mx.array) -> mx.array:
    # No cotangent goes the way of the choice: integers on it would hand on one of another dtype.
    return _select(mx.stop_gradient(go), x, y)


def gate(go: mx.array, x: mx.array) -> mx.array:
    """`x`, which takes no cotangent where not `go`: that of what is not used may be NaN."""
    return _gate(mx.stop_gradient(go), x) if mx.issubdtype(x.dtype, mx.inexact) else x


def _where(go: mx.array, x: mx.array, y: mx.array) -> mx.array:
    # The value of a node is on the tape itself: it takes no part in derivatives.
    go = mx.reshape(go, (*go.shape, *(1,) * (x.ndim - go.ndim)))
    return mx.where(go, mx.stop_gradient(x), mx.stop_gradient(y))


_select: Any = Node(_where)
_keep: Any = Node(lambda go, x: _where(go, x, mx.zeros((), x.dtype)))
_gate: Any = Node(lambda go, x: x)


def _select_vjp(primals: Arrays, cotangent: mx.array, _: Any) -> Any:
    go = primals[0]
    back = _keep(go, cotangent), _keep(mx.logical_not(go), cotangent)
    return mx.zeros_like(go), *back


def _keep_vjp(primals: Arrays, cotangent: mx.array, _: Any) -> Any:
    return mx.zeros_like(primals[0]), _keep(primals[0], cotangent)


def _define(node: Any, vjp: Any) -> None:
    def jvp(primals: Arrays, tangents: Sequence[mx.array | None]) -> mx.array:
        return node(primals[0], *full(primals[1:], tangents[1:]))

    def vmap(arrays: Arrays, axes: Sequence[int | None]) -> Any:
        # `go` speaks for the leading axes: all are mapped over the first.
        return node(*in_front(mapped_size(arrays, axes), arrays, axes)), 0

    node.vjp(vjp)
    node.jvp(jvp)
    node.vmap(vmap)


_define(_select, _select_vjp)
_define(_keep, _keep_vjp)
_define(_gate, _keep_vjp)
