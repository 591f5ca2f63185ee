"""Slices with a step and one entry, repaired for MLX before 0.32.4.

MLX takes the step of a slice with one entry for 1, and keeps its stop: its batching rule and its
vjp then go from the start to the stop. Under vmap `x[0:2:2]` has two entries and `x[::-1]` of one
entry has none; their gradients are wrong with and without. Here such a slice ends after its entry
before MLX sees it.

Source: mlx/ops.cpp, `normalize_slice`. Delete when 0.32.4 is the oldest served.
"""

from __future__ import annotations

from types import EllipsisType
from typing import Any

import mlx.core as mx

from ..core.versions import MLX

ONE_ENTRY_BUG = MLX < (0, 32, 4)


def plain_steps(x: mx.array, key: Any) -> Any:
    """`key` of `x` with each slice of one entry as a slice of step 1."""
    if type(key) is slice:
        return _of_axis(key, x.shape[0]) if x.ndim else key
    if type(key) is not tuple or not any(type(k) is slice and k.step is not None for k in key):
        return key
    at = next((i for i, k in enumerate(key) if isinstance(k, EllipsisType)), len(key))
    front = _of_axes(key[:at], x.shape)
    return (*front, *key[at : at + 1], *_of_axes(key[at + 1 :][::-1], x.shape[::-1])[::-1])


def _of_axes(key: tuple[Any, ...], sizes: tuple[int, ...]) -> tuple[Any, ...]:
    rest = iter(sizes)
    pairs = [(k, None if k is None else next(rest, None)) for k in key]
    return tuple(
        _of_axis(k, size) if type(k) is slice and size is not None else k for k, size in pairs
    )


def _of_axis(key: slice, size: int) -> slice:
    if key.step in (None, 0, 1) or not all(
        x is None or type(x) is int for x in (key.start, key.stop, key.step)
    ):
        return key
    start, stop, step = key.indices(size)
    return slice(start, start + 1) if len(range(start, stop, step)) == 1 else key
