"""A node whose batching rule is certain to run: an input of the vmap around is one of its own."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from .levels import is_kept
from .plans import placeholder
from .primitive import Arrays, Axes, Node, full, mapped_size, several
from .tracers import is_marked


def opaque_node(
    shaped: Callable[..., Sequence[mx.array]],
    batch: Callable[[int, Arrays, Axes], list[mx.array]],
    vjp: Callable[[Arrays, Arrays, Arrays], list[mx.array]],
    jvp: Callable[[Arrays, Arrays], list[mx.array]],
) -> Callable[..., Any]:
    """A node of (a mapped tracer, *arrays); `shaped(*arrays)` has the outputs' shapes and dtypes.

    The rules see the arrays alone; `batch` gets axes that may all be None, and maps over axis 0.
    """

    def value(mapped: mx.array, *arrays: mx.array) -> list[mx.array]:
        return [placeholder(x.shape, x.dtype) for x in shaped(*arrays)]

    def node_vmap(arrays: Arrays, axes: Axes) -> tuple[list[mx.array], list[int]]:
        size = mapped_size(arrays, axes)
        outputs = batch(size, arrays[1:], axes[1:])
        return outputs, [0] * len(outputs)

    def node_vjp(primals: Arrays, cotangents: Arrays, outputs: Arrays) -> list[mx.array]:
        return [mx.zeros_like(primals[0]), *vjp(primals[1:], cotangents, outputs)]

    def node_jvp(primals: Arrays, tangents: Sequence[mx.array | None]) -> list[mx.array]:
        return jvp(primals[1:], full(primals[1:], tangents[1:]))

    node = Node(value)
    node.vmap(node_vmap)
    node.vjp(node_vjp)
    node.jvp(node_jvp)
    return node


def copies(x: mx.array, size: int) -> mx.array:
    """`x` once for each sample, on axis 0; no memory is written."""
    return mx.broadcast_to(x, (size, *x.shape))


def in_front(size: int, arrays: Arrays, axes: Axes) -> list[mx.array]:
    """The arrays with the mapped axis first; an unmapped one is there once for each sample."""
    return [copies(x, size) if a is None else mx.moveaxis(x, a, 0) for x, a in zip(arrays, axes)]


#: How many outputs one node is for: what it costs grows with their square.
_GROUP = 8


def once_each(outputs: list[mx.array], mapped: mx.array) -> list[mx.array]:
    """The outputs of what `mx.vmap` maps: it moves the axis of one that is there twice twice.

    Whether two are the same node cannot be asked, so one of a shape that was met is another.
    `mapped` is a tracer of that vmap, mapped for certain.
    """
    shapes: set[tuple[int, ...]] = set()
    met: list[int] = []
    for i, x in enumerate(outputs):
        if x.shape in shapes:
            met.append(i)
        else:
            shapes.add(x.shape)
    if not met:
        return outputs
    found = list(outputs)
    kept, apart = is_kept(), list[int]()
    for i in met:
        if kept and is_marked(outputs[i]):
            apart.append(i)
        else:
            found[i] = _turned(outputs[i])
    for start in range(0, len(apart), _GROUP):
        group = apart[start : start + _GROUP]
        for i, x in zip(group, _apart(mapped, *(outputs[i] for i in group))):
            found[i] = x
    return found


def _turned(x: mx.array) -> mx.array:
    """`x` as a node of its own; no memory is written."""
    return mx.transpose(x, tuple(range(x.ndim))) if x.ndim else x


def _new_apart() -> Callable[..., Arrays]:
    """Of (a mapped tracer, *arrays) the arrays, as nodes of which nothing is left once mapped.

    Such a node costs more to trace than a view does, and to evaluate. One that nothing maps would
    be left in the graph, which MLX could not export then: hence the tracer.
    """

    def vmap(arrays: Arrays, axes: Axes) -> tuple[Arrays, list[int]]:
        size = mapped_size(arrays, axes)
        outputs = [x if a is not None else copies(x, size) for x, a in zip(arrays[1:], axes[1:])]
        return outputs, [a or 0 for a in axes[1:]]

    def vjp(primals: Arrays, cotangents: Any, outputs: Any) -> Arrays:
        return [mx.zeros_like(primals[0]), *several(cotangents)]

    node: Any = Node(lambda mapped, *xs: list(xs))
    node.vjp(vjp)
    node.jvp(lambda primals, tangents: full(primals[1:], tangents[1:]))
    node.vmap(vmap)
    return node


_apart = _new_apart()


# In order --------------------------------------------------------------------------------------


def after(waiting: Arrays, others: Arrays) -> Arrays:
    """`waiting`, evaluated when `others` are: `mx.depends`, with every transform."""
    return _waiting(len(waiting))(*waiting, *others) if waiting and others else waiting


@functools.lru_cache(maxsize=8)
def _waiting(count: int) -> Callable[..., Arrays]:
    # A node is computed after all of its arguments, whatever its value is made of.
    def vjp(primals: Any, cotangents: Any, outputs: Any) -> Arrays:
        return [*several(cotangents), *(mx.zeros_like(x) for x in primals[count:])]

    def vmap(arrays: Arrays, axes: Axes) -> tuple[Arrays, list[int]]:
        size = mapped_size(arrays, axes)
        xs = [x if a is not None else copies(x, size) for x, a in zip(arrays, axes)]
        return after(xs[:count], arrays[count:]), [a or 0 for a in axes[:count]]

    node: Any = Node(lambda *xs: list(xs[:count]))
    node.vjp(vjp)
    node.vmap(vmap)
    node.jvp(lambda primals, tangents: full(primals[:count], tangents[:count]))
    return node
