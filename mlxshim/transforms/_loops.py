"""Loops whose number of rounds depends on the sample.

    go, carry = cond(init), init
    while any(go):  go, carry = step(go, carry)        step freezes what has finished

Inside a vmap the value of `go` cannot be read. The loop is then one node of the trace, which holds
the functions and what they captured. Its batching rule runs one level further out, among the
batched arrays: the same loop again, whose step is mapped. Under a further vmap it becomes a node
again; outside of all of them `go` has a value, and a plain loop runs until every sample is done.
The derivatives of the node are nodes as well, whose rule differentiates the batched loop.

Semantics after `jax.lax.while_loop`; the rule is that of `_while_loop_batching_rule` there.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import mlx.core as mx

from ..core import levels, native
from ..core.custom import Flat, innermost, is_inexact, mapped, replaced
from ..core.errors import ConcretizationError, NoBatchingRule
from ..core.interception import in_place
from ..core.opaque import copies, opaque_node
from ..core.primitive import Arrays, Axes, Node
from ..core.tracers import in_trace
from . import _chunks

# Values, masks ---------------------------------------------------------------------------------


class _Local(threading.local):
    def __init__(self) -> None:
        #: For each branch or body that is being traced: which samples are in it.
        self.masks: list[mx.array] = []


_local = _Local()


def mask() -> mx.array | None:
    """Which samples are in the branch or body that is being traced; None for all."""
    return _local.masks[-1] if _local.masks else None


@contextlib.contextmanager
def masked(go: mx.array) -> Iterator[None]:
    _local.masks.append(go)
    try:
        yield
    finally:
        _local.masks.pop()


def read(x: mx.array) -> Any:
    """The value of a scalar, or None for one that has none yet: mapped, or being compiled."""
    if levels.is_abstract():
        return None
    _chunks.wait()
    try:
        # The graph stays: inside a transform evaluation would drop that of what an inner derivative
        # has returned, and the derivative around would be zero without a word.
        return native.keeping_graphs(x.item) if levels.active() else x.item()
    except ValueError as e:
        if "during function transformations" not in str(e):
            raise
        return None


def no_value(function: str, what: str) -> Exception:
    """What to raise where a value that has to be read cannot be."""
    if levels.vmaps():
        return NoBatchingRule(
            f"[{function}] {what} is mapped, in a function that MLX maps by calling it again"
        )
    return ConcretizationError(
        f"[{function}] {what} has no value: inside mx.compile, mx.vmap or eval_shape nothing has. "
        f"Call {function} outside mx.compile, or compile the functions that it calls; in the place "
        "of mx.vmap use mlxshim.vmap."
    )


# Functions that a rule calls -------------------------------------------------------------------


class Deferred:
    """A function of flat arrays, which is a node where they may be mapped.

    * `call(*arrays)` -> a list of arrays, where nothing is mapped;
    * `like(*arrays)` -> arrays like those it returns;
    * `spread(count)` -> which of `count` arguments have to be mapped for the rule;
    * `batched(level, axes)` -> the same for a batch, mapped over axis 0 of its outputs.
    """

    name: str

    def call(self, *arrays: mx.array) -> list[mx.array]:
        raise NotImplementedError

    def like(self, *arrays: mx.array) -> Sequence[mx.array]:
        raise NotImplementedError

    def spread(self, count: int) -> Sequence[bool]:
        return (True,) * count

    def batched(self, level: levels.VmapLevel, axes: tuple[int | None, ...]) -> Deferred:
        raise NotImplementedError

    def guards(self, level: levels.VmapLevel, arrays: Arrays) -> list[mx.array]:
        return []

    def __call__(self, *arrays: mx.array) -> list[mx.array]:
        level = innermost()
        return self.call(*arrays) if level is None else self.bind(level, arrays)

    def bind(self, level: levels.VmapLevel, arrays: Arrays) -> list[mx.array]:
        count = len(arrays)
        guards = self.guards(level, arrays)

        def batch(size: int, arrays: Arrays, axes: Axes) -> list[mx.array]:
            if all(a is None for a in axes[:count]):
                return [copies(x, size) for x in self(*arrays[:count])]
            full: list[mx.array] = []
            where: list[int | None] = []
            for x, axis, spread in zip(arrays, axes, self.spread(count)):
                unmapped = axis is None and not spread
                where.append(None if unmapped else 0)
                if not unmapped:
                    x = copies(x, size) if axis is None else mx.moveaxis(x, axis, 0)
                full.append(x)
            inner = levels.VmapLevel(level.axis_name, size, level.randomness)
            return self.batched(inner, tuple(where))(*full)

        def vjp(primals: Arrays, cotangents: Arrays, outputs: Arrays) -> list[mx.array]:
            pulled = Pulled(self, count)(*primals[:count], *cotangents)
            return [*pulled, *(mx.zeros_like(x) for x in guards)]

        def jvp(primals: Arrays, tangents: Arrays) -> list[mx.array]:
            return Pushed(self, count)(*primals[:count], *tangents[:count])

        node = opaque_node(lambda *xs: self.like(*xs[:count]), batch, vjp, jvp)
        return list(node(level.mapped, *arrays, *guards))


class Loop(Deferred):
    """`while any(go): go, *carry = step(go, *consts, *carry)`; the carry is what it returns.

    `step` runs where all are to go on, `frozen` keeps the carry of whoever is not.
    """

    def __init__(self, name: str, consts: int, step: Flat, frozen: Flat) -> None:
        self.name, self.consts, self.step, self.frozen = name, consts, step, frozen

    def __call__(self, *arrays: mx.array) -> list[mx.array]:
        # Even inside a vmap the predicate may be the same for all samples.
        return self.call(*arrays)

    def call(self, *arrays: mx.array) -> list[mx.array]:
        start = 1 + self.consts
        (go, *consts), carry = arrays[:start], list(arrays[start:])
        if levels.is_abstract():
            return self.frozen(go, *consts, *carry)[1:]
        while (value := read(mx.any(go))) is not None:
            if not value:
                return carry
            go, *carry = self.step(go, *consts, *carry)
            settle(go, *carry)
        level = innermost()
        if level is None:
            raise no_value(self.name, "the predicate")
        return self.bind(level, (go, *consts, *carry))

    def like(self, *arrays: mx.array) -> Sequence[mx.array]:
        return arrays[1 + self.consts :]

    def spread(self, count: int) -> Sequence[bool]:
        return (True, *(False,) * self.consts, *(True,) * (count - 1 - self.consts))

    def batched(self, level: levels.VmapLevel, axes: tuple[int | None, ...]) -> Deferred:
        def step(*arrays: mx.array) -> list[mx.array]:
            return mapped(level, self.frozen, axes, arrays)

        return Loop(self.name, self.consts, step, step)

    def guards(self, level: levels.VmapLevel, arrays: Arrays) -> list[mx.array]:
        """Arrays that depend on what the loop uses and does not know to have captured."""
        stand_ins = [mx.zeros((level.size, *x.shape), x.dtype) for x in arrays]
        probe = levels.VmapLevel(level.axis_name, level.size, level.randomness)
        with levels.abstract(), levels.as_in_rule():
            outputs = mapped(probe, self.frozen, (0,) * len(arrays), stand_ins)
        return [_guard(self.name, x) for x in outputs]


def _guard(name: str, x: mx.array) -> Any:
    """`x` as a node whose rules, reached only where it is mapped or differentiated, refuse."""

    def refuse(*_: Any) -> Any:
        raise NoBatchingRule(
            f"[{name}] a function of the loop uses an array that is neither in its arguments nor "
            "in a variable of the function around it: put it into the loop's value"
        )

    node = Node(lambda y: y)
    node.vmap(refuse)
    node.vjp(refuse)
    node.jvp(refuse)
    return node(x if is_inexact(x) else mx.stop_gradient(x))


class _Derivative(Deferred):
    """A derivative of a function of `count` arguments, in those that are inexact."""

    def __init__(self, function: Deferred, count: int) -> None:
        self.function, self.count, self.name = function, count, function.name

    def at(self, primals: Arrays) -> tuple[list[int], Flat]:
        """Which arguments are inexact, and the function of those alone."""
        at = _inexact(primals)

        def smooth(*inexact: mx.array) -> list[mx.array]:
            return self.function(*replaced(primals, at, inexact))

        return at, smooth

    def batched(self, level: levels.VmapLevel, axes: tuple[int | None, ...]) -> Deferred:
        return type(self)(self.function.batched(level, axes[: self.count]), self.count)


class Pulled(_Derivative):
    """The cotangents of a function's arguments, from (*arguments, *cotangents of its outputs)."""

    def call(self, *arrays: mx.array) -> list[mx.array]:
        primals, cotangents = arrays[: self.count], arrays[self.count :]
        at, smooth = self.at(primals)
        kept = _inexact(cotangents)

        def pulled_back(*inexact: mx.array) -> list[mx.array]:
            outputs = smooth(*inexact)
            return [outputs[i] for i in kept]

        zeros = [mx.zeros_like(x) for x in primals]
        if not at or not kept:
            return zeros
        body = levels.at_level("grad", pulled_back)
        pulled = native.vjp(body, [primals[i] for i in at], [cotangents[i] for i in kept])[1]
        return replaced(zeros, at, pulled)

    def like(self, *arrays: mx.array) -> Sequence[mx.array]:
        return arrays[: self.count]


class Pushed(_Derivative):
    """The tangents of a function's outputs, from (*arguments, *their tangents)."""

    def call(self, *arrays: mx.array) -> list[mx.array]:
        primals, tangents = arrays[: self.count], arrays[self.count :]
        at, smooth = self.at(primals)
        if not at:
            return [mx.zeros_like(x) for x in self.like(*arrays)]
        body = levels.at_level("jvp", smooth)
        pushed = native.jvp(body, [primals[i] for i in at], [tangents[i] for i in at])[1]
        return [
            t if is_inexact(x) else mx.zeros_like(x) for x, t in zip(self.like(*arrays), pushed)
        ]

    def like(self, *arrays: mx.array) -> Sequence[mx.array]:
        return self.function.like(*arrays[: self.count])


def _inexact(arrays: Arrays) -> list[int]:
    return [i for i, x in enumerate(arrays) if is_inexact(x)]


# Helpers ---------------------------------------------------------------------------------------


def settle(*arrays: mx.array) -> None:
    """Evaluate what can be: the memory of a loop is that of one round.

    In no transform: MLX runs a checkpointed function again when all levels are over, and what is
    evaluated then may be lost to a derivative.
    """
    if not in_place() and not in_trace():
        mx.eval(*arrays)
