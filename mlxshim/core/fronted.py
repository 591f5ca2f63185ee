"""Moving a mapped axis to the front where MLX's rules need it there."""

from __future__ import annotations

from typing import TypeVar

import mlx.core as mx

from . import levels, trees

T = TypeVar("T")


def fronted(x: mx.array) -> mx.array:
    """`x`, whose mapped axis, and that of its cotangent, are moved to the front by a reshape."""
    if x.ndim == 0 or "vmap" not in levels.active():
        return x
    return mx.squeeze(mx.reshape(x, (1, *x.shape)), 0)


def fronted_gradients(gradients: T) -> T:
    """A tree of gradients, whose cotangents under one more `grad` are mapped over the first axis.

    The pullback of a broadcast squeezes axes, that of a squeeze expands them, and MLX's batching
    rule of several new axes is wrong unless the mapped one is the first (rules/axes.py). No
    interception sees these, for C++ makes them.
    """
    stack = levels.active()
    if not ("grad" in stack and "vmap" in stack):
        return gradients
    return trees.map_leaves(lambda x: fronted(x) if isinstance(x, mx.array) else x, gradients)
