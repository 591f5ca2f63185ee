"""Operations that nothing stands in for: a node that is mapped for certain, so its rule runs.

A node's value lies on the tape and is transformed too, and a factorisation has no decomposition
that MLX could transform. The value is therefore a placeholder of the right shape, and an input of
the vmap around is one more argument of the node: MLX cannot but call the batching rule, which
hears of the other arguments what is mapped, and calls the operation itself.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import mlx.core as mx

from ..core import levels
from ..core.opaque import copies, opaque_node
from ..core.primitive import Arrays, Axes, Node, full, several


class Opaque:
    """An operation on arrays with static (hashable, keyword) arguments.

    * `lowering(*arrays, **static)` -> a list of arrays: MLX's own call;
    * `batch(size, arrays, axes, **static)` -> a list of arrays, mapped over axis 0: called where at
      least one of the arrays is mapped;
    * `vjp(primals, cotangents, outputs, **static)` -> one cotangent for each primal;
    * `jvp(primals, tangents, outputs, **static)` -> one tangent for each output;
    * `shaped(*arrays, **static)` -> arrays of the outputs' shapes and dtypes, where the lowering is
      too long to be built for those alone.

    Without a vjp or jvp there is none: an error, as outside.
    """

    def __init__(
        self,
        name: str,
        *,
        lowering: Callable[..., list[mx.array]],
        batch: Callable[..., list[mx.array]],
        vjp: Callable[..., list[mx.array]] | None = None,
        jvp: Callable[..., list[mx.array]] | None = None,
        shaped: Callable[..., list[mx.array]] | None = None,
    ) -> None:
        self.name, self.lowering, self.batch = name, lowering, batch
        self.shaped = shaped
        self.vjp, self.jvp = vjp or self._no_derivative, jvp or self._no_derivative
        self._node = functools.lru_cache(maxsize=512)(self._build_node)
        self._plain_node = functools.lru_cache(maxsize=64)(self._build_plain_node)

    def __call__(self, *arrays: mx.array, **static: Any) -> list[mx.array]:
        vmaps = levels.vmaps()
        if not vmaps or vmaps[-1].mapped is None:
            return self.lowering(*arrays, **static)
        return self._node(**static)(vmaps[-1].mapped, *arrays)

    def differentiable(self, *arrays: mx.array, **static: Any) -> list[mx.array]:
        """Bind with no vmap around: the lowering's value, our derivatives in the place of MLX's."""
        return list(several(self._plain_node(**static)(*arrays)))

    def _build_plain_node(self, **static: Any) -> Callable[..., Any]:
        def value(*arrays: mx.array) -> list[mx.array]:
            return self.lowering(*map(mx.stop_gradient, arrays), **static)

        def vjp(primals: Arrays, cotangents: Arrays, outputs: Arrays) -> list[mx.array]:
            return self.vjp(several(primals), several(cotangents), several(outputs), **static)

        def jvp(primals: Arrays, tangents: Any) -> list[mx.array]:
            outputs = self.differentiable(*primals, **static)
            return self.jvp(primals, full(primals, tangents), outputs, **static)

        node = Node(value)
        node.vjp(vjp)
        node.jvp(jvp)
        return node

    def _build_node(self, **static: Any) -> Callable[..., Any]:
        def batch(size: int, arrays: Arrays, axes: Axes) -> list[mx.array]:
            if any(a is not None for a in axes):
                return self.batch(size, arrays, axes, **static)
            return [copies(x, size) for x in self(*arrays, **static)]

        def jvp(primals: Arrays, tangents: Arrays) -> list[mx.array]:
            return self.jvp(primals, tangents, self(*primals, **static), **static)

        return opaque_node(
            lambda *arrays: (self.shaped or self.lowering)(*arrays, **static),
            batch,
            functools.partial(self.vjp, **static),
            jvp,
        )

    def _no_derivative(self, *_: Any, **__: Any) -> list[mx.array]:
        raise ValueError(f"[{self.name}] MLX has no derivative of it.")
