"""What steers a computation: checkpoint, custom functions, depends, eval.

* `mx.checkpoint`: its backward pass recomputes from inputs that wait for its outputs, by a node
  that has no batching rule. Here the backward pass is a node of its own, whose rule lets the
  batched inputs wait, the unmapped ones as they are, and maps the recomputation.
* `mx.custom_function`: under `grad(vmap(f))` MLX maps the function and forgets its derivative.
  Here the mapped function has the mapped derivative.
* `mx.depends`: the mapped inputs wait for the mapped dependencies.
* `mx.eval` of a mapped array is a hint that has no meaning yet.

Source: mlx/transforms.cpp (`custom_function`, `checkpoint`), mlx/primitives.cpp (`Depends`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from ..core import compilation, levels, native, trees
from ..core.interception import intercept, original
from ..core.primitive import Arrays, Axes, Node, Primitive
from ._opaque import copies, opaque_node

Flat = Callable[..., list[mx.array]]


# Depends ---------------------------------------------------------------------------------------


def _wait(*arrays: mx.array, count: int) -> list[mx.array]:
    return original(mx, "depends")(list(arrays[:count]), list(arrays[count:]))


def _wait_batch(
    size: int, arrays: Arrays, axes: Axes, count: int
) -> tuple[list[mx.array], list[int]]:
    # An output of a mapped node is mapped.
    inputs = [x if a is not None else copies(x, size) for x, a in zip(arrays, axes)][:count]
    return depends(*inputs, *arrays[count:], count=count), [a or 0 for a in axes[:count]]


def _wait_vjp(primals: Arrays, cotangents: Arrays, outputs: Arrays, count: int) -> list[mx.array]:
    return [*cotangents, *(mx.zeros_like(x) for x in primals[count:])]


depends = Primitive(
    "depends",
    decomposition=lambda *arrays, count: list(arrays[:count]),
    lowering=_wait,
    batch=_wait_batch,
    vjp=_wait_vjp,
)


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


class _Function:
    """A function of arrays, how to pull cotangents back, and how to push tangents forward.

    * `call(*arrays)` -> a list of arrays;
    * `pull(primals, cotangents, outputs)` -> one cotangent for each primal;
    * `push(primals, tangents)` -> one tangent for each output;
    * of its arguments, the first `waiting` are let wait for the others.
    """

    def __init__(
        self,
        call: Flat,
        pull: Callable[[Arrays, Arrays, Arrays], list[mx.array]] | None = None,
        push: Callable[[Arrays, Arrays], list[mx.array]] | None = None,
        waiting: int = 0,
    ) -> None:
        self.call = call
        self.pull = pull or functools.partial(_vjp, call)
        self.push = push or functools.partial(_jvp, call)
        self.waiting = waiting

    def __call__(self, *arrays: mx.array) -> list[mx.array]:
        vmaps = levels.vmaps()
        if vmaps and vmaps[-1].mapped is not None:
            return self._mapped(vmaps[-1], arrays)
        if self.waiting:
            arrays = (*_wait(*arrays, count=self.waiting), *arrays[self.waiting :])
        if not levels.active():
            return self.call(*arrays)
        node: Any = Node(lambda *xs: self.call(*xs))
        node.vjp(lambda p, c, o: self.pull(_several(p), _several(c), _several(o)))
        node.jvp(lambda p, t: self.push(_several(p), _full(_several(p), _several(t))))
        return node(*arrays)

    def _mapped(self, level: levels.VmapLevel, arrays: Arrays) -> list[mx.array]:
        mapped, level.mapped = level.mapped, mx.array(0)
        try:
            shaped = self.call(*(mx.zeros(x.shape, x.dtype) for x in arrays))
        finally:
            level.mapped = mapped
        # They depend on no argument: what maps them was captured, and escapes when a rule runs.
        captured = [_unmapped(x) for x in shaped]

        def batch(size: int, arrays: Arrays, axes: Axes) -> list[mx.array]:
            arrays, axes = arrays[: len(arrays) - len(shaped)], axes[: len(axes) - len(shaped)]
            if all(a is None for a in axes):
                return [copies(x, size) for x in self(*arrays)]
            inner = levels.VmapLevel(level.axis_name, size, level.randomness)
            return self._batched(inner, tuple(axes))(*arrays)

        def vjp(primals: Arrays, cotangents: Arrays, outputs: Arrays) -> list[mx.array]:
            pulled = self.pull(primals[: -len(shaped)], cotangents, outputs)
            return [*pulled, *(mx.zeros_like(x) for x in shaped)]

        def jvp(primals: Arrays, tangents: Arrays) -> list[mx.array]:
            return self.push(primals[: -len(shaped)], tangents[: -len(shaped)])

        node = opaque_node(lambda *_: shaped, batch, vjp, jvp)
        return node(mapped, *arrays, *captured)

    def _batched(self, level: levels.VmapLevel, axes: tuple[int | None, ...]) -> _Function:
        """The same for a batch: mapped over axis 0 of every output, and with mapped derivatives."""
        count = len(axes)

        def call(*arrays: mx.array) -> list[mx.array]:
            return _vmap(level, self.call, axes, arrays)

        def pull(primals: Arrays, cotangents: Arrays, outputs: Arrays) -> list[mx.array]:
            def one(*arrays: mx.array) -> list[mx.array]:
                middle = count + len(cotangents)
                return self.pull(arrays[:count], arrays[count:middle], arrays[middle:])

            arrays = (*primals, *cotangents, *outputs)
            grads = _vmap(level, one, (*axes, *(0,) * (len(arrays) - count)), arrays)
            # Samples share an unmapped primal, whose gradient is then the sum of theirs.
            return [
                mx.sum(g, axis=0) if axis is None else mx.moveaxis(g, 0, axis)
                for g, axis in zip(grads, axes)
            ]

        def push(primals: Arrays, tangents: Arrays) -> list[mx.array]:
            def one(*arrays: mx.array) -> list[mx.array]:
                return self.push(arrays[:count], arrays[count:])

            return _vmap(level, one, (*axes, *axes), (*primals, *tangents))

        return _Function(call, pull, push, self.waiting)


def _vmap(
    level: levels.VmapLevel, fun: Flat, axes: tuple[int | None, ...], arrays: Sequence[mx.array]
) -> list[mx.array]:
    first = next(i for i, a in enumerate(axes) if a is not None)
    body = levels.at_vmap(level, fun)
    in_axes: Any = axes if len(axes) > 1 else axes[first]
    return list(native.vmap(lambda *xs: body(xs[first], *xs), in_axes)(*arrays))


def _vjp(call: Flat, primals: Arrays, cotangents: Arrays, outputs: Arrays) -> list[mx.array]:
    """The cotangents of the primals that can have one, zeros for the others."""
    at = [i for i, x in enumerate(primals) if mx.issubdtype(x.dtype, mx.inexact)]

    def of_inexact(*arrays: mx.array) -> list[mx.array]:
        full = list(primals)
        for i, x in zip(at, arrays):
            full[i] = x
        return call(*full)

    pulled = [mx.zeros_like(x) for x in primals]
    found = native.vjp(
        levels.at_level("grad", of_inexact), [primals[i] for i in at], list(cotangents)
    )
    for i, x in zip(at, found[1]):
        pulled[i] = x
    return pulled


def _jvp(call: Flat, primals: Arrays, tangents: Arrays) -> list[mx.array]:
    return native.jvp(levels.at_level("jvp", call), list(primals), list(tangents))[1]


def _several(arrays: Any) -> Any:
    return arrays if isinstance(arrays, (list, tuple)) else (arrays,)


def _full(primals: Arrays, tangents: Sequence[mx.array | None]) -> list[mx.array]:
    return [mx.zeros_like(x) if t is None else t for x, t in zip(primals, tangents)]


def _unmapped(x: mx.array) -> Any:
    def refuse(_: Any, axis: Any) -> Any:
        raise ValueError(
            "a function with a derivative of its own (mx.checkpoint, mx.custom_function) uses a "
            "mapped array that is not one of its arguments: pass it as one."
        )

    node = Node(lambda y: y)
    node.vmap(refuse)
    return node(mx.stop_gradient(x))


class _Call:
    """A call with trees of arguments and a tree of outputs, as a function of flat arrays."""

    def __init__(self, fun: Callable[..., Any], args: Any, kwargs: Any) -> None:
        self.fun, self.tree = fun, [args, kwargs]
        self.arrays = [x for _, x in trees.leaves(self.tree) if isinstance(x, mx.array)]
        self.outputs: Any = None

    def flat(self, *arrays: mx.array) -> list[mx.array]:
        rest = iter(arrays)
        args, kwargs = trees.map_leaves(
            lambda leaf: next(rest) if isinstance(leaf, mx.array) else leaf, self.tree
        )
        self.outputs = self.fun(*args, **kwargs)
        return [x for _, x in trees.leaves(self.outputs) if isinstance(x, mx.array)]

    def through(self, function: _Function) -> Any:
        """What the function returns for this call's arguments, in the tree of its outputs."""
        results = iter(function(*self.arrays))
        return trees.map_leaves(
            lambda leaf: next(results) if isinstance(leaf, mx.array) else leaf, self.outputs
        )


