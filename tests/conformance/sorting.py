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


def in_order(x: mx.array, axis: int) -> mx.array:
    """What a sort means: old versions differentiate one sample wrongly."""
    order = mx.argsort(mx.stop_gradient(x), axis=axis % x.ndim)
    return mx.take_along_axis(x, mx.stop_gradient(order), axis % x.ndim)


def _sort_case(name: str, axis: int, *shape: int) -> None:
    case(
        name,
        lambda x: mx.sort(x, axis=axis),
        normal(*shape),
        reference=lambda x: in_order(x, axis),
    )


_sort_case("sort", 1, 3, 4, 5)
_sort_case("sort/last", -1, 3, 4, 5)
_sort_case("sort/first", 0, 3, 4, 5)
case(
    "sort/flat",
    lambda x: mx.sort(x, axis=None),
    normal(3, 4),
    reference=lambda x: in_order(mx.flatten(x), 0),
)
case("sort/integers", lambda x: mx.sort(x, axis=-2), integers(4, 5, high=9))
case(
    "sort/of a product",
    lambda x, w: mx.sort(x * w, axis=-1),
    normal(3, 4),
    normal(4),
    reference=lambda x, w: in_order(x * w, -1),
)
case("argsort", lambda x: mx.argsort(x, axis=1), X, modes=FEW)
case("argsort/last", mx.argsort, X, modes=FEW)
case("argsort/flat", lambda x: mx.argsort(x, axis=None), normal(3, 4), modes=FEW)
case("argsort/gathered", lambda x: mx.take_along_axis(x, mx.argsort(-x, axis=0), axis=0), X)


def _late(name: str) -> Callable[..., mx.array]:
    return lambda *args, **kwargs: getattr(mx, name)(*args, **kwargs)


# The very order that MLX leaves the parts in is that of the loop.
for name in ("partition", "argpartition"):
    fun = _late(name)
    case(f"{name}/as it is", lambda x, f=fun: f(x, 2, axis=-2), X, modes=FEW)
    case(f"{name}/as it is, flat", lambda x, f=fun: f(x, 4, axis=None), normal(3, 4), modes=FEW)
case("topk/as it is", lambda x: mx.topk(x, 2, axis=0), X, modes=FEW)


def _parts(x: mx.array, kth: int, axis: int) -> list[mx.array]:
    """What is certain of a partition: the element itself, and the sums on either side of it."""
    n = x.shape[axis]
    low, middle, high = mx.split(x, [kth % n, kth % n + 1], axis=axis)
    return [mx.sum(low, axis=axis), middle, mx.sum(high, axis=axis)]


def _parts_case(name: str, parts: Callable[..., Any], kth: int, axis: int, *shape: int) -> None:
    case(name, parts, normal(*shape), reference=lambda x: _parts(in_order(x, axis), kth, axis))


_parts_case("partition", lambda x: _parts(mx.partition(x, 2, axis=1), 2, 1), 2, 1, 3, 4, 5)
_parts_case("partition/last", lambda x: _parts(mx.partition(x, -2), -2, -1), -2, -1, 3, 5)
case(
    "partition/flat",
    lambda x: _parts(mx.partition(x, 4, axis=None), 4, 0),
    normal(3, 4),
    reference=lambda x: _parts(in_order(mx.flatten(x), 0), 4, 0),
)


def _argpartition(x: mx.array, kth: int, axis: Any) -> list[mx.array]:
    order = mx.argpartition(x, kth, axis=axis)
    if axis is None:
        x, axis = mx.flatten(x), 0
    return _parts(mx.take_along_axis(x, order, axis), kth, axis)


