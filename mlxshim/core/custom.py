"""A function whose derivatives are rules of their own, under every transform.

The function runs as it is written, on constants; a node around it holds the rules:

    y = fun(stop_gradient(x))            mapped, drawn, read as anything else in the trace
    z = node(x, y)                       z is y

    vjp:  x takes pull(x, cotangents, z)    jvp:  z takes push(x, tangents)
    vmap: the node of the mapped rules around the mapped x and y

The value is not built twice, and no level of a further vmap sees more than the rules. They run
later than the function, one level further out under a vmap: every array that they use is in x.

JAX differentiates innermost first, by the rule; a derivative further out sees what the rule is
made of. MLX's graph has no levels, but an inner derivative is complete before an outer one begins:
the first derivative of a node is by its rule, later ones are of the function `again`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from . import levels, native
from .errors import NoBatchingRule, no_rule
from .interception import intercepted, original
from .opaque import copies, in_front, once_each
from .primitive import Arrays, Axes, Node, Primitive, mapped_size, several
from .tangents import tied, tying

Flat = Callable[..., list[mx.array]]
Pull = Callable[[Arrays, Arrays, Arrays], list[mx.array]]
Tangents = Sequence[mx.array | None]  # None where a primal has none
Push = Callable[[Arrays, Tangents], list[mx.array]]


class Custom:
    """The rules of one call, on flat arrays.

    * `pull(primals, cotangents, outputs)` -> one cotangent for each primal;
    * `push(primals, tangents)` -> one tangent for each output;
    * `again(*primals)` -> the outputs, as a derivative further out sees them; None for the rules.
    """

    def __init__(self, pull: Pull, push: Push, again: Flat | None = None) -> None:
        self.pull, self.push, self.again = pull, push, again
        self.used = False

    def bind(self, primals: Arrays, outputs: Arrays, watched: Arrays = ()) -> Sequence[mx.array]:
        """`outputs` with these rules; what is `watched` is an input that no rule sees."""
        if not outputs:  # MLX has no node without one
            return []
        count, end = len(primals), len(primals) + len(outputs)
        level = innermost()
        name, randomness = (
            (None, "different") if level is None else (level.axis_name, level.randomness)
        )

        def vjp(inputs: Arrays, cotangents: Any, values: Any) -> list[mx.array]:
            inputs = several(inputs)
            pulled = self._pulled(inputs[:count], several(cotangents), several(values))
            return [*pulled, *(mx.zeros_like(x) for x in inputs[count:])]

        def jvp(inputs: Arrays, tangents: Any) -> list[mx.array]:
            inputs = several(inputs)
            return self._pushed(inputs[:count], several(tangents)[:count])

        @intercepted
        def vmap(inputs: Arrays, axes: Axes) -> tuple[list[mx.array], list[int]]:
            inputs, axes = several(inputs), several(axes)
            size = mapped_size(inputs, axes)
            fronts = in_front(size, inputs[count:end], axes[count:end])
            inner = levels.VmapLevel(name, size, randomness)
            batched = self.batched(inner, axes[:count])
            return list(batched.bind(inputs[:count], fronts)), [0] * len(fronts)

        node: Any = Node(lambda *xs: list(xs[count:end]))
        node.vjp(vjp)
        node.jvp(jvp)
        node.vmap(vmap)
        return node(*primals, *outputs, *watched)

    @intercepted
    def _pulled(self, primals: Arrays, cotangents: Arrays, outputs: Arrays) -> list[mx.array]:
        used, self.used = self.used, True
        if used and self.again is not None:
            return pulled(self.again, primals, cotangents)
        return self.pull(primals, cotangents, outputs)

    @intercepted
    def _pushed(self, primals: Arrays, tangents: Tangents) -> list[mx.array]:
        used, self.used = self.used, True
        if used and self.again is not None:
            return pushed(self.again, primals, tangents)
        return self.push(primals, tangents)

    def batched(self, level: levels.VmapLevel, axes: tuple[int | None, ...]) -> Custom:
        """The rules for a batch, mapped over axis 0 of every output."""
        count = len(axes)

        def pull(primals: Arrays, cotangents: Arrays, outputs: Arrays) -> list[mx.array]:
            def one(*arrays: mx.array) -> list[mx.array]:
                middle = count + len(cotangents)
                return self.pull(arrays[:count], arrays[count:middle], arrays[middle:])

            arrays = (*primals, *cotangents, *outputs)
            grads = mapped(level, one, (*axes, *(0,) * (len(arrays) - count)), arrays)
            # Samples share an unmapped primal, whose gradient is then the sum of theirs.
            return [
                mx.moveaxis(g, 0, axis)
                if axis is not None
                else mx.sum(g, axis=0)
                if is_inexact(x)
                else mx.zeros_like(x)
                for x, g, axis in zip(primals, grads, axes)
            ]

        def push(primals: Arrays, tangents: Tangents) -> list[mx.array]:
            along = {i: t for i, t in enumerate(tangents) if t is not None}

            def one(*arrays: mx.array) -> list[mx.array]:
                some = dict(zip(along, arrays[count:]))
                return self.push(arrays[:count], [some.get(i) for i in range(count)])

            arrays = (*primals, *along.values())
            return mapped(level, one, (*axes, *(axes[i] for i in along)), arrays)

        def again(*primals: mx.array) -> list[mx.array]:
            assert self.again is not None
            return mapped(level, self.again, axes, primals)

        batched = Custom(pull, push, None if self.again is None else again)
        batched.used = self.used
        return batched


# What a rule can be made of --------------------------------------------------------------------


def pulled(fun: Flat, primals: Arrays, cotangents: Arrays) -> list[mx.array]:
    """The cotangents of the primals that can have one, zeros for the others."""
    at = [i for i, x in enumerate(primals) if is_inexact(x)]
    kept = [i for i, c in enumerate(cotangents) if is_inexact(c)]

    def of_inexact(*arrays: mx.array) -> list[mx.array]:
        outputs = fun(*replaced(primals, at, arrays))
        # MLX gives an output that is a stop_gradient no cotangent, and the next one that of this.
        return [mx.expand_dims(outputs[i], 0) for i in kept]

    zeros = [mx.zeros_like(x) for x in primals]
    if not at or not kept:
        return zeros
    seeds = [mx.expand_dims(cotangents[i], 0) for i in kept]
    body = levels.at_level("grad", of_inexact)
    return replaced(zeros, at, native.vjp(body, [primals[i] for i in at], seeds)[1])


def pushed(fun: Flat, primals: Arrays, tangents: Tangents) -> list[mx.array]:
    """The tangents of the outputs that can have one, zeros for the others.

    What has no tangent is a constant: the derivative further out, of an operation's tangent along
    zeros, may be refused.
    """
    along = {i: t for i, t in enumerate(tangents) if t is not None and is_inexact(primals[i])}
    at = list(along)

    def of_inexact(*arrays: mx.array) -> list[mx.array]:
        return fun(*replaced(primals, at, arrays))

    if not at:
        return [mx.zeros_like(y) for y in fun(*primals)]
    body = levels.at_level("jvp", of_inexact)
    given = tied(list(along.values()))
    outputs, found = native.jvp(body, [primals[i] for i in at], list(given))
    return [t if is_inexact(y) else mx.zeros_like(y) for y, t in zip(outputs, found)]


def wait(arrays: Arrays, others: Arrays) -> list[mx.array]:
    """`arrays`, which will not be computed with before the others are there."""
    if not arrays or not others:
        return list(arrays)
    bind = depends if "vmap" in levels.active() else depends.differentiable
    return bind(*arrays, *others, count=len(arrays))


def _depends(*arrays: mx.array, count: int) -> list[mx.array]:
    return original(mx, "depends")(list(arrays[:count]), list(arrays[count:]))


def _depends_batch(
    size: int, arrays: Arrays, axes: Axes, count: int
) -> tuple[list[mx.array], list[int]]:
    # An output of a mapped node is mapped.
    inputs = [x if a is not None else copies(x, size) for x, a in zip(arrays, axes)][:count]
    return depends(*inputs, *arrays[count:], count=count), [a or 0 for a in axes[:count]]


def _depends_vjp(
    primals: Arrays, cotangents: Arrays, outputs: Arrays, count: int
) -> list[mx.array]:
    return [*cotangents, *(mx.zeros_like(x) for x in primals[count:])]


#: Source: mlx/primitives.cpp, `Depends`, which has no jvp and no batching rule.
depends = Primitive(
    "depends",
    decomposition=lambda *arrays, count: list(arrays[:count]),
    lowering=_depends,
    batch=_depends_batch,
    vjp=_depends_vjp,
)


def refusing(
    arrays: Arrays,
    derivative: Callable[[], Exception] | None = None,
    mapped: Callable[[], Exception] | None = None,
) -> list[mx.array]:
    """`arrays`, which raise where they are differentiated or mapped."""
    at = (
        [i for i, x in enumerate(arrays) if is_inexact(x)] if mapped is None else range(len(arrays))
    )
    if not at:
        return list(arrays)

    def refuse(*_: Any) -> Any:
        assert derivative is not None
        raise derivative()

    def vmap(xs: Any, axes: Any) -> Any:
        if mapped is not None:
            raise mapped()
        xs, axes = several(xs), several(axes)
        fronts = in_front(mapped_size(xs, axes), xs, axes)
        return refusing(fronts, derivative), [0] * len(fronts)

    node: Any = Node(lambda *xs: list(xs))
    node.vmap(vmap)
    if derivative is not None:
        node.vjp(refuse)
        node.jvp(refuse)
    return replaced(arrays, at, list(node(*(arrays[i] for i in at))))


# Helpers ---------------------------------------------------------------------------------------


def innermost() -> levels.VmapLevel | None:
    """The vmap that is being traced, if one is."""
    vmaps = levels.vmaps()
    return vmaps[-1] if vmaps and vmaps[-1].mapped is not None else None


def differentiated_from_outside() -> bool:
    """Whether a derivative will be taken of the result of the innermost vmap."""
    stack = levels.active()
    return any(kind != "vmap" for kind in stack[: len(stack) - 1 - stack[::-1].index("vmap")])


def mapped(
    level: levels.VmapLevel, fun: Flat, axes: tuple[int | None, ...], arrays: Arrays
) -> list[mx.array]:
    """`fun` over the samples of `level`; outputs are mapped over axis 0."""
    first = next((i for i, a in enumerate(axes) if a is not None), None)
    if first is None:
        return [copies(y, level.size) for y in fun(*arrays)]
    body, through = levels.at_vmap(level, fun), False

    def run(*xs: mx.array) -> list[mx.array]:
        nonlocal through
        outputs = once_each(body(xs[first], *xs), xs[first])
        through = True
        return outputs

    in_axes: Any = axes if len(axes) > 1 else axes[first]
    try:
        return tying(level, lambda: list(native.vmap(run, in_axes)(*arrays)))
    except Exception as e:
        if not through or isinstance(e, (NoBatchingRule, TypeError)):
            raise
        # It fails while a function is traced, and is a matter of a rule all the same.
        raise NoBatchingRule(no_rule(str(e))) from e


def shaped(fun: Flat, arrays: Arrays) -> list[mx.array]:
    """Arrays with the shapes and dtypes of what `fun` returns; none of its values can be read."""
    found: list[mx.array] = []

    def probe(x: mx.array, *arrays: mx.array) -> mx.array:
        found.extend(mx.zeros(y.shape, y.dtype) for y in fun(*arrays))
        return x

    body = levels.at_vmap(levels.VmapLevel(None, 1, "same"), probe)
    stand_ins = [mx.zeros((1, *x.shape), x.dtype) for x in arrays]
    with levels.abstract():
        one = mx.zeros((1,))
        native.vmap(lambda *xs: body(xs[0], *xs), (0,) * (len(stand_ins) + 1))(one, *stand_ins)
    return found


def hidden(level: levels.VmapLevel, fun: Flat, arrays: Arrays) -> list[mx.array]:
    """Arrays that depend on whatever `fun` uses besides its arguments, inside the vmap `level`."""
    stand_ins = [mx.zeros((level.size, *x.shape), x.dtype) for x in arrays]
    probe = levels.VmapLevel(level.axis_name, level.size, level.randomness)
    with levels.abstract(), levels.as_in_rule():
        outputs = mapped(probe, fun, (0,) * len(arrays), stand_ins)
    return refusing([mx.stop_gradient(x) for x in outputs], mapped=_captured)


def _captured() -> Exception:
    return NoBatchingRule(
        "a function with a derivative of its own uses a mapped array that is neither an argument "
        "nor in a variable of the function around it: pass it as an argument"
    )


def is_inexact(x: mx.array) -> bool:
    return mx.issubdtype(x.dtype, mx.inexact)


def replaced(arrays: Arrays, at: Sequence[int], by: Arrays) -> list[mx.array]:
    changed = list(arrays)
    for i, x in zip(at, by):
        changed[i] = x
    return changed
