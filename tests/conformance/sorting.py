"""Sorting, partitioning, searching. Values are distinct where the order would not be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx

from .case import case, integers, normal

X = normal(3, 4, 5)
HALF = (mx.float32, mx.bfloat16)
FEW = ("vmap", "vmap(vmap)")


def ascending(*shape: int, high: int = 0) -> Callable[[], mx.array]:
    if high:
        return lambda: mx.sort(mx.random.randint(0, high, shape), axis=-1)
    return lambda: mx.sort(mx.random.normal(shape), axis=-1)


case("sort", lambda x: mx.sort(x, axis=1), X)
case("sort/last", mx.sort, X)
case("sort/flat", lambda x: mx.sort(x, axis=None), normal(3, 4))
case("sort/first", lambda x: mx.sort(x, axis=0), X)
case("sort/integers", lambda x: mx.sort(x, axis=-2), integers(4, 5, high=9))
case("sort/of a product", lambda x, w: mx.sort(x * w, axis=-1), normal(3, 4), normal(4))
case("argsort", lambda x: mx.argsort(x, axis=1), X, modes=FEW)
case("argsort/last", mx.argsort, X, modes=FEW)
case("argsort/flat", lambda x: mx.argsort(x, axis=None), normal(3, 4), modes=FEW)
case("argsort/gathered", lambda x: mx.take_along_axis(x, mx.argsort(-x, axis=0), axis=0), X)


def _parts(x: mx.array, kth: int, axis: int) -> list[mx.array]:
    """What is certain of a partition: the element itself, and the sums on either side of it."""
    n = x.shape[axis]
    low, middle, high = mx.split(x, [kth % n, kth % n + 1], axis=axis)
    return [mx.sum(low, axis=axis), middle, mx.sum(high, axis=axis)]


case("partition", lambda x: _parts(mx.partition(x, 2, axis=1), 2, 1), X)
case("partition/last", lambda x: _parts(mx.partition(x, -2), -2, -1), normal(3, 5))
case("partition/flat", lambda x: _parts(mx.partition(x, 4, axis=None), 4, 0), normal(3, 4))


def _argpartition(x: mx.array, kth: int, axis: Any) -> list[mx.array]:
    order = mx.argpartition(x, kth, axis=axis)
    if axis is None:
        x, axis = mx.flatten(x), 0
    return _parts(mx.take_along_axis(x, order, axis), kth, axis)


case("argpartition", lambda x: _argpartition(x, 2, 1), X)
case("argpartition/last", lambda x: _argpartition(x, -2, -1), normal(3, 5))
case("argpartition/flat", lambda x: _argpartition(x, 4, None), normal(3, 4))
case("topk", lambda x: mx.sort(mx.topk(x, 2, axis=1), axis=1), X)
case("topk/last", lambda x: mx.sort(mx.topk(x, 3)), normal(3, 5), dtypes=HALF)
case("topk/flat", lambda x: mx.sort(mx.topk(x, 4, axis=None)), normal(3, 4))


def _experts(x: mx.array, w: mx.array) -> mx.array:
    """A choice of experts, as models write it."""
    gates = mx.softmax(x @ w, axis=-1)
    chosen = mx.stop_gradient(mx.argpartition(-gates, kth=1, axis=-1)[..., :2])
    scores = mx.take_along_axis(gates, chosen, axis=-1)
    return mx.sort(scores / mx.sum(scores, axis=-1, keepdims=True), axis=-1)


case("argpartition/experts", _experts, normal(3, 4), normal(4, 5))


def _search(**options: Any) -> Callable[..., mx.array]:
    return lambda a, v: mx.searchsorted(a, v, **options)


if hasattr(mx, "searchsorted"):
    case("searchsorted", _search(), ascending(7), normal(2, 3))
    case("searchsorted/right", _search(side="right"), ascending(6, high=4), integers(5))
    case("searchsorted/ties", _search(), ascending(6, high=4), integers(5))
    case("searchsorted/scalar", _search(), ascending(8), normal())
    case("searchsorted/one", _search(side="right"), ascending(1), normal(3))
