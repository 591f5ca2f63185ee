"""Sums, extrema, scans: whatever runs along an axis."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx

from .case import booleans, case, integers, normal, uniform


def op(name: str) -> Callable[..., Any]:
    return lambda *args, **kwargs: getattr(mx, name)(*args, **kwargs)


HALF = (mx.float32, mx.float16)
DEEP = ("vmap", "vmap(grad)", "grad(vmap)", "vmap(vjp)", "vmap(jvp)", "vmap(jvp(grad))")

for name in ("sum", "mean", "max", "min", "logsumexp", "var", "std", "prod"):
    fun = op(name)
    case(name, fun, normal(2, 3, 4), dtypes=HALF)
    case(f"{name}/axis", lambda x, f=fun: f(x, axis=1), normal(2, 3, 4))
    case(f"{name}/axes", lambda x, f=fun: f(x, axis=(0, -1), keepdims=True), normal(2, 3, 4))
for name in ("sum", "mean", "max", "min", "logsumexp", "var", "std", "prod"):
    fun = op(name)
    case(f"{name}/leading axes", lambda x, f=fun: f(x, axis=(1, 0)), normal(2, 3, 4), modes=DEEP)
for name in ("max", "prod"):
    fun = op(name)
    case(
        f"{name}/leading axes kept",
        lambda x, f=fun: f(x, axis=(0, 1), keepdims=True),
        normal(2, 3, 4),
        modes=DEEP,
    )
for name in ("sum", "mean", "max", "min", "prod"):
    fun = op(name)
    case(f"{name}/integers", lambda x, f=fun: f(x, axis=0), integers(2, 3, low=-3))
    case(f"{name}/nothing", lambda x, f=fun: f(x, axis=[]), normal(2, 3), modes=("vmap",))
case("sum/booleans", lambda x: mx.sum(x, axis=1), booleans(2, 3))
case("prod/with a zero", lambda x, y: mx.prod(x * y, axis=0), normal(3, 2), integers(3, 2, high=2))
case("std/ddof", lambda x: mx.std(x, axis=1, ddof=1), normal(2, 3))
case("var/ddof", lambda x: mx.var(x, axis=0, ddof=1), normal(3, 2))

case("all", lambda x: mx.all(x, axis=1), booleans(4, 2))
case("all/everything", mx.all, booleans(2))
case("any", lambda x: mx.any(x, axis=0, keepdims=True), booleans(2, 4))
case("any/everything", mx.any, booleans(2))
case("allclose", lambda x, y: mx.allclose(x, y, atol=1.0), normal(2), normal(2))
case("array_equal", mx.array_equal, integers(1, 2, high=2), integers(1, 2, high=2))
case("array_equal/shapes", mx.array_equal, integers(2, 3), integers(3))
case("count_nonzero", lambda x: mx.count_nonzero(x, axis=1), integers(3, 4))

for name in ("argmax", "argmin"):
    fun = op(name)
    case(name, fun, normal(2, 3))
    case(f"{name}/axis", lambda x, f=fun: f(x, axis=0, keepdims=True), normal(3, 4))
    case(f"{name}/ties", lambda x, f=fun: f(x, axis=-1), integers(3, 4, high=2))
case("minmax", lambda x: mx.minmax(x, axis=1), normal(2, 3))

for name in ("cumsum", "cumprod", "cummax", "cummin", "logcumsumexp"):
    fun = op(name)
    case(name, lambda x, f=fun: f(x, axis=1), normal(2, 3), dtypes=HALF)
    case(f"{name}/flat", fun, normal(2, 3), modes=("vmap", "vmap(vmap)", "vmap(grad)"))
    case(
        f"{name}/reverse",
        lambda x, f=fun: f(x, axis=0, reverse=True, inclusive=False),
        normal(3, 2),
    )
case("cumsum/integers", lambda x: mx.cumsum(x, axis=0), integers(3, 2))
case("cumulative_sum", lambda x: mx.cumulative_sum(x, axis=0), normal(3, 2))
case("cumulative_prod", lambda x: mx.cumulative_prod(x, axis=0), normal(3, 2))

case("softmax", lambda x: mx.softmax(x, axis=0), normal(3, 2), dtypes=HALF)
case("softmax/axes", lambda x: mx.softmax(x, axis=(0, 1)), normal(3, 2, 2))
case("softmax/precise", lambda x: mx.softmax(x, axis=-1, precise=True), normal(3, 2), dtypes=HALF)
case("linalg.norm/leading axes", lambda x: mx.linalg.norm(x, axis=(1, 0)), normal(2, 3, 4))
case("matrix_norm", lambda x: mx.matrix_norm(x, axis=(0, 1), keepdims=True), normal(2, 3, 4))
case("trace", mx.trace, normal(3, 4))
case("trace/axes", lambda x: mx.trace(x, 1, axis1=0, axis2=2), normal(3, 2, 4))
case("diff", lambda x: mx.diff(x, axis=0), normal(4, 3))
case("diff/twice", lambda x: mx.diff(x, n=2), uniform(2, 5))
case("vecdot", lambda x, y: mx.vecdot(x, y), normal(2, 3), normal(2, 3))
case("vecdot/broadcast", lambda x, y: mx.vecdot(x, y, axis=0), normal(3, 1, 2), normal(3, 4, 1))
