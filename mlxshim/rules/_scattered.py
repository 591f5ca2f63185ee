"""The derivative of `x.at[i].multiply(u)` at arrays of indices, which MLX has only of slices.

    y[j] = x[j] * product of u[k] over all k with i[k] = j

    cotangent of x:    c.at[i].multiply(u)
    cotangent of u:    c[i] x[i] o,   o[k] the product of the other updates of the same entry

`o` is the product of those that are not zero, divided by the update itself, and zero where another
one is zero. That says nothing of how it changes with a zero, so it has no derivative: one of second
order with respect to the updates is refused.

Source: mlx/primitives.cpp, `Scatter::vjp`. (JAX has this derivative for indices that are unique.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from ..core import custom
from ..core.primitive import Arrays


def multiplied(x: mx.array, key: Any, u: mx.array, value: mx.array) -> mx.array:
    """`x.at[key].multiply(u)`, `u` of the shape of `x[key]`; `value` is what it comes to."""
    parts = key if type(key) is tuple else (key,)
    indices = [k for k in parts if isinstance(k, mx.array)]

    def at(arrays: Sequence[mx.array]) -> Any:
        rest = iter(arrays)
        return tuple(next(rest) if isinstance(k, mx.array) else k for k in parts)

    def pull(primals: Arrays, cotangents: Arrays, outputs: Arrays) -> list[mx.array]:
        (x, u, *indices), (c,) = primals, cotangents
        key = at(indices)
        of_u = c[key] * x[key] * _others(x, key, u)
        return [c.at[key].multiply(u), of_u, *map(mx.zeros_like, indices)]

    def push(primals: Arrays, tangents: Sequence[mx.array | None]) -> list[mx.array]:
        (x, u, *indices), (of_x, of_u, *_) = primals, tangents
        key = at(indices)
        out = mx.zeros_like(x) if of_x is None else of_x.at[key].multiply(u)
        if of_u is not None:
            out = out.at[key].add(x[key] * _others(x, key, u) * of_u)
        return [out]

    return custom.Custom(pull, push).bind([x, u, *indices], [value])[0]


def _others(x: mx.array, key: Any, u: mx.array) -> mx.array:
    zero = u == 0
    rest = mx.where(zero, mx.ones_like(u), u)
    product = mx.ones(x.shape, x.dtype).at[key].multiply(rest)
    zeros = mx.zeros(x.shape, mx.int32).at[key].add(zero.astype(mx.int32))
    others = mx.where(zeros[key] > zero, mx.zeros_like(u), product[key] / rest)
    return custom.refusing([others], _of_second_order)[0]


def _of_second_order() -> Exception:
    return NotImplementedError(
        "[at.multiply] A derivative of second order with respect to what is multiplied at an array "
        "of indices, or divided by, is not defined where two updates of one entry are zero. If no "
        "index comes twice, take y[i] = x[i] * u of a copy y of x."
    )
