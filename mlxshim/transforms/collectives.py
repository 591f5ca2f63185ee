"""Collectives: what the samples of a named `vmap` say to each other, after `jax.lax`."""

from __future__ import annotations

import functools
from collections.abc import Hashable
from typing import Any

import mlx.core as mx

from ..core import levels, trees
from ..core.errors import ArgumentError
from ..core.primitive import Node
from ._collective import Collective, bind, dealt, in_range, level_of, names_of, no_groups
from ._flat import as_arrays

# psum and its kin ------------------------------------------------------------------------------


def _sum_rule(x: mx.array) -> mx.array:
    return mx.broadcast_to(mx.sum(x, axis=0, keepdims=True).astype(x.dtype), x.shape)


_PSUM = Collective(_sum_rule, lambda x, size: x * mx.array(size, x.dtype), lambda: _PSUM)


def psum(x: Any, axis_name: Any, *, axis_index_groups: None = None) -> Any:
    """The sum of `x` over all samples of the vmap with that `axis_name`; the same for each of them.

    Args:
        x: An array or a tree of arrays.
        axis_name: The name of a vmap around the call, or a tuple of names.
        axis_index_groups: None: JAX's own `vmap` takes no others either.

    Returns:
        A tree like `x`.

    Raises:
        NameError: no vmap in reach has that name.
        NotImplementedError: groups; an axis of groups and two `vmap`s are the way to them.

    Example:
        >>> import mlx.core as mx
        >>> from mlxshim import psum, vmap
        >>> vmap(lambda x: x / psum(x, "i"), axis_name="i")(mx.array([1.0, 3.0]))
        array([0.25, 0.75], dtype=float32)
    """
    no_groups(axis_index_groups, "psum")
    for name in names_of(axis_name):
        x = bind(_PSUM, x, name, "psum")
    return x


def pmean(x: Any, axis_name: Any, *, axis_index_groups: None = None) -> Any:
    """The mean of `x` over all samples of the vmap with that `axis_name`.

    Arguments and errors are those of `psum`.

    Example:
        >>> import mlx.core as mx
        >>> from mlxshim import pmean, vmap
        >>> vmap(lambda x: x - pmean(x, "i"), axis_name="i")(mx.array([1.0, 3.0]))
        array([-1, 1], dtype=float32)
    """
    no_groups(axis_index_groups, "pmean")
    size = axis_size(axis_name)
    return trees.map_leaves(lambda y: y / size, psum(x, axis_name))


def pmax(x: Any, axis_name: Any, *, axis_index_groups: None = None) -> Any:
    """The largest of `x` over all samples, entry by entry.

    Arguments and errors are those of `psum`.

    Example:
        >>> import mlx.core as mx
        >>> from mlxshim import pmax, vmap
        >>> vmap(lambda x: pmax(x, "i"), axis_name="i")(mx.array([1.0, 3.0]))
        array([3, 3], dtype=float32)
    """
    no_groups(axis_index_groups, "pmax")
    for name in names_of(axis_name):
        x = trees.map_leaves(lambda y: mx.max(y, axis=0), all_gather(x, name))
    return x


def pmin(x: Any, axis_name: Any, *, axis_index_groups: None = None) -> Any:
    """The smallest of `x` over all samples, entry by entry.

    Arguments and errors are those of `psum`.

    Example:
        >>> import mlx.core as mx
        >>> from mlxshim import pmin, vmap
        >>> vmap(lambda x: pmin(x, "i"), axis_name="i")(mx.array([1.0, 3.0]))
        array([1, 1], dtype=float32)
    """
    no_groups(axis_index_groups, "pmin")
    for name in names_of(axis_name):
        x = trees.map_leaves(lambda y: mx.min(y, axis=0), all_gather(x, name))
    return x


# all_gather and its transpose ------------------------------------------------------------------


@functools.lru_cache(maxsize=64)
def _gather(axis: int) -> Collective:
    def rule(x: mx.array) -> mx.array:
        gathered = mx.moveaxis(x, 0, axis)
        return mx.broadcast_to(gathered[None], (x.shape[0], *gathered.shape))

    def like(x: mx.array, size: int) -> mx.array:
        return mx.repeat(mx.expand_dims(x, axis), size, axis=axis)

    return Collective(rule, like, lambda: _scatter(axis))


@functools.lru_cache(maxsize=64)
def _scatter(axis: int) -> Collective:
    """The sum over samples, of which sample n keeps the part n along `axis`."""

    def rule(x: mx.array) -> mx.array:
        return mx.moveaxis(mx.sum(x, axis=0).astype(x.dtype), axis, 0)

    return Collective(rule, lambda x, size: mx.sum(x, axis=axis), lambda: _gather(axis))


