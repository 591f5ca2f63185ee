"""Rows times one matrix: `x @ w` with `x` of three dimensions or more and `w` of two.

    y = x w         x: (..., L, K)    w: (K, M)         dx = c w^T     dw = rows of x, ^T, rows of c

MLX flattens `x` into rows before the product, and the batching rules flatten the rows of all
samples once more: four views around a product where a batch written by hand has two, and as many
around each of its gradients. As a primitive it is flattened once, samples and all. A primitive
costs more to trace than two views to evaluate: it is one only where the graph is kept.

Source: mlx/ops.cpp, `matmul`; mlx/primitives.cpp, `Matmul::vmap`.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from ..core import levels, native
from ..core.interception import intercept, original
from ..core.primitive import Arrays, Axes, Primitive
from ..core.tracers import is_marked
from ..core.versions import MLX
from ._devices import within
from ._dtypes import HALVES
from ._folding import front


def _serves(a: Any, b: Any) -> bool:
    return (
        isinstance(b, mx.array)
        and b.ndim == 2
        and isinstance(a, mx.array)
        and a.ndim > 2
        and a.shape[-1] == b.shape[0]
        and a.dtype == b.dtype
        and (a.dtype == mx.float32 or a.dtype in HALVES)
        and _is_first_order()
    )


def _is_first_order() -> bool:
    stack = levels.active()
    return "jvp" not in stack and stack.count("grad") < 2


def _product(a: mx.array, b: mx.array) -> list[mx.array]:
    return [original(mx, "matmul")(a, b)]


def _bound(a: mx.array, b: mx.array) -> mx.array:
    """A node that nothing maps is left in the graph, which MLX could not export then."""
    out = original(mx, "matmul")(a, b)
    return rows(a, b)[0] if is_marked(out) else out


def _batch(size: int, arrays: Arrays, axes: Axes) -> tuple[list[mx.array], list[int]]:
    a, b = arrays
    if axes[1] is None:
        return rows(front(a, axes[0], size), b), [0]
    # A matrix for each sample is a batch of products, in MLX's rule too.
    return [native.vmap(original(mx, "matmul"), in_axes=tuple(axes))(a, b)], [0]


def _vjp(primals: Arrays, cotangents: Arrays, outputs: Arrays) -> list[mx.array]:
    a, b = primals
    c = cotangents[0]
    da = _bound(c, mx.transpose(b))
    if a.ndim == 3 and a.shape[0] == 1:
        return [da, mx.squeeze(mx.matmul(mx.swapaxes(a, 1, 2), c), 0)]
    return [da, mx.matmul(mx.transpose(mx.flatten(a, 0, -2)), mx.flatten(c, 0, -2))]


rows = Primitive("rows", decomposition=_product, lowering=_product, batch=_batch, vjp=_vjp)

if MLX >= (0, 32, 0):  # before, transforms of what a rule ends in are not all right

    @intercept(mx, "matmul")
    def matmul(a: mx.array, b: mx.array, /, *, stream: Any = None) -> mx.array:
        if not levels.is_kept() or not _serves(a, b):
            return original(mx, "matmul")(a, b, stream=stream)
        with within(stream):
            return _bound(a, b)

    @intercept(mx.array, "__matmul__")
    def __matmul__(a: mx.array, b: mx.array) -> mx.array:
        if not levels.is_kept() or not _serves(a, b):
            return original(mx.array, "__matmul__")(a, b)
        return _bound(a, b)
