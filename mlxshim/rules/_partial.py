"""Derivatives of a function with respect to some of its arguments."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx

from ..core import native
from ..core.primitive import Arrays

Function = Callable[..., "list[mx.array]"]


def not_boolean(arrays: Arrays) -> list[int]:
    """The places of the arguments that have a derivative."""
    return [i for i, x in enumerate(arrays) if x.dtype != mx.bool_]


def vjp_at(
    fun: Function, arrays: Arrays, places: Sequence[int], cotangents: Arrays
) -> list[mx.array]:
    """The gradients of `fun` with respect to its arguments at `places`."""
    some = [arrays[i] for i in places]
    return native.vjp(_at(fun, arrays, places), some, list(cotangents))[1]


def jvp_at(
    fun: Function, arrays: Arrays, places: Sequence[int], tangents: Arrays
) -> list[mx.array]:
    """The tangents of `fun`, those of its arguments at `places` given among those of all."""
    some = [arrays[i] for i in places]
    return native.jvp(_at(fun, arrays, places), some, [tangents[i] for i in places])[1]


def _at(fun: Function, arrays: Arrays, places: Sequence[int]) -> Function:
    def of_some(*some: mx.array) -> list[mx.array]:
        full = list(arrays)
        for i, x in zip(places, some):
            full[i] = x
        return fun(*full)

    return of_some
