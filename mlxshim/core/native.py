"""MLX's own transforms, for mlxshim itself.

`mx.grad` and its kind stand for mlxshim's inside `patched()`; these never do.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import mlx.core as mx

from . import levels

_grad, _value_and_grad = mx.grad, mx.value_and_grad
_vmap, _vjp, _jvp = mx.vmap, mx.vjp, mx.jvp
_call = mx.custom_function.__call__


def grad(fun: Any, *which: Any, **names: Any) -> Callable[..., Any]:
    return _marked(_grad(fun, *which, **names))


def value_and_grad(fun: Any, *which: Any, **names: Any) -> Callable[..., Any]:
    return _marked(_value_and_grad(fun, *which, **names))


def vjp(fun: Any, primals: list[mx.array], cotangents: list[mx.array]) -> Any:
    try:
        return _derived(_vjp, fun, primals, cotangents)
    finally:
        levels.unmark()


def jvp(fun: Any, primals: list[mx.array], tangents: list[mx.array]) -> Any:
    try:
        return _derived(_jvp, fun, primals, tangents)
    finally:
        levels.unmark()


def vmap(fun: Callable[..., Any], in_axes: Any = 0, out_axes: Any = 0) -> Callable[..., Any]:
    return levels.mapping(_vmap(fun, in_axes, out_axes))


def call_vmap(fun: Callable[..., Any], in_axes: Any, out_axes: Any, args: tuple[Any, ...]) -> Any:
    """`vmap(fun, in_axes, out_axes)(*args)`"""
    return levels.call_mapped(_vmap(fun, in_axes, out_axes), *args)


# Primals without a mark ------------------------------------------------------------------------


def _marked(derivative: Callable[..., Any]) -> Callable[..., Any]:
    return functools.partial(_derived, derivative)


def _derived(derivative: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if levels.unmarked():
        return keeping_graphs(lambda: derivative(*args, **kwargs))
    return derivative(*args, **kwargs)


def keeping_graphs(run: Callable[[], Any]) -> Any:
    """What `run` returns, run where MLX takes every array for a tracer.

    An array that has lost its mark to an earlier derivative is cut off from its graph where the
    next one makes it a primal, or where it is evaluated, and a derivative around both gets the
    first alone. MLX cuts nothing off while it calls a vjp rule (mlx/transforms.cpp, `RetainGraph`):
    this is one.
    """
    found: list[Any] = []

    def rule(primal: mx.array, cotangent: mx.array, _: Any) -> mx.array:
        found.append(run())
        return cotangent

    node = mx.custom_function(lambda y: y)
    node.vjp(rule)
    one = mx.array(1.0)
    _vjp(lambda y: _call(node, y), [one], [one])
    return found[0]
