"""What steers a computation: checkpoint, custom functions, depends, eval.

* `mx.checkpoint`: its backward pass recomputes from inputs that wait for its outputs, by a node
  that has no batching rule. Here the wait is a primitive, and the recomputation a rule that is
  mapped with the rest. Its tangent takes arguments without one for constants, and derivatives of
  the tangent are wrong: where the innermost level is a jvp the rule takes its place too.
* `mx.custom_function`: under `grad(vmap(f))` MLX maps the function and forgets its derivative.
  Here the mapped function has the mapped derivative.
* `mx.depends`: the mapped inputs wait for the mapped dependencies.

Source: mlx/transforms.cpp (`custom_function`, `checkpoint`), mlx/primitives.cpp (`Depends`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import mlx.core as mx

from ..core import compilation, custom, levels, trees
from ..core.custom import depends
from ..core.interception import intercept, original
from ..core.primitive import Arrays
from ..core.replay import captured_containers, exchange, same_draws, unchanged

# Depends ---------------------------------------------------------------------------------------


@intercept(mx, "depends")
def _call_depends(inputs: Any, dependencies: Any) -> Any:
    if "vmap" not in levels.active():
        return original(mx, "depends")(inputs, dependencies)
    single = isinstance(inputs, mx.array)
    first = [inputs] if single else list(inputs)
    rest = [dependencies] if isinstance(dependencies, mx.array) else list(dependencies)
    if not first:
        return original(mx, "depends")(inputs, dependencies)
    outputs = depends(*first, *rest, count=len(first))
    return outputs[0] if single else outputs


# Functions with a derivative of their own ------------------------------------------------------


_here = object()


class _Call:
    """A call with trees of arguments and a tree of outputs, as a function of flat arrays."""

    def __init__(self, fun: Callable[..., Any], args: Any, kwargs: Any) -> None:
        self.fun, self.tree = fun, [args, kwargs]
        self.arrays = [x for _, x in trees.leaves(self.tree) if isinstance(x, mx.array)]
        self.outputs: Any = None
        #: A function of arrays that returns a list of them; what it draws, it draws again.
        self.flat = same_draws(self._flat)
        self.containers = captured_containers(fun)

    def again(self, *arrays: mx.array) -> list[mx.array]:
        """A run that leaves nothing behind."""
        with unchanged(self.containers):
            return self.flat(*arrays)

    def _flat(self, *arrays: mx.array) -> list[mx.array]:
        rest = iter(arrays)
        args, kwargs = trees.map_leaves(
            lambda leaf: next(rest) if isinstance(leaf, mx.array) else leaf, self.tree
        )
        outputs = self.fun(*args, **kwargs)
        # Their form alone: the arrays lead to the node, and the node to this call.
        self.outputs = trees.map_leaves(
            lambda leaf: _here if isinstance(leaf, mx.array) else leaf, outputs
        )
        return [x for _, x in trees.leaves(outputs) if isinstance(x, mx.array)]

    def by(self, pull: custom.Pull, level: levels.VmapLevel | None) -> Any:
        """What the function returns, in the tree of its outputs, differentiated by rules."""
        # MLX gives what such a function has captured no derivative.
        given = [mx.stop_gradient(x) for x in self.arrays]
        outputs = self.flat(*given)
        # What it keeps of its arguments has a derivative as before.
        exchange(self.containers, {id(x): y for x, y in zip(given, self.arrays)})
        rules = custom.Custom(pull, functools.partial(custom.pushed, self.again))
        watched: list[mx.array] = []
        if level is not None and custom.differentiated_from_outside():
            with unchanged(self.containers):
                watched = custom.hidden(level, self._flat, self.arrays)
        results = iter(rules.bind(self.arrays, list(map(mx.stop_gradient, outputs)), watched))
        return trees.map_leaves(lambda leaf: next(results) if leaf is _here else leaf, self.outputs)


@intercept(mx, "checkpoint", patched=True)
def checkpoint(fun: Callable[..., Any]) -> Callable[..., Any]:
    native = original(mx, "checkpoint")(fun)

    # Bare like MLX's own, which has no name or signature either.
    def checkpointed(*args: Any, **kwargs: Any) -> Any:
        level = custom.innermost()
        if level is None and levels.active()[-1:] != ["jvp"]:
            return native(*args, **kwargs)
        if "grad" not in levels.active():
            return fun(*args, **kwargs)  # nothing will be recomputed
        call = _Call(fun, args, kwargs)

        def recompute(primals: Arrays, cotangents: Arrays, outputs: Arrays) -> list[mx.array]:
            waiting = custom.wait(primals, [*cotangents, *outputs])
            return custom.pulled(call.again, waiting, cotangents)

        return call.by(recompute, level)

    return checkpointed


@intercept(mx.custom_function, "__call__")
def custom_function(self: Any, *args: Any, **kwargs: Any) -> Any:
    native = original(mx.custom_function, "__call__")
    level = custom.innermost()
    if level is None or not custom.differentiated_from_outside():
        return native(self, *args, **kwargs)
    call = _Call(functools.partial(native, self), args, kwargs)
    return call.by(lambda p, c, _: custom.pulled(call.again, p, c), level)


# The switch of compilation -----------------------------------------------------------------------


@intercept(mx, "disable_compile", outside=True)
def disable_compile() -> None:
    compilation.want(False)


@intercept(mx, "enable_compile", outside=True)
def enable_compile() -> None:
    compilation.want(True)
