"""A collective: a node that carries a tracer of the level it belongs to.

MLX calls its rule at that level whether or not its operand is mapped there. At a level further in,
the rule only moves the other mapped axis out of the way. All collectives are linear: the tangent
goes through the collective itself, the cotangent through its transpose.
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
class Collective:
    """One linear collective with its static arguments bound."""

    #: (x of all samples on axis 0) -> (the results of all samples on axis 0)
    rule: Callable[[mx.array], mx.array]
    #: (x of one sample, the number of samples) -> an array like its result, while it is traced
    like: Callable[[mx.array, int], mx.array]
    #: The collective that takes the cotangent back.
    transpose: Callable[[], Collective]


@functools.lru_cache(maxsize=256)
def _node(collective: Collective, depth: int, size: int) -> Any:
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


def level_of(name: Hashable, function: str) -> levels.VmapLevel:
    for level in reversed(levels.vmaps()):
        if level.axis_name == name and name is not None and level.mapped is not None:
            return level
    bound = [level.axis_name for level in levels.vmaps() if level.axis_name is not None]
    raise NameError(
        f"[{function}] No vmap around this call has axis_name={name!r}"
        + (f"; the names in reach are {bound}" if bound else "")
        + f". Call it inside a function that is mapped by vmap(fun, axis_name={name!r})."
    )


def bind(collective: Collective, x: Any, name: Hashable, function: str) -> Any:
    level = level_of(name, function)
    node = _node(collective, level.depth, level.size)

    def one(leaf: Any) -> mx.array:
        return node(leaf if isinstance(leaf, mx.array) else mx.array(leaf), level.mapped)

    return trees.map_leaves(one, x)


def no_groups(groups: Any, function: str) -> None:
    if groups is not None:
        raise NotImplementedError(
            f"[{function}] axis_index_groups is not taken, as JAX's own vmap takes none: reshape "
            "the mapped axis into (groups, members), and map the groups by a vmap around the one "
            "with axis_name."
        )


def names_of(name: Any) -> tuple[Hashable, ...]:
    return tuple(name) if isinstance(name, (tuple, list)) else (name,)


# Arguments ---------------------------------------------------------------------------------------


def in_range(x: mx.array, axis: int, function: str, name: str, new: bool = False) -> int:
    """The number of an axis of `x`, or of a `new` one that is to be put into it."""
    ndim = x.ndim + new
    if not -ndim <= axis < ndim:
        raise ValueError(
            f"[{function}] {name} {axis} is out of range for an operand of shape {tuple(x.shape)}."
        )
    return axis % ndim


def dealt(
    x: mx.array, axis: int, size: int, tiled: bool, function: str, name: str
) -> tuple[mx.array, int]:
    """`x` with an axis that can be dealt out to all samples, and the number of that axis."""
    place = in_range(x, axis, function, name)
    length = x.shape[place]
    if length % size or (length != size and not tiled):
        raise ValueError(
            f"[{function}] {name} {axis} of an operand of shape {tuple(x.shape)} cannot be dealt "
            f"out to {size} samples: it must be "
            + (f"a multiple of {size}." if tiled else f"{size}. tiled=True takes a multiple.")
        )
    return (mx.unflatten(x, place, (size, length // size)) if tiled else x), place