@intercept(mx, "checkpoint", patched=True)
def checkpoint(fun: Callable[..., Any]) -> Callable[..., Any]:
    native = original(mx, "checkpoint")(fun)

    # Bare like MLX's own, which has no name or signature either.
    def checkpointed(*args: Any, **kwargs: Any) -> Any:
        if not _tracing_vmap():
            return native(*args, **kwargs)
        if "grad" not in levels.active():
            return fun(*args, **kwargs)  # nothing will be recomputed
        call = _Call(fun, args, kwargs)
        return call.through(_Function(call.flat, functools.partial(_recompute, call.flat)))

    return checkpointed


def _recompute(flat: Flat, primals: Arrays, cotangents: Arrays, outputs: Arrays) -> list[mx.array]:
    count, middle = len(primals), len(primals) + len(cotangents)

    def backward(*arrays: mx.array) -> list[mx.array]:
        return _vjp(flat, arrays[:count], arrays[count:middle], ())

    return _Function(backward, waiting=count)(*primals, *cotangents, *outputs)


@intercept(mx.custom_function, "__call__")
def custom_function(self: Any, *args: Any, **kwargs: Any) -> Any:
    native = original(mx.custom_function, "__call__")
    if not _tracing_vmap() or not _differentiated_from_outside():
        return native(self, *args, **kwargs)
    call = _Call(functools.partial(native, self), args, kwargs)
    return call.through(_Function(call.flat))


def _tracing_vmap() -> bool:
    vmaps = levels.vmaps()
    return bool(vmaps) and vmaps[-1].mapped is not None


def _differentiated_from_outside() -> bool:
    """Whether a derivative will be taken of the result of a vmap, and not only inside it."""
    stack = levels.active()
    innermost = len(stack) - 1 - stack[::-1].index("vmap")
    return any(kind != "vmap" for kind in stack[:innermost])


# The switch of compilation -----------------------------------------------------------------------


@intercept(mx, "disable_compile", outside=True)
def disable_compile() -> None:
    compilation.want(False)


@intercept(mx, "enable_compile", outside=True)
def enable_compile() -> None:
    compilation.want(True)


# Evaluation ------------------------------------------------------------------------------------


def _evaluation(name: str) -> None:
    @intercept(mx, name)
    def call(*args: Any) -> None:
        try:
            original(mx, name)(*args)
        except ValueError as e:
            if not levels.vmaps() or not any(words in str(e) for words in _NOT_YET):
                raise


_NOT_YET = ("eval an array during function transformations", "inside a graph transformation")

for _name in ("eval", "async_eval"):
    _evaluation(_name)
