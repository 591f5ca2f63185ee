"""The mapped axis of attention, folded into a dimension that the operation already has.

Source: sharing K/V by folding queries into the heads of a group: Ainslie et al., "GQA", 2023.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx

from ..core.primitive import Arrays, Axes
from ._folding import sample_shape

#: The operation, of the folded arrays: outputs of the shape of the queries but for the last axis.
Bind = Callable[..., "list[mx.array]"]


def batch(
    bind: Bind, size: int, arrays: Arrays, axes: Axes, **static: Any
) -> tuple[list[mx.array], list[int]]:
    """The batching rule; K/V that samples share are not copied."""
    if axes[1] is None and axes[2] is None:
        rows = _rows_are_free(arrays, axes, **static)
        share = _share_by_length if rows else _share_by_group
        return share(bind, size, arrays, axes, **static)
    folded, dim = fold_all(size, arrays, axes, static["has_mask"])
    outs = bind(*folded, **static)
    return [unfold(x, dim, size) for x in outs], [dim] * len(outs)


def _sinks_mapped(axes: Axes, has_mask: bool) -> bool:
    return len(axes) > 3 + has_mask and axes[-1] is not None


def _rows_are_free(arrays: Arrays, axes: Axes, causal: bool, has_mask: bool, **_: Any) -> bool:
    """Whether samples can be further query rows: no row's weights depend on where it stands."""
    if (causal and sample_shape(arrays[0], axes[0])[2] > 1) or _sinks_mapped(axes, has_mask):
        return False
    if not has_mask or axes[3] is not None:
        return True
    mask = arrays[3]
    return mask.ndim < 2 or mask.shape[-2] == 1


def _share_by_length(
    bind: Bind,
    size: int,
    arrays: Arrays,
    axes: Axes,
    *,
    causal: bool,
    has_mask: bool,
    **static: Any,
) -> tuple[list[mx.array], list[int]]:
    """One K/V, all samples' queries as rows: (B, H, N * Lq, D)."""
    q, k, v, *rest = arrays
    folded = _queries(fold(q, axes[0], size, 2), axes[0])
    if has_mask and axes[3] is not None:
        mask = _mask_front(rest[0], axes[3])  # (N, b, h, lq, Lk)
        rows = folded.shape[2] // size
        mask = mx.broadcast_to(mask, (*mask.shape[:3], rows, mask.shape[4]))
        rest[0] = mx.flatten(mx.moveaxis(mask, 0, 2), 2, 3)
    # causal here means one row that sees every key.
    outs = bind(folded, k, v, *rest, causal=False, has_mask=has_mask, **static)
    return [unfold(x, 2, size) for x in outs], [2] * len(outs)


def _share_by_group(
    bind: Bind, size: int, arrays: Arrays, axes: Axes, *, has_mask: bool, **static: Any
) -> tuple[list[mx.array], list[int]]:
    """One K/V, samples as further heads of each group: (B, Hkv * N * G, Lq, D)."""
    q, k, v, *rest = arrays
    kv_heads = k.shape[1]

    def regroup(x: mx.array, axis: int) -> mx.array:  # (.., N, H, ..) -> (.., Hkv * N * G, ..)
        x = mx.unflatten(x, axis + 1, (kv_heads, -1))
        return mx.flatten(mx.swapaxes(x, axis, axis + 1), axis, axis + 2)

    queries = regroup(_to(q, axes[0], size, 1), 1)
    queries = _queries(queries, axes[0])
    heads = queries.shape[1] // size
    if has_mask:
        mask = _mask_front(rest[0], axes[3])
        if axes[3] is not None or mask.shape[2] != 1:
            mask = mx.broadcast_to(mask, (size, mask.shape[1], heads, *mask.shape[3:]))
            rest[0] = regroup(mx.moveaxis(mask, 0, 1), 1)
        # else one mask for all heads serves the further ones too
    if len(rest) > has_mask:
        rest[-1] = regroup(_to(rest[-1], axes[-1], size, 0), 0)
    outs = [
        mx.unflatten(x, 1, (kv_heads, size, -1))
        for x in bind(queries, k, v, *rest, has_mask=has_mask, **static)
    ]
    return [mx.flatten(mx.moveaxis(x, 2, 0), 2, 3) for x in outs], [0] * len(outs)


def fold_all(size: int, arrays: Arrays, axes: Axes, has_mask: bool) -> tuple[list[mx.array], int]:
    """(N, B, ...) -> (N * B, ...) for all that has sequences, and 0, the dimension folded into.

    Mapped sinks belong to heads: then (B, N, H, ...) -> (B, N * H, ...), and 1.
    """
    dim = 1 if _sinks_mapped(axes, has_mask) else 0
    folded = [fold(x, axis, size, dim) for x, axis in zip(arrays[:3], axes)]
    folded[0] = _queries(folded[0], axes[0])
    if len(arrays) == 3:
        return folded, dim
    rest = list(arrays[3:])
    if has_mask:
        mask = _mask_front(rest[0], axes[3])
        if axes[3] is None and mask.shape[1 + dim] == 1:
            rest[0] = mask[0]
        else:
            full = list(mask.shape)
            full[0], full[1 + dim] = size, folded[0].shape[dim] // size
            rest[0] = mx.flatten(mx.moveaxis(mx.broadcast_to(mask, full), 0, dim), dim, dim + 1)
    if dim:
        rest[-1] = fold(rest[-1], axes[-1], size, 0)
    return folded + rest, dim


def _mask_front(mask: mx.array, axis: int | None) -> mx.array:
    """The mask as (N or 1, b, h, lq, lk), each of the last four its own size or 1."""
    mask = mx.expand_dims(mask, 0) if axis is None else mx.moveaxis(mask, axis, 0)
    missing = 5 - mask.ndim
    return mx.expand_dims(mask, tuple(range(1, 1 + missing))) if missing else mask


def _to(x: mx.array, axis: int | None, size: int, dim: int) -> mx.array:
    """`x` with its mapped axis at `dim`; an unmapped one is a view, repeated with stride zero."""
    if axis == dim:
        return x
    if axis is None:
        shape = (*x.shape[:dim], size, *x.shape[dim:])
        return mx.broadcast_to(mx.expand_dims(x, dim), shape)
    return mx.moveaxis(x, axis, dim)


def _queries(folded: mx.array, axis: int | None) -> mx.array:
    """Queries that samples share, written out: CUDA's kernel gives its output the layout of q,
    and a stride of zero is one that it cannot give."""
    return mx.contiguous(folded) if axis is None else folded


def fold(x: mx.array, axis: int | None, size: int, dim: int) -> mx.array:
    return (x if axis == dim else _to(x, axis, size, dim)).flatten(dim, dim + 1)


def unfold(x: mx.array, dim: int, size: int) -> mx.array:
    return mx.unflatten(x, dim, (size, -1))
