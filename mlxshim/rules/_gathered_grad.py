"""Sums over the products that have one index, the transposes of taking matrices."""

from __future__ import annotations

import mlx.core as mx

from ..core import levels, native
from ..core.interception import original
from ..core.primitive import Arrays, Axes, Primitive
from ._folding import front, pad_dims, sample_ndim
from ._matrices import count_of, offset, stack, widened
from ._mlx_0_31 import matmul

# The gradient with respect to W: sums of X[lhs[i]]^T dY[i] over the i with one rhs[i] -----------


def _grad_fused(
    x: mx.array, cotangent: mx.array, *indices: mx.array, count: int, ordered: bool
) -> list[mx.array]:
    lhs, rhs = indices[0] if len(indices) == 2 else None, indices[-1]
    dtype = x.dtype
    x, cotangent = widened(x, cotangent)
    w = mx.broadcast_to(mx.zeros((), x.dtype), (count, x.shape[-1], cotangent.shape[-1]))
    # The sorted form ends in a segmented product, which has no derivative.
    if levels.active():
        ordered = False
    if ordered:
        x, cotangent, rhs = stack(x), stack(cotangent), mx.flatten(rhs)

    def product(w: mx.array) -> mx.array:
        return original(mx, "gather_mm")(x, w, lhs, rhs, sorted_indices=ordered)

    return [native.vjp(product, [w], [cotangent])[1][0].astype(dtype)]


def _grad_decomposed(
    x: mx.array, cotangent: mx.array, *indices: mx.array, count: int, ordered: bool
) -> list[mx.array]:
    rhs = indices[-1]
    if len(indices) == 2:
        x = mx.take(stack(x), indices[0], axis=0)
    elif x.shape[:-2] != rhs.shape:
        x = mx.broadcast_to(x, (*rhs.shape, *x.shape[-2:]))
    terms = matmul(mx.swapaxes(stack(x), -1, -2), stack(cotangent))
    return _add_at_decomposed(terms, mx.flatten(rhs), count=count)


def _grad_batch(
    size: int, arrays: Arrays, axes: Axes, *, count: int, ordered: bool
) -> tuple[list[mx.array], list[int]]:
    x, cotangent, *indices = arrays
    x_axis, c_axis, *index_axes = axes
    ndim = sample_ndim(cotangent, c_axis) - 2
    x = front(x, x_axis, size)
    if len(indices) == 1:
        x = pad_dims(x, ndim + 3)
    steps = [count_of(x) // size, count][-len(indices) :]
    indices = [offset(i, a, size, ndim, n) for i, a, n in zip(indices, index_axes, steps)]
    cotangent = front(cotangent, c_axis, size)
    out = gather_grad(
        x, cotangent, *(i for i in indices if i is not None), count=size * count, ordered=ordered
    )[0]
    return [mx.unflatten(out, 0, (size, count))], [0]


gather_grad = Primitive(
    "gather_mm_grad", decomposition=_grad_decomposed, lowering=_grad_fused, batch=_grad_batch
)


# Sums of matrices with one index, the transpose of taking matrices ------------------------------


def _add_at_fused(x: mx.array, indices: mx.array, *, count: int) -> list[mx.array]:
    return [mx.zeros((count, *x.shape[-2:]), x.dtype).at[indices].add(x)]


def _add_at_decomposed(x: mx.array, indices: mx.array, *, count: int) -> list[mx.array]:
    # A product with zeros and ones: a scatter has no right vmap before 0.32.
    rows = mx.expand_dims(mx.arange(count, dtype=mx.uint32), -1)
    chosen = (rows == mx.expand_dims(mx.flatten(indices), 0)).astype(x.dtype)
    flat = mx.reshape(x, (-1, x.shape[-2] * x.shape[-1]))
    return [mx.reshape(matmul(chosen, flat), (count, *x.shape[-2:]))]


def _add_at_batch(
    size: int, arrays: Arrays, axes: Axes, *, count: int
) -> tuple[list[mx.array], list[int]]:
    x, indices = front(arrays[0], axes[0], size), arrays[1]
    ndim = x.ndim - 3
    indices = offset(indices, axes[1], size, ndim, count)
    assert indices is not None
    return [mx.unflatten(add_at(x, indices, count=size * count)[0], 0, (size, count))], [0]


add_at = Primitive(
    "add_at", decomposition=_add_at_decomposed, lowering=_add_at_fused, batch=_add_at_batch
)
