"""Methods, properties and operators of `mx.array`, and assignment in place."""

from __future__ import annotations

import copy
import operator
from typing import Any

import mlx.core as mx

from .case import booleans, case, integers, normal, uniform
from .elementwise import POWER

X = normal(2, 3, 4)
FEW = ("vmap", "vmap(vmap)", "vmap(grad)", "grad(vmap)", "vmap(jvp)")

# Operators --------------------------------------------------------------------------------------

for name, op in {
    "__add__": operator.add,
    "__sub__": operator.sub,
    "__mul__": operator.mul,
    "__truediv__": operator.truediv,
    "__pow__": operator.pow,
    "__mod__": operator.mod,
    "__floordiv__": operator.floordiv,
}.items():
    meaning = {"reference": POWER if name == "__pow__" else None}
    case(f"array.{name}", op, uniform(2, 3), uniform(3), modes=FEW, **meaning)
    right = f"__r{name[2:]}"
    case(f"array.{right}", lambda x, op=op: op(2.5, x), uniform(2, 3), modes=FEW)
    assign = f"__i{name[2:]}"
    fun = getattr(operator, assign)
    case(f"array.{assign}", lambda x, y, f=fun: f(x + 0, y), uniform(2, 3), uniform(3), **meaning)
    case(f"array.{assign}/of the argument", lambda x, f=fun: f(x, 2.5), uniform(2, 3), modes=FEW)
case("array.__div__", lambda x, y: x.__div__(y), normal(2, 3), uniform(3), modes=FEW)
case("array.__rdiv__", lambda x: x.__rdiv__(2.5), uniform(2, 3), modes=FEW)
case("array.__matmul__", operator.matmul, normal(2, 3), normal(3, 4))
case("array.__matmul__/vectors", operator.matmul, normal(3), normal(3))
case("array.__matmul__/batch", operator.matmul, normal(4, 2, 3), normal(4, 3, 2))
case("array.__imatmul__", lambda x, y: operator.imatmul(x + 0, y), normal(2, 3), normal(3, 3))

for name in ("__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__"):
    case(f"array.{name}", getattr(operator, name), integers(2, 3), integers(3))
for name in ("__and__", "__or__", "__xor__", "__lshift__", "__rshift__"):
    fun, assign = getattr(operator, name), f"__i{name[2:]}"
    case(f"array.{name}", fun, integers(2, 3, high=64), integers(3))
    fun = getattr(operator, assign)
    case(f"array.{assign}", lambda x, y, f=fun: f(x + 0, y), integers(2, 3), integers(3))
case("array.__and__/booleans", operator.and_, booleans(2, 3), booleans(3))
case("array.__neg__", operator.neg, X, modes=FEW)
case("array.__pos__", lambda x: x.__pos__(), X, modes=FEW)
case("array.__abs__", abs, X, modes=FEW)
case("array.__invert__", operator.invert, integers(2, 3, low=-9, high=9))

case("array.__getitem__", lambda x: x[1], X)
case("array.__getitem__/slices", lambda x: x[:, 2:0:-1, ::2], X)
case(
    "array.__getitem__/steps of one entry",
    lambda x: (x[::-1], x[0:1:2, ..., 0:2:2], x[..., 4:2:-2], x[-1::3, None, 0, 3:1:-4]),
    normal(1, 3, 5),
    # Old versions differentiate them wrongly.
    reference=lambda x: (x, x[:, :, 0:1], x[..., 4:5], x[:, None, 0, 3:4]),
)
case("array.__getitem__/ellipsis", lambda x: x[..., None, -1], X)
case("array.__getitem__/integers", lambda x: x[1, -2], X)
case("array.__getitem__/new axes", lambda x: x[:, None, None], normal(2, 3))
case("array.__getitem__/all kinds", lambda x: x[-1, None, ..., None, 2, ::2], normal(3, 2, 3, 4))
case("array.__getitem__/array and axes", lambda x, i: x[i, None, None], normal(4, 2), integers(3))
case("array.__iter__", lambda x: [row * 2 for row in x], normal(2, 3))
case("array.__copy__", lambda x: copy.copy(x) * 2, X, modes=FEW)
case("array.__deepcopy__", lambda x: copy.deepcopy(x) * 2, X, modes=FEW)

# Properties and methods -------------------------------------------------------------------------

case("array.T", lambda x: x.T, X)
case("array.mT", lambda x: x.mT, X)
case("array.real", lambda x: x.real, X, modes=FEW)
case("array.imag", lambda a, b: (a + 1j * b).imag, normal(2, 3), normal(2, 3))


def method(name: str, *args: Any, source: Any = X, **kwargs: Any) -> None:
    def call(x: mx.array) -> Any:
        return getattr(x, name)(*args, **kwargs)

    case(f"array.{name}", call, source, modes=FEW)


for name in ("abs", "cos", "exp", "sin", "square"):
    method(name)
for name in ("log", "log10", "log1p", "log2", "reciprocal", "rsqrt", "sqrt"):
    method(name, source=uniform(2, 3))
for name in ("max", "mean", "min", "prod", "std", "sum", "var", "logsumexp"):
    method(name, 1, keepdims=True)
for name in ("cummax", "cummin", "cumprod", "cumsum", "logcumsumexp"):
    method(name, 1, reverse=True)
for name in ("argmax", "argmin"):
    method(name, 1)
for name in ("all", "any"):
    method(name, 0, source=booleans(2, 3))
method("astype", mx.float16)
method("conj")
method("diag", source=normal(3))
method("diagonal", 1)
method("flatten", 0, 1)
method("moveaxis", 0, 2)
method("reshape", 4, -1)
method("round", 1)
method("split", 2, 2)
method("squeeze", 1, source=normal(2, 1, 3))
method("swapaxes", 0, 1)
method("transpose", 2, 0, 1)
method("view", mx.int32)
