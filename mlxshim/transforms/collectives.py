"""Collectives: what the samples of a named `vmap` say to each other, after `jax.lax`.

Each is a node that carries a tracer of the level it belongs to, so that MLX calls its rule at that
level whether or not its operand is mapped there. At a level further in, the rule only moves the
other mapped axis out of the way. All of them are linear: the tangent goes through the collective
itself, the cotangent through its transpose.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from ..core import levels, trees
from ..core.primitive import Node


@dataclass(frozen=True)
class _Collective:
    """One linear collective with its static arguments bound."""

    #: (x of all samples on axis 0) -> (the results of all samples on axis 0)
    rule: Callable[[mx.array], mx.array]
    #: (x of one sample, the number of samples) -> an array like its result, while it is traced
    like: Callable[[mx.array, int], mx.array]
    #: The collective that takes the cotangent back.
    transpose: Callable[[], _Collective]


@functools.lru_cache(maxsize=256)
def _node(collective: _Collective, depth: int, size: int) -> Any:
    """`collective` as a custom function of (x, a mapped tracer of its level)."""

    def apply(x: mx.array, mapped: mx.array) -> mx.array:
        return _node(collective, depth, size)(x, mapped)

    def vmap(arrays: Sequence[mx.array], axes: Sequence[int | None]) -> Any:
        (x, mapped), (axis, level_axis) = arrays, axes
        if len(levels.vmaps()) > depth:  # a level further in: its samples go along
            assert axis is not None
            out = apply(mx.moveaxis(x, axis, -1), mapped)
            return out, out.ndim - 1
        assert level_axis is not None
        x = mx.broadcast_to(x, (size, *x.shape)) if axis is None else mx.moveaxis(x, axis, 0)
        return collective.rule(x), 0

    def vjp(primals: Sequence[mx.array], cotangent: mx.array, _: Any) -> Any:
        mapped = primals[1]
        back = _node(collective.transpose(), depth, size)(cotangent, mapped)
        return back, mx.zeros_like(mapped)

    def jvp(primals: Sequence[mx.array], tangents: Sequence[mx.array | None]) -> Any:
        tangent = tangents[0]
        return apply(mx.zeros_like(primals[0]) if tangent is None else tangent, primals[1])

    node = Node(lambda x, mapped: collective.like(x, size))
    node.vmap(vmap)
    node.vjp(vjp)
    node.jvp(jvp)
    return node


def _level(name: Hashable, function: str) -> levels.VmapLevel:
    for level in reversed(levels.vmaps()):
        if level.axis_name == name and name is not None and level.mapped is not None:
            return level
    bound = [level.axis_name for level in levels.vmaps() if level.axis_name is not None]
    raise NameError(
        f"[{function}] No vmap around this call has axis_name={name!r}"
        + (f"; the names in reach are {bound}" if bound else "")
        + f". Call it inside a function that is mapped by vmap(fun, axis_name={name!r})."
    )


def _bind(collective: _Collective, x: Any, name: Hashable, function: str) -> Any:
    level = _level(name, function)
    node = _node(collective, level.depth, level.size)

    def one(leaf: Any) -> mx.array:
        return node(leaf if isinstance(leaf, mx.array) else mx.array(leaf), level.mapped)

    return trees.map_leaves(one, x)


def _names(name: Any) -> tuple[Hashable, ...]:
    return tuple(name) if isinstance(name, (tuple, list)) else (name,)


# psum and its kin ------------------------------------------------------------------------------


def _sum_rule(x: mx.array) -> mx.array:
    return mx.broadcast_to(mx.sum(x, axis=0, keepdims=True).astype(x.dtype), x.shape)


_PSUM = _Collective(_sum_rule, lambda x, size: x * mx.array(size, x.dtype), lambda: _PSUM)


def psum(x: Any, axis_name: Any) -> Any:
    """The sum of `x` over all samples of the vmap with that `axis_name`; the same for each of them.

    Args:
        x: An array or a tree of arrays.
        axis_name: The name of a vmap around the call, or a tuple of names.

    Returns:
        A tree like `x`.

    Raises:
        NameError: no vmap in reach has that name.

    Example:
        >>> import mlx.core as mx
        >>> from mlxshim import psum, vmap
        >>> vmap(lambda x: x / psum(x, "i"), axis_name="i")(mx.array([1.0, 3.0]))
        array([0.25, 0.75], dtype=float32)
    """
    for name in _names(axis_name):
        x = _bind(_PSUM, x, name, "psum")
    return x


def pmean(x: Any, axis_name: Any) -> Any:
    """The mean of `x` over all samples of the vmap with that `axis_name`.

    Arguments and errors are those of `psum`.

    Example:
        >>> import mlx.core as mx
        >>> from mlxshim import pmean, vmap
        >>> vmap(lambda x: x - pmean(x, "i"), axis_name="i")(mx.array([1.0, 3.0]))
        array([-1, 1], dtype=float32)
    """
    size = axis_size(axis_name)
    return trees.map_leaves(lambda y: y / size, psum(x, axis_name))


def pmax(x: Any, axis_name: Any) -> Any:
    """The largest of `x` over all samples, entry by entry.

    Arguments and errors are those of `psum`.

    Example:
        >>> import mlx.core as mx
        >>> from mlxshim import pmax, vmap
        >>> vmap(lambda x: pmax(x, "i"), axis_name="i")(mx.array([1.0, 3.0]))
        array([3, 3], dtype=float32)
    """
    for name in _names(axis_name):
        x = trees.map_leaves(lambda y: mx.max(y, axis=0), all_gather(x, name))
    return x


def pmin(x: Any, axis_name: Any) -> Any:
    """The smallest of `x` over all samples, entry by entry.

    Arguments and errors are those of `psum`.

    Example:
        >>> import mlx.core as mx
        >>> from mlxshim import pmin, vmap
        >>> vmap(lambda x: pmin(x, "i"), axis_name="i")(mx.array([1.0, 3.0]))
        array([1, 1], dtype=float32)
    """
    for name in _names(axis_name):
        x = trees.map_leaves(lambda y: mx.min(y, axis=0), all_gather(x, name))
    return x


# all_gather and its transpose ------------------------------------------------------------------


@functools.lru_cache(maxsize=64)
def _gather(axis: int) -> _Collective:
    def rule(x: mx.array) -> mx.array:
        gathered = mx.moveaxis(x, 0, axis)
        return mx.broadcast_to(gathered[None], (x.shape[0], *gathered.shape))

    def like(x: mx.array, size: int) -> mx.array:
        return mx.repeat(mx.expand_dims(x, axis), size, axis=axis)

    return _Collective(rule, like, lambda: _scatter(axis))


@functools.lru_cache(maxsize=64)
def _scatter(axis: int) -> _Collective:
    """The sum over samples, of which sample n keeps the part n along `axis`."""

    def rule(x: mx.array) -> mx.array:
        return mx.moveaxis(mx.sum(x, axis=0).astype(x.dtype), axis, 0)

    return _Collective(rule, lambda x, size: mx.sum(x, axis=axis), lambda: _gather(axis))


def all_gather(x: Any, axis_name: Hashable, *, axis: int = 0, tiled: bool = False) -> Any:
    """`x` of all samples, stacked along a new `axis` of the result; the same for each of them.

    Args:
        x: An array or a tree of arrays.
        axis_name: The name of a vmap around the call.
        axis: Where the samples go in the result.
        tiled: Concatenate along the existing `axis` instead.

    Raises:
        NameError: no vmap in reach has that name.
        ValueError: `axis` is out of range.

    Example:
        >>> import mlx.core as mx
        >>> from mlxshim import all_gather, vmap
        >>> vmap(lambda x: all_gather(x, "i"), axis_name="i")(mx.array([1, 3]))
        array([[1, 3],
               [1, 3]], dtype=int32)
    """
    _level(axis_name, "all_gather")

    def one(leaf: mx.array) -> mx.array:
        ndim = leaf.ndim + (not tiled)
        if not -ndim <= axis < ndim:
            raise ValueError(
                f"[all_gather] axis {axis} is out of range for an operand of shape {leaf.shape}."
            )
        place = axis % ndim
        gathered = _bind(_gather(place), leaf, axis_name, "all_gather")
        return mx.flatten(gathered, place, place + 1) if tiled else gathered

    return trees.map_leaves(one, x)


def psum_scatter(x: Any, axis_name: Hashable, *, scatter_dimension: int = 0) -> Any:
    """The sum of `x` over all samples, of which each sample keeps its part.

    Args:
        x: An array or a tree of arrays whose `scatter_dimension` is as long as the mapped axis.
        axis_name: The name of a vmap around the call.
        scatter_dimension: The axis that is dealt out; it is gone in the result.

    Raises:
        NameError: no vmap in reach has that name.
        ValueError: the axis is not as long as there are samples.

    Example:
        >>> import mlx.core as mx
        >>> from mlxshim import psum_scatter, vmap
        >>> vmap(lambda x: psum_scatter(x, "i"), axis_name="i")(mx.array([[1, 2], [3, 4]]))
        array([4, 6], dtype=int32)
    """
    size = _level(axis_name, "psum_scatter").size

    def one(leaf: mx.array) -> mx.array:
        if leaf.ndim == 0 or leaf.shape[scatter_dimension] != size:
            raise ValueError(
                f"[psum_scatter] axis {scatter_dimension} of an operand of shape {leaf.shape} "
                f"cannot be dealt out to {size} samples."
            )
        return _bind(_scatter(scatter_dimension % leaf.ndim), leaf, axis_name, "psum_scatter")

    return trees.map_leaves(one, x)


# all_to_all ------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=64)
def _exchange(split: int, concat: int) -> _Collective:
    """Sample n keeps part n along `split` of every sample, in their order along `concat`."""

    def rule(x: mx.array) -> mx.array:
        parts = mx.moveaxis(x, split + 1, 0)  # by who gets it, then by who had it
        return mx.moveaxis(parts, 1, concat + 1)

    return _Collective(
        rule, lambda x, _: mx.moveaxis(x, split, concat), lambda: _exchange(concat, split)
    )


def all_to_all(
    x: Any, axis_name: Hashable, split_axis: int, concat_axis: int, *, tiled: bool = False
) -> Any:
    """Each sample deals its operand out: part n along `split_axis` goes to sample n.

    Args:
        x: An array or a tree of arrays whose `split_axis` is as long as the mapped axis; with
            `tiled`, a multiple of it.
        axis_name: The name of a vmap around the call.
        split_axis: The axis that is dealt out.
        concat_axis: Where the parts that a sample gets, one of every sample, are in the result: a
            new axis, counted after `split_axis` is gone.
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
    size = _level(axis_name, "all_to_all").size

    def one(leaf: mx.array) -> mx.array:
        ndim = leaf.ndim
        for name, axis in (("split_axis", split_axis), ("concat_axis", concat_axis)):
            if not -ndim <= axis < ndim:
                raise ValueError(
                    f"[all_to_all] {name} {axis} is out of range for an operand of shape "
                    f"{tuple(leaf.shape)}."
                )
        split, concat = split_axis % ndim, concat_axis % ndim
        length = leaf.shape[split]
        if length % size or (length != size and not tiled):
            raise ValueError(
                f"[all_to_all] split_axis {split_axis} of an operand of shape {tuple(leaf.shape)} "
                f"cannot be dealt out to {size} samples: it must be "
                + (f"a multiple of {size}." if tiled else f"{size}. tiled=True takes a multiple.")
            )
        if not tiled:
            return _bind(_exchange(split, concat), leaf, axis_name, "all_to_all")
        leaf = mx.unflatten(leaf, split, (size, length // size))
        # The parts come right before the axis that they will be one with.
        moved = _bind(_exchange(split, concat), leaf, axis_name, "all_to_all")
        return mx.flatten(moved, concat, concat + 1)

    return trees.map_leaves(one, x)


def pswapaxes(x: Any, axis_name: Hashable, axis: int) -> Any:
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
    return all_to_all(x, axis_name, axis, axis)


# ppermute, axis_index --------------------------------------------------------------------------


@functools.lru_cache(maxsize=64)
def _permute(pairs: tuple[tuple[int, int], ...], size: int) -> _Collective:
    source = [size] * size
    for start, end in pairs:
        source[end] = start
    back = tuple(sorted((end, start) for start, end in pairs))

    def rule(x: mx.array) -> mx.array:
        if size in source:  # who gets nothing takes the sample of zeros
            x = mx.concatenate([x, mx.zeros_like(x[:1])])
        return mx.take(x, mx.array(source), axis=0)

    return _Collective(rule, lambda x, _: mx.zeros_like(x), lambda: _permute(back, size))


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
    size = _level(axis_name, "ppermute").size
    pairs = tuple(sorted((int(a), int(b)) for a, b in perm))
    for side in zip(*pairs):
        if len(set(side)) != len(side) or not all(0 <= n < size for n in side):
            raise ValueError(
                f"[ppermute] perm {list(perm)!r} must name each of the {size} samples at most once "
                "as a source and once as a destination."
            )
    return _bind(_permute(pairs, size), x, axis_name, "ppermute")


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
    size = _level(axis_name, "pshuffle").size
    if sorted(perm) != list(range(size)):
        raise ValueError(
            f"[pshuffle] perm {list(perm)!r} must name each of the {size} samples once."
        )
    return ppermute(x, axis_name, list(zip(perm, range(size))))


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
    for name in _names(axis_name):
        level = _level(name, "axis_index")
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
    for name in _names(axis_name):
        size *= _level(name, "axis_size").size
    return size