case("argpartition", lambda x: _argpartition(x, 2, 1), X)
case("argpartition/last", lambda x: _argpartition(x, -2, -1), normal(3, 5))
case("argpartition/flat", lambda x: _argpartition(x, 4, None), normal(3, 4))
case(
    "topk",
    lambda x: mx.sort(mx.topk(x, 2, axis=1), axis=1),
    X,
    reference=lambda x: mx.split(in_order(x, 1), [2], axis=1)[1],
)
case(
    "topk/last",
    lambda x: mx.sort(mx.topk(x, 3)),
    normal(3, 5),
    dtypes=HALF,
    reference=lambda x: mx.split(in_order(x, -1), [2], axis=-1)[1],
)
case(
    "topk/flat",
    lambda x: mx.sort(mx.topk(x, 4, axis=None)),
    normal(3, 4),
    reference=lambda x: mx.split(in_order(mx.flatten(x), 0), [8])[1],
)


def _experts(x: mx.array, w: mx.array) -> mx.array:
    """A choice of experts, as models write it."""
    gates = mx.softmax(x @ w, axis=-1)
    chosen = mx.stop_gradient(mx.argpartition(-gates, kth=1, axis=-1)[..., :2])
    scores = mx.take_along_axis(gates, chosen, axis=-1)
    return mx.sort(scores / mx.sum(scores, axis=-1, keepdims=True), axis=-1)


def _two_largest(x: mx.array, w: mx.array) -> mx.array:
    scores = mx.split(in_order(mx.softmax(x @ w, axis=-1), -1), [3], axis=-1)[1]
    return scores / mx.sum(scores, axis=-1, keepdims=True)


case("argpartition/experts", _experts, normal(3, 4), normal(4, 5), reference=_two_largest)


# Medians ----------------------------------------------------------------------------------------


def _middle(x: mx.array, axes: tuple[int, ...], keepdims: bool) -> mx.array:
    stay = [i for i in range(x.ndim) if i not in axes]
    x = mx.reshape(mx.transpose(x, (*stay, *axes)), (*(x.shape[i] for i in stay), -1))
    x, n = in_order(x, -1), x.shape[-1]
    middle = mx.mean(mx.split(x, [(n - 1) // 2, n // 2 + 1], axis=-1)[1], axis=-1)
    for axis in sorted(axes) if keepdims else ():
        middle = mx.expand_dims(middle, axis)
    return middle


def _median_case(name: str, axis: Any, keepdims: bool, *shape: int) -> None:
    several = axis if isinstance(axis, tuple) else (axis,)
    axes = tuple(range(len(shape))) if axis is None else several
    case(
        name,
        lambda x: mx.median(x, axis=axis, keepdims=keepdims),
        normal(*shape),
        reference=lambda x: _middle(x, axes, keepdims),
    )


_median_case("median", 1, False, 2, 3)
_median_case("median/even", 0, True, 4, 3)
_median_case("median/everything", None, False, 2, 3)
_median_case("median/leading axes", (1, 0), False, 2, 3, 4)
_median_case("median/leading axes kept", (0, 1), True, 2, 3, 4)

# Searches ---------------------------------------------------------------------------------------


def _search(**options: Any) -> Callable[..., mx.array]:
    return lambda a, v: mx.searchsorted(a, v, **options)


def _with_nans(*shape: int) -> Callable[[], mx.array]:
    """Sorted, with ties and NaN at the end."""

    def draw() -> mx.array:
        x = mx.random.randint(0, 5, shape).astype(mx.float32)
        return mx.sort(mx.where(x == 4, mx.array(float("nan")), x), axis=-1)

    return draw


if hasattr(mx, "searchsorted"):
    case("searchsorted", _search(), ascending(7), normal(2, 3))
    case("searchsorted/right", _search(side="right"), ascending(6, high=4), integers(5))
    case("searchsorted/ties", _search(), ascending(6, high=4), integers(5))
    case("searchsorted/scalar", _search(), ascending(8), normal())
    case("searchsorted/empty", _search(), normal(0), normal(3))
    case("searchsorted/half", _search(), ascending(9), normal(4), dtypes=(mx.float16, mx.bfloat16))
    case("searchsorted/promoted", _search(side="right"), ascending(9, high=4), normal(4))
    for side in ("left", "right"):
        case(f"searchsorted/nan, {side}", _search(side=side), _with_nans(6), _with_nans(2, 3))
    case("searchsorted/one", _search(side="right"), ascending(1), normal(3))
