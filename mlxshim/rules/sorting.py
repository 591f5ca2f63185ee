"""Sorting, repaired for MLX before 0.32.4: `mx.sort`, `mx.argsort`.

MLX's batching rule keeps a negative axis, which then counts from the end of an array that has one
axis more: where the mapped axis is behind it, the wrong axis is sorted. Here it counts from the
front before MLX sees it.

Source: mlx/primitives.cpp, `Sort::vmap`, `ArgSort::vmap`. Delete when 0.32.4 is the oldest served.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from ..core import levels
from ..core.interception import intercept, original


def _from_the_front(name: str) -> None:
    @intercept(mx, name)
    def sort(a: mx.array, /, axis: int | None = -1, *, stream: Any = None) -> mx.array:
        if axis is not None and -a.ndim <= axis < 0 and "vmap" in levels.active():
            axis += a.ndim
        return original(mx, name)(a, axis, stream=stream)


for _name in ("sort", "argsort"):
    _from_the_front(_name)