def all_gather(
    x: Any,
    axis_name: Hashable,
    *,
    axis_index_groups: None = None,
    axis: int = 0,
    tiled: bool = False,
    to: str = "varying",
) -> Any:
    """`x` of all samples, stacked along a new `axis` of the result; the same for each of them.

    Args:
        x: An array or a tree of arrays.
        axis_name: The name of a vmap around the call.
        axis_index_groups: None, as in `psum`.
        axis: Where the samples go in the result.
        tiled: Concatenate along the existing `axis` instead.
        to: "varying", JAX's default: its other types of a result are those of sharded arrays.

    Raises:
        NameError: no vmap in reach has that name.
        ValueError: `axis` is out of range, or `to` another word.

    Example:
        >>> import mlx.core as mx
        >>> from mlxshim import all_gather, vmap
        >>> vmap(lambda x: all_gather(x, "i"), axis_name="i")(mx.array([1, 3]))
        array([[1, 3],
               [1, 3]], dtype=int32)
    """
    no_groups(axis_index_groups, "all_gather")
    if to != "varying":
        raise ArgumentError(
            f"[all_gather] to must be 'varying', found {to!r}: leave it out, for what is gathered "
            "is the same for all samples, and vmap's out_axes=None returns it once."
        )
    level_of(axis_name, "all_gather")

    def one(leaf: mx.array) -> mx.array:
        place = in_range(leaf, axis, "all_gather", "axis", new=not tiled)
        gathered = bind(_gather(place), leaf, axis_name, "all_gather")
        return mx.flatten(gathered, place, place + 1) if tiled else gathered

    return trees.map_leaves(one, as_arrays(x))


def psum_scatter(
    x: Any,
    axis_name: Hashable,
    *,
    scatter_dimension: int = 0,
    axis_index_groups: None = None,
    tiled: bool = False,
) -> Any:
    """The sum of `x` over all samples, of which each sample keeps its part.

    Args:
        x: An array or a tree of arrays whose `scatter_dimension` is as long as the mapped axis;
            with `tiled`, a multiple of it.
        axis_name: The name of a vmap around the call.
        scatter_dimension: The axis that is dealt out; it is gone in the result.
        axis_index_groups: None, as in `psum`.
        tiled: `scatter_dimension` stays, and is so many times shorter.

    Raises:
        NameError: no vmap in reach has that name.
        ValueError: an axis that is out of range, or cannot be dealt out.

    Example:
        >>> import mlx.core as mx
        >>> from mlxshim import psum_scatter, vmap
        >>> vmap(lambda x: psum_scatter(x, "i"), axis_name="i")(mx.array([[1, 2], [3, 4]]))
        array([4, 6], dtype=int32)
    """
    no_groups(axis_index_groups, "psum_scatter")
    size = level_of(axis_name, "psum_scatter").size

    def one(leaf: mx.array) -> mx.array:
        name = "scatter_dimension"
        parts, place = dealt(leaf, scatter_dimension, size, tiled, "psum_scatter", name)
        return bind(_scatter(place), parts, axis_name, "psum_scatter")

    return trees.map_leaves(one, as_arrays(x))


# axis_index, axis_size ---------------------------------------------------------------------------


@functools.lru_cache(maxsize=64)
def _index_node(depth: int) -> Any:
    def vmap(mapped: mx.array, axis: int | None) -> Any:
        if axis is None or len(levels.vmaps()) != depth:
            raise RuntimeError("axis_index has left its level")
        return mx.arange(mapped.shape[axis], dtype=mx.int32), 0

    node = Node(lambda mapped: mx.zeros((), mx.int32))
    node.vmap(vmap)
    node.vjp(lambda primal, cotangent, output: mx.zeros_like(primal))
    node.jvp(lambda primals, tangents: mx.zeros((), mx.int32))
    return node


def axis_index(axis_name: Any) -> mx.array:
    """The number of the sample, an int32 scalar; for a tuple of names, the first varies slowest.

    Args:
        axis_name: The name of a vmap around the call, or a tuple of names.

    Raises:
        NameError: no vmap in reach has that name.

    Example:
        >>> import mlx.core as mx
        >>> from mlxshim import axis_index, vmap
        >>> vmap(lambda x: x + axis_index("i"), axis_name="i")(mx.array([10, 10, 10]))
        array([10, 11, 12], dtype=int32)
    """
    index: Any = None
    for name in names_of(axis_name):
        level = level_of(name, "axis_index")
        one = _index_node(level.depth)(level.mapped)
        index = one if index is None else index * level.size + one
    return index


def axis_size(axis_name: Any) -> int:
    """How many samples the vmap with that `axis_name` has; for a tuple of names, their product.

    Args:
        axis_name: The name of a vmap around the call, or a tuple of names.

    Raises:
        NameError: no vmap in reach has that name.

    Example:
        >>> import mlx.core as mx
        >>> from mlxshim import axis_size, vmap
        >>> vmap(lambda x: x * axis_size("i"), axis_name="i")(mx.array([1, 2]))
        array([2, 4], dtype=int32)
    """
    size = 1
    for name in names_of(axis_name):
        size *= level_of(name, "axis_size").size
    return size
