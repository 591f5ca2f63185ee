"""Losses that MLX fuses: `mx.fast.cross_entropy` (MLX 0.32.3 and later).

    loss = logsumexp(logits) - logits[target]        logits: (..., V)    targets and loss: (...)

with the gradient c * (softmax(logits) - onehot(target)). Every row stands for itself, so samples
are further rows. Logits that all samples share are reduced once, by MLX's own vmap.

MLX's own transforms are right, but decomposed. On the CPU there is nothing else to reach.

Source: ml-explore/mlx#3947.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from ..core import levels, native
from ..core.interception import intercept, original
from ..core.primitive import Arrays, Axes, Primitive
from . import _devices


def _cross_entropy(logits: mx.array, targets: mx.array, *, stream: Any = None) -> mx.array:
    if "vmap" not in levels.active() or not _devices.gpu():
        return original(mx.fast, "cross_entropy")(logits, targets, stream=stream)
    if stream is None:
        return cross_entropy(logits, targets)[0]
    with mx.stream(stream):
        return cross_entropy(logits, targets)[0]


if hasattr(mx.fast, "cross_entropy"):
    intercept(mx.fast, "cross_entropy")(_cross_entropy)


def _fused(logits: mx.array, targets: mx.array) -> list[mx.array]:
    # MLX refuses even a zero tangent of an index.
    return [original(mx.fast, "cross_entropy")(logits, mx.stop_gradient(targets))]


def _fused_vjp(logits: mx.array, targets: mx.array, cotangent: mx.array) -> list[mx.array]:
    # One of a sum or a mean has stride zero.
    cotangent = mx.contiguous(cotangent)
    return native.vjp(lambda x: _fused(x, targets), [logits], [cotangent])[1]


def _batch(size: int, arrays: Arrays, axes: Axes) -> tuple[list[mx.array], list[int]]:
    if axes[0] is None:
        return native.vmap(_fused, in_axes=tuple(axes))(*arrays), [0]
    return cross_entropy(*_fronts(size, arrays, axes)), [0]


def _batch_vjp(size: int, arrays: Arrays, axes: Axes) -> tuple[list[mx.array], list[int]]:
    return cross_entropy_vjp(*_fronts(size, arrays, axes)), [0]


def _fronts(size: int, arrays: Arrays, axes: Axes) -> list[mx.array]:
    """Every array with the mapped axis first; an unmapped one once for each sample."""
    return [
        mx.contiguous(mx.broadcast_to(x, (size, *x.shape)))
        if axis is None
        else mx.moveaxis(x, axis, 0)
        for x, axis in zip(arrays, axes)
    ]


def _vjp(primals: Arrays, cotangents: Arrays, outputs: Arrays) -> list[mx.array]:
    logits, targets = primals
    return [*cross_entropy_vjp(logits, targets, cotangents[0]), mx.zeros_like(targets)]


# As of the norms, the value in a trace is MLX's own node.
cross_entropy = Primitive(
    "cross_entropy", decomposition=_fused, lowering=_fused, batch=_batch, vjp=_vjp
)
cross_entropy_vjp = Primitive(
    "cross_entropy_vjp", decomposition=_fused_vjp, lowering=_fused_vjp, batch=_batch_vjp
)
