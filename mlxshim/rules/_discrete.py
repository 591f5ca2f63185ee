"""Indices and truths are constants of every derivative, whatever they were computed from.

MLX leads the cotangent of a gather's indices back to what they came from, and refuses at the first
step: `x[mx.argmax(x)]` has no gradient there (mlx/primitives.cpp, `Gather::vjp`).
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from ..core import levels


def discrete(index: Any) -> Any:
    """An index, or a tuple of some, without a derivative; what is no array as it is."""
    kind = type(index)
    if kind is mx.array:
        return mx.stop_gradient(index) if levels.differentiates() else index
    if kind is tuple and any(type(k) is mx.array for k in index):
        return tuple(map(discrete, index))
    return index


def constant_if_empty(x: mx.array) -> mx.array:
    """What is gathered from, without a derivative if it has no entries.

    On the CPU MLX's scatter, which is the derivative in reverse mode, divides by their number: the
    process dies.
    """
    if x.size:
        return x
    stack = levels.active()
    return x if "jvp" in stack and "grad" not in stack else mx.stop_gradient(x)
