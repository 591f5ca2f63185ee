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

from . import levels

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
        # Building a custom_function costs more than calling it; its closures depend on nothing
        # but the static arguments.
        self._node = functools.lru_cache(maxsize=512)(self._build_node)

    def __call__(self, *arrays: mx.array, **static: Any) -> list[mx.array]:
        """Bind: a node of the trace under a vmap level, the lowering outside."""
        if "vmap" not in levels.active():
            return self.lowering(*arrays, **static)
        return self._node(True, **static)(*arrays)

    def differentiable(self, *arrays: mx.array, **static: Any) -> list[mx.array]:
        """Bind for plain reverse mode, with no vmap around: the lowering's value, our vjp rule."""
        return self._node(False, **static)(*arrays)

    def _build_node(self, batched: bool, **static: Any) -> Callable[..., Any]:
        value = self.decomposition if batched else self.lowering

        def vjp(primals: Arrays, cotangents: Arrays, outputs: Arrays) -> list[mx.array]:
            return self.vjp(_tuple(primals), _tuple(cotangents), _tuple(outputs), **static)

        def jvp(primals: Arrays, tangents: Sequence[mx.array | None]) -> list[mx.array]:
            return self.jvp(_tuple(primals), _tuple(tangents), **static)

        def vmap(arrays: Arrays, axes: Axes) -> tuple[list[mx.array], list[int]]:
            arrays, axes = _tuple(arrays), _tuple(axes)
            size = next(x.shape[a] for x, a in zip(arrays, axes) if a is not None)
            return self.batch(size, arrays, axes, **static)

        node = Node(lambda *xs: value(*xs, **static))
        node.vjp(vjp)
        node.jvp(jvp)
        node.vmap(vmap)
        return node

    def _vjp_of_decomposition(
        self, primals: Arrays, cotangents: Arrays, outputs: Arrays, **static: Any
    ) -> list[mx.array]:
        def fun(*xs: mx.array) -> list[mx.array]:
            return self.decomposition(*xs, **static)

        return mx.vjp(fun, list(primals), list(cotangents))[1]

    def _jvp_of_decomposition(
        self, primals: Arrays, tangents: Sequence[mx.array | None], **static: Any
    ) -> list[mx.array]:
        active = [i for i, t in enumerate(tangents) if t is not None]

        def fun(*xs: mx.array) -> list[mx.array]:
            full = list(primals)
            for i, x in zip(active, xs):
                full[i] = x
            return self.decomposition(*full, **static)

        return mx.jvp(fun, [primals[i] for i in active], [tangents[i] for i in active])[1]  # pyright: ignore


def _tuple(arrays: Any) -> tuple[Any, ...]:
    # custom_function hands over a lone argument bare.
    return tuple(arrays) if isinstance(arrays, (tuple, list)) else (arrays,)
