"""Loops of a known length: scan, map, associative_scan, after `jax.lax`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import mlx.core as mx

from ..core import trees
from . import _flat
from .shapes import eval_shape, first_carry
from .vmap import vmap

C = TypeVar("C")


def scan(
    f: Callable[[C, Any], tuple[C, Any]],
    init: C,
    xs: Any = None,
    length: int | None = None,
    reverse: bool = False,
    unroll: int | bool = 1,
) -> tuple[C, Any]:
    """Go along the leading axis of `xs`, carrying a value: `carry, y = f(carry, x)`.

    Args:
        f: A function of (carry, x) that returns (carry, y): the carry keeps its tree, shapes and
            dtypes, y is any tree of arrays.
        init: The first carry: an array or a tree of arrays; numbers become arrays.
        xs: A tree of arrays with one leading axis of the same size, or None.
        length: The number of steps; needed only where `xs` has no array.
        reverse: Go from the last to the first; the ys lie as the xs do.
        unroll: Taken for JAX's sake; every step is in the graph.

    Returns:
        (the last carry, the tree of ys stacked along a new leading axis).

    Raises:
        TypeError: `f` returns no pair, or a carry of another form.
        ValueError: no length, or lengths that differ.

    Example:
        >>> import mlx.core as mx
        >>> from mlxshim import scan
        >>> scan(lambda total, x: (total + x, total * x), mx.array(0.0), mx.array([1.0, 2.0, 3.0]))
        (array(6, dtype=float32), array([0, 2, 9], dtype=float32))

    Semantics after `jax.lax.scan`.
    """
    f = _flat.callable_of(f, "scan", "f", "(carry, x)")
    arrays, slots, size = _steps("scan", xs, length)
    # One node for all entries: its gradient is one concatenation.
    columns = [[mx.squeeze(x, 0) for x in mx.split(x, size)] if size else [] for x in arrays]
    example = _flat.unflatten(slots, [mx.zeros(x.shape[1:], x.dtype) for x in arrays])
    carry = first_carry(init, lambda carry: _pair(f(carry, example))[0])
    rows: list[list[mx.array]] = []
    form: Any = None
    y_slots: Any = None
    for i in reversed(range(size)) if reverse else range(size):
        x = _flat.unflatten(slots, [column[i] for column in columns])
        new, y = _pair(f(carry, x))
        carry = _kept(new, carry)
        if form is None:
            form = y = _flat.as_arrays(y)
        else:
            y = _flat.like(y, form, _unequal_ys)
        arrays, y_slots = _flat.flatten(y)
        rows.append(arrays)
    if not rows:
        _, y = _pair(eval_shape(f, carry, example))
        return carry, trees.map_leaves(
            lambda s: mx.zeros((0, *s.shape), s.dtype) if hasattr(s, "shape") else s, y
        )
    if reverse:
        rows.reverse()
    return carry, _flat.unflatten(y_slots, [mx.stack(list(ys)) for ys in zip(*rows)])


def _steps(function: str, xs: Any, length: int | None) -> tuple[list[mx.array], Any, int]:
    """The arrays of `xs`, the tree of one step, and how many steps there are."""
    arrays, slots = _flat.flatten(xs)
    for x in arrays:
        if x.ndim == 0:
            raise ValueError(
                f"[{function}] xs has the scalar {_flat.describe(x)}, which has no leading axis to "
                "go along: hand it over as part of init, or let the function capture it."
            )
    sizes = sorted({x.shape[0] for x in arrays})
    if len(sizes) > 1:
        raise ValueError(
            f"[{function}] xs has arrays with different leading axis sizes: "
            f"{', '.join(str(size) for size in sizes)}. Slice them to one size."
        )
    if length is not None and sizes and sizes[0] != length:
        raise ValueError(
            f"[{function}] length is {length}, but the leading axis of xs has size {sizes[0]}: "
            "leave length out, or slice xs."
        )
    if sizes:
        return arrays, slots, sizes[0]
    if length is None:
        raise ValueError(f"[{function}] Neither xs has an array nor is length given: give one.")
    if not isinstance(length, int) or length < 0:
        raise ValueError(f"[{function}] length must be an int that is not negative: {length!r}.")
    return arrays, slots, length


def _pair(result: Any) -> tuple[Any, Any]:
    if not isinstance(result, (tuple, list)) or len(result) != 2:
        raise TypeError(
            f"[scan] f must return a pair (carry, y), found {_flat.describe(result)}: return "
            "(carry, None) where there is no y."
        )
    return result[0], result[1]


def _kept(new: Any, old: Any) -> Any:
    return _flat.like(
        new,
        old,
        lambda difference: TypeError(
            "[scan] f must return a carry of the same tree, shapes and dtypes as init; of what it "
            f"returned, {difference}: cast or reshape it, or start from an init of that form."
        ),
    )


def _unequal_ys(difference: str) -> Exception:
    return TypeError(
        f"[scan] f must return a y of the same form at every step; of what it returned, "
        f"{difference}."
    )


def map(f: Callable[[Any], Any], xs: Any, *, batch_size: int | None = None) -> Any:
    """`f` on every entry along the leading axis of `xs`, one after the other, and stacked.

    Args:
        f: A function of one entry that returns an array or a tree of arrays.
        xs: An array or a tree of arrays with one leading axis of the same size.
        batch_size: So many entries at a time, by `vmap`: `chunk_size` there.

    Returns:
        The tree of results, stacked along a new leading axis.

    Raises:
        TypeError: `f` is no function.
        ValueError: no arrays, scalars, or leading axes of different sizes.

    Example:
        >>> import mlx.core as mx
        >>> import mlxshim
        >>> mlxshim.map(lambda x: x * x, mx.array([1, 2, 3]), batch_size=2)
        array([1, 4, 9], dtype=int32)

    Semantics after `jax.lax.map`.
    """
    f = _flat.callable_of(f, "map", "f", "one entry")
    if batch_size is None:
        return scan(lambda carry, x: (carry, f(x)), (), xs)[1]
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"[map] batch_size must be a positive int or None, found {batch_size!r}.")
    _steps("map", xs, None)
    return vmap(f, in_axes=(0,), chunk_size=batch_size)(xs)


def associative_scan(
    fn: Callable[[Any, Any], Any], elems: Any, reverse: bool = False, axis: int = 0
) -> Any:
    """The running results of an associative operation along an axis, in logarithmic depth.

    Args:
        fn: An associative function of two trees like `elems`, entry by entry along `axis`: it is
            called with many entries at once.
        elems: An array or a tree of arrays of the same size along `axis`.
        reverse: From the last entry to the first.
        axis: The axis to go along; negative ones count from the end.

    Returns:
        A tree like `elems`: entry i is the result over the entries 0 … i.

    Raises:
        TypeError: `fn` is no function.
        ValueError: no arrays, or sizes along `axis` that differ.

    Example:
        >>> import mlx.core as mx
        >>> from mlxshim import associative_scan
        >>> associative_scan(mx.maximum, mx.array([1, 3, 2, 5, 4]))
        array([1, 3, 3, 5, 5], dtype=int32)

    Source: Blelloch, Prefix sums and their applications (1990), as in `jax.lax`.
    """
    fn = _flat.callable_of(fn, "associative_scan", "fn", "two trees like elems")
    arrays, slots = _flat.flatten(elems)
    if not arrays:
        raise ValueError("[associative_scan] elems has no array: give at least one.")
    for x in arrays:
        if not -x.ndim <= axis < x.ndim:
            raise ValueError(
                f"[associative_scan] axis {axis} is out of range for {_flat.describe(x)}."
            )
    sizes = {x.shape[axis] for x in arrays}
    if len(sizes) > 1:
        raise ValueError(
            f"[associative_scan] elems has different sizes along axis {axis}: {sorted(sizes)}."
        )
    places = [axis % x.ndim for x in arrays]

    def combined(a: list[mx.array], b: list[mx.array]) -> list[mx.array]:
        out, _ = _flat.flatten(fn(_flat.unflatten(slots, a), _flat.unflatten(slots, b)))
        return out

    def part(xs: list[mx.array], cut: slice) -> list[mx.array]:
        return [x[(*(slice(None),) * p, cut)] for x, p in zip(xs, places)]

    def flipped(xs: list[mx.array]) -> list[mx.array]:
        return part(xs, slice(None, None, -1))

    def scanned(xs: list[mx.array], size: int) -> list[mx.array]:
        if size < 2:
            return xs
        half = size // 2
        pairs = combined(part(xs, slice(0, 2 * half, 2)), part(xs, slice(1, 2 * half, 2)))
        odd = scanned(pairs, half)
        rest = (size - 1) // 2
        later = part(xs, slice(2, None, 2))
        first = part(xs, slice(0, 1))
        even = first
        if rest:
            after = combined(part(odd, slice(0, rest)), later)
            even = [mx.concatenate([a, b], p) for a, b, p in zip(first, after, places)]
        return [_interleaved(a, b, p) for a, b, p in zip(even, odd, places)]

    size = sizes.pop()
    # Of one entry it is that entry, in an array of its own: the caller may write to either.
    arrays = _flat.apart(arrays)
    results = scanned(flipped(arrays) if reverse else arrays, size)
    return _flat.unflatten(slots, flipped(results) if reverse else results)


def _interleaved(even: mx.array, odd: mx.array, axis: int) -> mx.array:
    """even[0], odd[0], even[1], …: as many of the odd ones, or one less."""
    count = odd.shape[axis]
    front = even[(*(slice(None),) * axis, slice(0, count))]
    both = mx.flatten(mx.stack([front, odd], axis=axis + 1), axis, axis + 1)
    if even.shape[axis] == count:
        return both
    return mx.concatenate([both, even[(*(slice(None),) * axis, slice(count, None))]], axis)
