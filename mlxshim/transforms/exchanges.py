"""Collectives in which samples exchange what they have: all_to_all, ppermute and their kin."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Sequence
from typing import Any

import mlx.core as mx

from ..core import trees
from ._collective import Collective, bind, dealt, in_range, level_of, no_groups
from ._flat import as_arrays

# all_to_all ------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=64)
def _exchange(split: int, concat: int) -> Collective:
    """Sample n keeps part n along `split` of every sample, in their order along `concat`."""

    def rule(x: mx.array) -> mx.array:
        parts = mx.moveaxis(x, split + 1, 0)  # by who gets it, then by who had it
        return mx.moveaxis(parts, 1, concat + 1)

    return Collective(
        rule, lambda x, _: mx.moveaxis(x, split, concat), lambda: _exchange(concat, split)
    )


def all_to_all(
    x: Any,
    axis_name: Hashable,
    split_axis: int,
    concat_axis: int,
    *,
    axis_index_groups: None = None,
    tiled: bool = False,
) -> Any:
    """Each sample deals its operand out: part n along `split_axis` goes to sample n.

    Args:
        x: An array or a tree of arrays whose `split_axis` is as long as the mapped axis; with
            `tiled`, a multiple of it.
        axis_name: The name of a vmap around the call.
        split_axis: The axis that is dealt out.
        concat_axis: Where the parts that a sample gets, one of every sample, are in the result: a
            new axis, counted after `split_axis` is gone.
        axis_index_groups: None, as in `psum`.
        tiled: `split_axis` stays, and is so many times shorter; the parts are concatenated along
            `concat_axis`, which is there.

    Raises:
        NameError: no vmap in reach has that name.
        ValueError: an axis that is out of range, or cannot be dealt out.

    Example:
        >>> import mlx.core as mx
        >>> from mlxshim import all_to_all, vmap
        >>> xs = mx.array([[1, 2], [3, 4]])
        >>> vmap(lambda x: all_to_all(x, "i", 0, 0), axis_name="i")(xs)
        array([[1, 3],
               [2, 4]], dtype=int32)

    Source: `jax.lax.all_to_all`.
    """
    no_groups(axis_index_groups, "all_to_all")
    size = level_of(axis_name, "all_to_all").size

    def one(leaf: mx.array) -> mx.array:
        concat = in_range(leaf, concat_axis, "all_to_all", "concat_axis")
        parts, split = dealt(leaf, split_axis, size, tiled, "all_to_all", "split_axis")
        moved = bind(_exchange(split, concat), parts, axis_name, "all_to_all")
        # Tiled, the parts came right before the axis that they are one with.
        return mx.flatten(moved, concat, concat + 1) if tiled else moved

    return trees.map_leaves(one, as_arrays(x))


def pswapaxes(x: Any, axis_name: Hashable, axis: int, *, axis_index_groups: None = None) -> Any:
    """The mapped axis exchanged with `axis` of the operand, which is as long.

    Arguments and errors are those of `all_to_all`, with `axis` for both of its axes.

    Example:
        >>> import mlx.core as mx
        >>> from mlxshim import pswapaxes, vmap
        >>> xs = mx.array([[1, 2], [3, 4]])
        >>> vmap(lambda x: pswapaxes(x, "i", 0), axis_name="i")(xs)
        array([[1, 3],
               [2, 4]], dtype=int32)

    Source: `jax.lax.pswapaxes`.
    """
    no_groups(axis_index_groups, "pswapaxes")
    return all_to_all(x, axis_name, axis, axis)


# ppermute, pshuffle ----------------------------------------------------------------------------


@functools.lru_cache(maxsize=64)
def _permute(pairs: tuple[tuple[int, int], ...], size: int) -> Collective:
    source = [size] * size
    for start, end in pairs:
        source[end] = start
    back = tuple(sorted((end, start) for start, end in pairs))

    def rule(x: mx.array) -> mx.array:
        if size in source:  # who gets nothing takes the sample of zeros
            x = mx.concatenate([x, mx.zeros_like(x[:1])])
        return mx.take(x, mx.array(source), axis=0)

    return Collective(rule, lambda x, _: mx.zeros_like(x), lambda: _permute(back, size))


def ppermute(x: Any, axis_name: Hashable, perm: Sequence[tuple[int, int]]) -> Any:
    """`x` sent from sample to sample: for every pair (source, destination) in `perm`.

    A sample that nobody sends to gets zeros.

    Args:
        x: An array or a tree of arrays.
        axis_name: The name of a vmap around the call.
        perm: Pairs of numbers of samples.

    Raises:
        NameError: no vmap in reach has that name.
        ValueError: `perm` has a number twice on one side, or one that is no sample.

    Example:
        >>> import mlx.core as mx
        >>> from mlxshim import ppermute, vmap
        >>> vmap(lambda x: ppermute(x, "i", [(0, 1), (1, 2)]), axis_name="i")(mx.array([5, 6, 7]))
        array([0, 5, 6], dtype=int32)
    """
    size = level_of(axis_name, "ppermute").size
    pairs = tuple(sorted((int(a), int(b)) for a, b in perm))
    for side in zip(*pairs):
        if len(set(side)) != len(side) or not all(0 <= n < size for n in side):
            raise ValueError(
                f"[ppermute] perm {list(perm)!r} must name each of the {size} samples at most once "
                "as a source and once as a destination."
            )
    return bind(_permute(pairs, size), x, axis_name, "ppermute")


def pshuffle(x: Any, axis_name: Hashable, perm: Sequence[int]) -> Any:
    """`x` of another sample: sample n gets that of number `perm[n]`.

    Args:
        x: An array or a tree of arrays.
        axis_name: The name of a vmap around the call.
        perm: The numbers of all samples, in the order of who gets them.

    Raises:
        NameError: no vmap in reach has that name.
        ValueError: `perm` is no permutation of the samples.

    Example:
        >>> import mlx.core as mx
        >>> from mlxshim import pshuffle, vmap
        >>> vmap(lambda x: pshuffle(x, "i", [2, 0, 1]), axis_name="i")(mx.array([5, 6, 7]))
        array([7, 5, 6], dtype=int32)

    Source: `jax.lax.pshuffle`.
    """
    size = level_of(axis_name, "pshuffle").size
    if sorted(perm) != list(range(size)):
        raise ValueError(
            f"[pshuffle] perm {list(perm)!r} must name each of the {size} samples once."
        )
    return ppermute(x, axis_name, list(zip(perm, range(size))))
