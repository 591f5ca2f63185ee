"""Partitions whose derivative is of the order that they come in.

The pullback of `mx.partition`, and of `mx.topk`, which is made of it, asks `argpartition` for the
order. On the CPU MLX partitions rows that share memory, as those of an array that was broadcast to
a batch, in place one after another: each time in another order than `argpartition` finds. In a
transform each row has memory of its own.

Source: mlx/backend/cpu/sort.cpp, `Partition::eval_cpu`; mlx/primitives.cpp, `Partition::vjp`.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from ..core import levels
from ..core.interception import intercept, original


def _with_rows_of_its_own(name: str) -> None:
    @intercept(mx, name)
    def call(a: mx.array, /, *args: Any, stream: Any = None, **kwargs: Any) -> mx.array:
        if levels.active():
            a = mx.contiguous(a, stream=stream)
        return original(mx, name)(a, *args, stream=stream, **kwargs)


for _name in ("partition", "topk"):
    _with_rows_of_its_own(_name)
