"""Control: checkpoint, custom functions, depends, stop_gradient, compile, eval, inside a trace."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .case import case, integers, normal


def layer(x: mx.array, w: mx.array) -> mx.array:
    return mx.tanh(x @ w) * mx.sin(x.sum())


case("checkpoint", lambda x, w: mx.checkpoint(layer)(x, w), normal(2, 3), normal(3, 4))
case(
    "checkpoint/two in a row",
    lambda x, w: mx.checkpoint(layer)(mx.checkpoint(layer)(x, w), w),
    normal(2, 3),
    normal(3, 3),
)
case(
    "checkpoint/nested",
    lambda x, w: mx.checkpoint(lambda x, w: mx.checkpoint(layer)(x, w) * x)(x, w),
    normal(2, 3),
    normal(3, 3),
)
case(
    "checkpoint/trees",
    lambda x, w: mx.checkpoint(lambda t, k, *, s: {"a": layer(t["x"], s[0]) * k, "b": None})(
        {"x": x}, 2, s=[w]
    )["a"],
    normal(2, 3),
    normal(3, 4),
)
case(
    "checkpoint/attention",
    lambda q, k: mx.checkpoint(
        lambda q, k: mx.fast.scaled_dot_product_attention(q, k, k, scale=0.5, mask="causal")
    )(q, k),
    normal(1, 4, 3, 8),
    normal(1, 2, 3, 8),
    # Slow, and its derivatives are attention's own cases.
    modes=("vmap", "vmap(grad)", "grad(vmap)"),
)


def _module_checkpoint(x: mx.array, w: mx.array) -> mx.array:
    module = nn.Linear(3, 4, bias=False)
    module.weight = mx.swapaxes(w, 0, 1)
    return nn.utils.checkpoint(module)(x)


case("checkpoint/module", _module_checkpoint, normal(2, 3), normal(3, 4))


@mx.custom_function
def clipped(x: mx.array, w: mx.array) -> mx.array:
    return mx.exp(x) * w


@clipped.vjp
def _clipped_vjp(primals: Any, cotangent: mx.array, output: mx.array) -> Any:
    x, _ = primals
    return mx.clip(cotangent, -0.5, 0.5) * output, 3 * cotangent * mx.cos(x)


@clipped.jvp
def _clipped_jvp(primals: Any, tangents: Any) -> mx.array:
    (x, w), (dx, dw) = primals, tangents
    out = mx.zeros_like(x)
    out = out if dx is None else out + 5 * dx * w
    return out if dw is None else out + 7 * dw * x


@mx.custom_function
def rounded(x: mx.array) -> mx.array:
    return mx.round(x)


@rounded.vjp
def _straight_through(primal: mx.array, cotangent: mx.array, output: mx.array) -> mx.array:
    return cotangent


@mx.custom_function
def with_rule(x: mx.array) -> mx.array:
    return mx.sort(x, axis=0)


@with_rule.vmap
def _its_rule(x: mx.array, axis: int) -> Any:
    return mx.sort(mx.moveaxis(x, axis, 0), axis=1), 0


@with_rule.vjp
def _its_vjp(x: mx.array, cotangent: mx.array, output: mx.array) -> mx.array:
    return 2 * cotangent


@mx.custom_function
def pair(t: dict[str, mx.array], n: mx.array) -> Any:
    return {"first": t["a"][n], "second": (t["a"] * t["b"],)}


@pair.vjp
def _pair_vjp(primals: Any, cotangents: Any, outputs: Any) -> Any:
    t, n = primals
    return {"a": cotangents["second"][0], "b": t["a"] * outputs["second"][0]}, mx.zeros_like(n)


case("custom_function", clipped, normal(2, 3), normal(2, 3))
case("custom_function/straight through", lambda x: mx.sin(rounded(2 * x)), normal(3, 4))
case("custom_function/own rule", lambda x: with_rule(x) * x, normal(3, 4))
case(
    "custom_function/trees",
    lambda a, b, n: list(pair({"a": a, "b": b}, n).values()),
    normal(4),
    normal(4),
    integers(2),
)
case(
    "custom_function/no derivative of its own",
    lambda x: mx.custom_function(lambda y: mx.sin(y) * y)(x),
    normal(3),
)

case("depends", lambda x, y: mx.depends(x, mx.sin(y)) * 2, normal(3), normal(2, 3))
case(
    "depends/several",
    lambda x, y, z: mx.depends([x * x, mx.cos(y)], [z, x]),
    normal(3),
    normal(2, 3),
    normal(4),
)
case("stop_gradient", lambda x, y: mx.stop_gradient(x) * y + x, normal(3), normal(3))
case("compile", lambda x, y: mx.compile(layer)(x, y), normal(2, 3), normal(3, 4))
case(
    "compile/captured",
    lambda x, y: mx.compile(lambda a: mx.sin(a) * y + 1)(x) + 2,
    normal(3),
    normal(3),
)


def _evaluated(x: mx.array, y: mx.array) -> mx.array:
    z = mx.sin(x) * y
    mx.eval(z, [y])
    mx.async_eval({"z": z})
    return z + x


# A compiled function may not evaluate: MLX's own words.
case(
    "eval",
    _evaluated,
    normal(3),
    normal(3),
    modes=("vmap", "vmap(vmap)", "vmap(grad)", "grad(vmap)", "vmap(vjp)", "vmap(jvp)", "jvp(vmap)"),
)
