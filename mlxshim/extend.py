"""Rules of your own: an operation or a custom kernel that every transform here knows.

    @mlxshim.primitive
    def swish(x, *, beta=1.0):              # the decomposition: what it means
        return x * mx.sigmoid(beta * x)

    @swish.def_lowering
    def _(x, *, beta=1.0):                  # what is called where nothing traces: a kernel
        return kernel(inputs=[x, beta], ...)[0]

    swish.def_elementwise()                 # its batching rule

    @swish.def_vjp                          # without one: that of the decomposition
    def _(primals, cotangents, outputs, *, beta=1.0): ...

Only the decomposition is needed. `mlxshim.testing.check(swish, x)` puts all of it through the
conformance suite. After HIPS/autograd's `extend.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from .core import levels, native
from .core.interception import intercept as intercept
from .core.interception import original as original
from .core.opaque import once_each
from .core.primitive import Primitive

Rule = Callable[..., Any]


class Operation:
    """A primitive as its author sees it: called like its decomposition."""

    def __init__(self, decomposition: Callable[..., Any]) -> None:
        functools.update_wrapper(self, decomposition)
        self.name: str = getattr(decomposition, "__name__", "primitive")
        self.decomposition = decomposition
        self.lowering: Rule = decomposition
        self._several = False
        self._elementwise = False
        self._primitive = Primitive(
            self.name,
            decomposition=self._list_of(lambda: self.decomposition),
            lowering=self._list_of(lambda: self.lowering),
            batch=self._batch_decomposition,
        )

    def __call__(self, *arrays: mx.array, **static: Any) -> Any:
        if self._elementwise and any(x.shape != arrays[0].shape for x in arrays):
            arrays = tuple(mx.broadcast_arrays(*arrays))
        # Outside of our vmaps a node too: MLX's own grad asks it for its vjp.
        mapped = "vmap" in levels.active()
        bind = self._primitive if mapped else self._primitive.differentiable
        out = bind(*arrays, **static)
        return out if self._several else out[0]

    def def_lowering(self, fun: Rule) -> Rule:
        """`fun(*arrays, **static)`: the call to make where no vmap traces. Its value is the
        decomposition's."""
        self.lowering = fun
        return fun

    def def_batch(self, rule: Rule) -> Rule:
        """`rule(size, arrays, axes, **static)` -> (outputs, axes), by calling the operation on
        arrays that have the mapped axis folded in.

        `axes[i]` is the mapped axis of `arrays[i]`, None where it is unmapped. One output and one
        axis, or lists of them.
        """

        def batch(size: int, arrays: Any, axes: Any, /, **static: Any) -> Any:
            outputs, out_axes = rule(size, arrays, axes, **static)
            if isinstance(outputs, mx.array):
                return [outputs], [out_axes]
            return list(outputs), list(out_axes)

        self._primitive.batch = batch
        return rule

    def def_elementwise(self) -> None:
        """The batching rule of an operation that works entry by entry.

        Its arrays are broadcast before they come to it, so that each of its rules sees arrays of
        one shape: a vjp rule has nothing to sum.
        """
        self._elementwise = True

        def batch(size: int, arrays: Any, axes: Any, /, **static: Any) -> Any:
            fronts = (x if a is None else mx.moveaxis(x, a, 0) for x, a in zip(arrays, axes))
            out = self(*fronts, **static)
            outputs = out if self._several else [out]
            return outputs, [0] * len(outputs)

        self._primitive.batch = batch

    def def_vjp(self, rule: Rule) -> Rule:
        """`rule(primals, cotangents, outputs, **static)` -> one cotangent for each primal.

        What it calls must be MLX operations or primitives: it is itself mapped under vmap(grad).
        """

        def vjp(primals: Any, cotangents: Any, outputs: Any, /, **static: Any) -> list[mx.array]:
            found = rule(primals, cotangents, outputs, **static)
            return [found] if isinstance(found, mx.array) else list(found)

        self._primitive.vjp = vjp
        return rule

    def _list_of(self, function: Callable[[], Rule]) -> Callable[..., list[mx.array]]:
        def listed(*arrays: mx.array, **static: Any) -> list[mx.array]:
            out = function()(*arrays, **static)
            self._several = not isinstance(out, mx.array)
            return list(out) if self._several else [out]

        return listed

    def _batch_decomposition(
        self, size: int, arrays: Sequence[mx.array], axes: Sequence[Any], /, **static: Any
    ) -> tuple[list[mx.array], list[int]]:
        listed = functools.partial(self._primitive.decomposition, **static)
        # MLX takes a tuple of axes only for several arguments.
        spec: Any = tuple(axes) if len(axes) > 1 else axes[0]
        first = next(i for i, axis in enumerate(axes) if axis is not None)
        mapped = native.vmap(lambda *xs: once_each(listed(*xs), xs[first]), in_axes=spec)
        outputs: Any = mapped(*arrays)
        return list(outputs), [0] * len(outputs)


def primitive(decomposition: Callable[..., Any]) -> Operation:
    """Make a function of arrays (by position) and static values (by keyword) a primitive.

    Args:
        decomposition: The operation written in MLX operations. It returns an array or several.
            Keyword arguments must be hashable.

    Returns:
        An `Operation`, called like the function, with `def_lowering`, `def_batch`,
        `def_elementwise` and `def_vjp` to give it rules. Without a batching rule its decomposition
        is mapped, without a vjp rule its decomposition is differentiated.

    Raises:
        TypeError: by a call with a keyword argument that is not hashable.

    Example:
        >>> import mlx.core as mx
        >>> import mlxshim
        >>> @mlxshim.primitive
        ... def cube(x):
        ...     return x * x * x
        >>> @cube.def_vjp
        ... def _(primals, cotangents, outputs):
        ...     return [3 * primals[0] ** 2 * cotangents[0]]
        >>> cube.def_elementwise()
        >>> mlxshim.vmap(mlxshim.grad(cube))(mx.array([1.0, 2.0]))
        array([3, 12], dtype=float32)
    """
    return Operation(decomposition)
