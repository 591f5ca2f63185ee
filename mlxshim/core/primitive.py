"""A primitive: one operation with its decomposition, lowering, batching rule and vjp rule.

`mx.custom_function` gives MLX's tracer a node that carries our rules. The value such a node is
built with is itself an input of the node: it lies on the tape and is transformed too. Inside a
trace that value is therefore the *decomposition* (plain MLX operations whose own transforms are
right), and the *lowering* (MLX's fused operation) is called only by a rule at the outermost level,
where nothing traces it any more.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from . import levels, native
from .plans import Noted, Plan, placeholder

Arrays = Sequence[mx.array]
Axes = Sequence["int | None"]


class Node(mx.custom_function):
    """MLX's, told apart from those that users make: a call of this one is not intercepted."""

    __call__ = mx.custom_function.__call__

    def vmap(self, f: Callable[..., Any]) -> Any:
        return super().vmap(levels.further_out(f))


class Primitive:
    """An operation on arrays with static (hashable, keyword) arguments.

    Each of its functions takes the arrays by position and the static arguments by keyword:

    * `decomposition(*arrays, **static)` -> a list of arrays;
    * `lowering(*arrays, **static)` -> a list of arrays: the call to make outside every trace;
    * `batch(size, arrays, axes, **static)` -> (arrays, axes): `axes[i]` is the mapped axis of
      `arrays[i]`, None where it is unmapped, and `size` the length of the mapped axis;
    * `vjp(primals, cotangents, outputs, **static)` -> one cotangent for each primal;
    * `jvp(primals, tangents, **static)` -> one tangent for each output; a tangent of None is zero.

    Without a vjp or jvp rule the derivative is that of the decomposition.
    """

    def __init__(
        self,
        name: str,
        *,
        decomposition: Callable[..., list[mx.array]],
        lowering: Callable[..., list[mx.array]],
        batch: Callable[..., tuple[list[mx.array], list[int]]],
        vjp: Callable[..., list[mx.array]] | None = None,
        jvp: Callable[..., list[mx.array]] | None = None,
    ) -> None:
        self.name = name
        self.decomposition = decomposition
        self.lowering = lowering
        self.batch = batch
        self.vjp = vjp or self._vjp_of_decomposition
        self.jvp = jvp or self._jvp_of_decomposition
        # Kept: the closures of a custom_function depend on nothing but the static arguments.
        self._node = functools.lru_cache(maxsize=512)(self._build_node)

    def __call__(self, *arrays: mx.array, **static: Any) -> list[mx.array]:
        """Bind: a node of the trace under a vmap level, the lowering outside."""
        if "vmap" not in levels.active():
            return self.lowering(*arrays, **static)
        node = self._node(True, **static)
        level = levels.vmaps()[-1]
        plan, mapped = level.plan, level.mapped
        if plan is None or mapped is None:
            return node(*arrays)
        number = level.calls
        level.calls = number + 1
        noted = plan.noted.get(number)
        if noted is not None and noted.form is node and noted.is_like(arrays):
            level.used = noted
            return noted.node(mapped, *arrays)
        if noted is None and plan.learns and number not in plan.noted:
            return self._noting(node, plan, number, arrays, static)(*arrays)
        return node(*arrays)

    @staticmethod
    def again(asked: Any, *arrays: mx.array) -> list[mx.array] | None:
        """The outputs of a call of whatever primitive, if an earlier trace came to it here.

        `asked` is all that decides, beside the shapes and dtypes of the arrays, which primitive is
        called with which static arguments: equal words, the same call, and nothing to find out.
        """
        level = levels.vmaps()[-1]
        plan, mapped, number = level.plan, level.mapped, level.calls
        level.used = None
        if plan is None or mapped is None:
            return None
        noted = plan.noted.get(number)
        if noted is None or noted.asked != asked or not noted.is_like(arrays):
            return None
        level.calls = number + 1
        return noted.node(mapped, *arrays)

    @staticmethod
    def asked(asked: Any) -> None:
        """Said after a call of a primitive, on the very arrays that `again` was asked with."""
        level = levels.vmaps()[-1]
        if level.used is not None:
            level.used.asked = asked

    def differentiable(self, *arrays: mx.array, **static: Any) -> list[mx.array]:
        """Bind for plain reverse mode, with no vmap around: the lowering's value, our vjp rule."""
        return self._node(False, **static)(*arrays)

    def _build_node(
        self,
        batched: bool,
        /,
        value_: Callable[..., list[mx.array]] | None = None,
        batch_: Callable[..., tuple[list[mx.array], list[int]]] | None = None,
        **static: Any,
    ) -> Callable[..., Any]:
        def lowered(*arrays: mx.array) -> list[mx.array]:
            # The derivatives are the node's: MLX need not look for others, which may be missing.
            return self.lowering(*(mx.stop_gradient(x) for x in arrays), **static)

        fun = value_ or (functools.partial(self.decomposition, **static) if batched else lowered)

        def vjp(primals: Arrays, cotangents: Arrays, outputs: Arrays) -> list[mx.array]:
            return self.vjp(several(primals), several(cotangents), several(outputs), **static)

        def jvp(primals: Arrays, tangents: Sequence[mx.array | None]) -> list[mx.array]:
            return self.jvp(several(primals), several(tangents), **static)

        def vmap(arrays: Arrays, axes: Axes) -> tuple[list[mx.array], list[int]]:
            arrays, axes = several(arrays), several(axes)
            size = mapped_size(arrays, axes)
            return (batch_ or self.batch)(size, arrays, axes, **static)

        return _node(fun, vjp, jvp, vmap)

    def _noting(
        self, form: Any, plan: Plan, number: int, arrays: Arrays, static: dict[str, Any]
    ) -> Callable[..., Any]:
        """The node that a call gets, noting in the plan if it turns out to be mapped."""
        outputs: list[mx.array] = []

        def value(*xs: mx.array) -> list[mx.array]:
            outputs[:] = self.decomposition(*xs, **static)
            return outputs

        def batched(size: int, xs: Arrays, axes: Axes, /, **static: Any) -> Any:
            shapes = [(x.shape, x.dtype) for x in outputs]
            node = self._placed(plan, number, shapes, static)
            plan.noted[number] = Noted(form, arrays, node)
            return self.batch(size, xs, axes, **static)

        return self._build_node(True, value_=value, batch_=batched, **static)

    def _placed(
        self,
        plan: Plan,
        number: int,
        shapes: list[tuple[tuple[int, ...], mx.Dtype]],
        static: dict[str, Any],
    ) -> Callable[..., Any]:
        """A node of (a tracer that is mapped for certain, *arrays), with a value of no meaning."""

        outputs = [placeholder(*shape) for shape in shapes]

        def value(*_: mx.array) -> list[mx.array]:
            return outputs

        def vjp(primals: Arrays, cotangents: Arrays, outputs: Arrays) -> list[mx.array]:
            mapped, *xs = primals
            grads = self.vjp(tuple(xs), several(cotangents), several(outputs), **static)
            return [placeholder(mapped.shape, mapped.dtype), *grads]

        def jvp(primals: Arrays, tangents: Sequence[mx.array | None]) -> list[mx.array]:
            return self.jvp(tuple(primals[1:]), tuple(tangents[1:]), **static)

        def vmap(
            arrays: tuple[mx.array, ...], axes: tuple[int | None, ...]
        ) -> tuple[list[mx.array], list[int]]:
            size = arrays[0].shape[axes[0]]  # pyright: ignore
            arrays, axes = arrays[1:], axes[1:]
            if axes.count(None) < len(axes):
                return self.batch(size, arrays, axes, **static)
            plan.noted[number] = None
            outputs = self(*arrays, **static)
            return [mx.broadcast_to(x, (size, *x.shape)) for x in outputs], [0] * len(outputs)

        return _node(value, vjp, jvp, vmap)

    def _vjp_of_decomposition(
        self, primals: Arrays, cotangents: Arrays, outputs: Arrays, /, **static: Any
    ) -> list[mx.array]:
        def fun(*xs: mx.array) -> list[mx.array]:
            return self.decomposition(*xs, **static)

        return native.vjp(fun, list(primals), list(cotangents))[1]

    def _jvp_of_decomposition(
        self, primals: Arrays, tangents: Sequence[mx.array | None], /, **static: Any
    ) -> list[mx.array]:
        active = [i for i, t in enumerate(tangents) if t is not None]

        def fun(*xs: mx.array) -> list[mx.array]:
            full = list(primals)
            for i, x in zip(active, xs):
                full[i] = x
            return self.decomposition(*full, **static)

        return native.jvp(fun, [primals[i] for i in active], [tangents[i] for i in active])[1]  # pyright: ignore


def _node(
    value: Callable[..., Any],
    vjp: Callable[..., Any],
    jvp: Callable[..., Any],
    vmap: Callable[..., Any],
) -> Callable[..., Any]:
    node = Node(value)
    node.vjp(vjp)
    node.jvp(jvp)
    node.vmap(vmap)
    return node


def several(arrays: Any) -> tuple[Any, ...]:
    # custom_function hands over a lone argument bare.
    return tuple(arrays) if isinstance(arrays, (tuple, list)) else (arrays,)


def full(primals: Arrays, tangents: Sequence[mx.array | None]) -> list[mx.array]:
    """The tangents with zeros for None."""
    return [mx.zeros_like(x) if t is None else t for x, t in zip(primals, tangents)]


def mapped_size(arrays: Arrays, axes: Axes) -> int:
    return next(x.shape[a] for x, a in zip(arrays, axes) if a is not None)
