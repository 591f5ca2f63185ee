"""Functions of single elements, with the broadcasting of several arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx

from mlxshim.core.versions import MLX

from .case import booleans, case, integers, normal, uniform

HALF = (mx.float32, mx.float16)


def _bfloat16() -> mx.array:
    return mx.random.normal((3,)).astype(mx.bfloat16)


# One argument -----------------------------------------------------------------------------------

for name in ("sin", "cos", "exp", "tanh", "sigmoid", "square", "negative", "abs", "erf"):
    case(name, getattr(mx, name), normal(2, 3), dtypes=HALF)
for name in ("arctan", "arcsinh", "sinh", "cosh", "expm1", "degrees", "radians", "sign"):
    case(name, getattr(mx, name), normal(2, 3))
for name in ("arccos", "arcsin", "arctanh", "erfinv", "tan", "log", "log10", "log1p", "log2"):
    case(name, getattr(mx, name), uniform(2, 3))
for name in ("reciprocal", "rsqrt", "sqrt"):
    case(name, getattr(mx, name), uniform(2, 3), dtypes=HALF)
case("arccosh", mx.arccosh, uniform(2, 3, low=1.2, high=3.0))
for name in ("ceil", "floor", "trunc", "positive"):  # trunc and positive since 0.32
    case(name, lambda x, n=name: getattr(mx, n)(3 * x), normal(2, 3))
case("round", lambda x: mx.round(3 * x), normal(2, 3))
case("round/decimals", lambda x: mx.round(x, decimals=1), normal(2, 3))

# The array API's names, since 0.32.
for name in ("acos", "asin", "atanh"):
    case(name, lambda x, n=name: getattr(mx, n)(x), uniform(2, 3))
case("acosh", lambda x: mx.acosh(x), uniform(2, 3, low=1.2, high=3.0))
case("asinh", lambda x: mx.asinh(x), normal(2, 3))
case("atan", lambda x: mx.atan(x), normal(2, 3))


def _odd_values() -> mx.array:
    values = [0.5, float("inf"), float("-inf"), float("nan"), -2.0, 0.0]
    order = mx.random.permutation(6)
    return mx.reshape(mx.take(mx.array(values), order), (2, 3))


for name in ("isfinite", "isinf", "isnan", "isneginf", "isposinf", "nan_to_num"):
    case(name, getattr(mx, name), _odd_values)
case("nan_to_num/values", lambda x: mx.nan_to_num(x, 1.0, 2.0, -3.0), _odd_values)
case("logical_not", mx.logical_not, booleans(2, 3))
case("logical_not/floats", lambda x: mx.logical_not(mx.floor(x)), normal(2, 3))
case("bitwise_invert", mx.bitwise_invert, integers(2, 3, low=-9, high=9))
case("bitwise_invert/booleans", mx.bitwise_invert, booleans(2, 3))
case("abs/integers", mx.abs, integers(2, 3, low=-9, high=9))
case("square/integers", mx.square, integers(2, 3, low=-9, high=9))
case("sin/integers", mx.sin, integers(2, 3))
case("sign/unsigned", mx.sign, integers(2, 3, dtype=mx.uint8))

# Complex: the parts are the arguments and the results, so that there are derivatives -------------


def _complex(*parts: mx.array) -> mx.array:
    return parts[0] + 1j * parts[1]


def _parts(z: mx.array) -> list[mx.array]:
    return [mx.real(z), mx.imag(z)]


COMPLEX = (normal(2, 3), normal(2, 3))

case("real", lambda a, b: mx.real(_complex(a, b) * (2 - 1j)), *COMPLEX)
case("imag", lambda a, b: mx.imag(_complex(a, b) * (2 - 1j)), *COMPLEX)
case("conj", lambda a, b: _parts(mx.conj(_complex(a, b))), *COMPLEX)
case("conjugate", lambda a, b: _parts(mx.conjugate(_complex(a, b)) * (2 - 1j)), *COMPLEX)


def _in_float32(fun: Callable[..., Any]) -> Callable[..., Any]:
    return lambda a, b: fun(a.astype(mx.float32), b.astype(mx.float32))


# The references are real: old versions differentiate one sample wrongly.
case(
    "abs/complex",
    lambda a, b: mx.abs(_complex(a, b)),
    *COMPLEX,
    reference=_in_float32(lambda a, b: mx.sqrt(a * a + b * b)),
)
case(
    "exp/complex",
    lambda a, b: _parts(mx.exp(_complex(a, b))),
    *COMPLEX,
    reference=_in_float32(lambda a, b: [mx.exp(a) * mx.cos(b), mx.exp(a) * mx.sin(b)]),
)
case(
    "sin/complex",
    lambda a, b: _parts(mx.sin(_complex(a, b))),
    *COMPLEX,
    reference=_in_float32(lambda a, b: [mx.sin(a) * mx.cosh(b), mx.cos(a) * mx.sinh(b)]),
)
case(
    "square/complex",
    lambda a, b: _parts(mx.square(_complex(a, b))),
    *COMPLEX,
    reference=_in_float32(lambda a, b: [a * a - b * b, 2 * a * b]),
)
case("multiply/complex", lambda a, b: _parts(_complex(a, b) * _complex(b, a)), *COMPLEX)
case("divide/complex", lambda a, b: _parts(_complex(a, b) / (3 + _complex(b, a))), *COMPLEX)

# Several arguments ------------------------------------------------------------------------------

for name in ("add", "subtract", "multiply", "maximum", "minimum", "logaddexp", "arctan2"):
    case(name, getattr(mx, name), normal(2, 3), normal(2, 3), dtypes=HALF)
    case(f"{name}/broadcast", getattr(mx, name), normal(4, 1, 3), normal(2, 1))
case("add/scalar", lambda x, y: mx.add(2.5, x + y), normal(2, 3), normal())
case("add/dtypes", mx.add, normal(2, 3), _bfloat16, tolerance=4e-2)
case("add/integers", mx.add, integers(2, 3), integers(3, dtype=mx.uint8))
case("add/integer and float", mx.add, integers(2, 3), normal(3), dtypes=HALF)
case("multiply/boolean", mx.multiply, booleans(2, 3), normal(3))
case("atan2", lambda x, y: mx.atan2(x, y), normal(2, 3), normal(3))
case("divide", mx.divide, normal(2, 3), uniform(2, 3), dtypes=HALF)
case("divide/broadcast", mx.divide, normal(4, 1, 3), uniform(2, 1))
case("divide/integers", mx.divide, integers(2, 3), integers(3, low=1))
case("floor_divide", lambda x, y: mx.floor_divide(9 * x, y), normal(2, 3), uniform(3))
case("floor_divide/integers", mx.floor_divide, integers(2, 3, low=-9, high=9), integers(3, low=2))
case("remainder", lambda x, y: mx.remainder(9 * x, y), normal(2, 3), uniform(3))
case("remainder/integers", mx.remainder, integers(2, 3, low=-9, high=9), integers(3, low=2))
case("divmod", lambda x, y: mx.divmod(9 * x, y), normal(2, 3), uniform(3))
case("divmod/integers", mx.divmod, integers(2, 3, low=-9, high=9), integers(3, low=2))


def by_logarithm(x: mx.array, y: mx.array) -> mx.array:
    return mx.exp(y * mx.log(x))


#: For the oracle: the jvp of 0.31 takes the tangent of the base for that of the exponent.
POWER = by_logarithm if MLX < (0, 32, 0) else None
case("power", mx.power, uniform(2, 3), normal(3), dtypes=HALF, reference=POWER)
case("power/of integers", mx.power, integers(2, 3), integers(3))
case("power/scalar", lambda x: mx.power(x, 3), normal(2, 3))
case("pow", lambda x, y: mx.pow(x, y), uniform(2, 3), normal(3))
case("clip", lambda x: mx.clip(x, -0.5, 0.5), normal(2, 3), dtypes=HALF)
case("clip/arrays", mx.clip, normal(2, 3), uniform(3, low=-0.9, high=-0.1), uniform(2, 1))
case("clip/one bound", lambda x, low: mx.clip(x, low, None), normal(2, 3), normal())
case("where", mx.where, booleans(2, 3), normal(2, 3), normal(2, 3), dtypes=HALF)
case("where/broadcast", mx.where, booleans(4, 1, 1), normal(2, 1), normal(3))
case("where/scalar", lambda c, x: mx.where(c, x, 0.0), booleans(2, 3), normal(2, 3))
case("where/of the argument", lambda x: mx.where(x > 0, x, mx.exp(x)), normal(2, 3))
case("where/integers", mx.where, booleans(2, 1), integers(2, 3), integers(3))

for name in ("equal", "not_equal", "less", "less_equal", "greater", "greater_equal"):
    case(name, getattr(mx, name), integers(2, 3), integers(3))
    case(f"{name}/floats", getattr(mx, name), normal(2, 3), normal(3), modes=("vmap", "vmap(jvp)"))
for name in ("logical_and", "logical_or"):
    case(name, getattr(mx, name), booleans(2, 3), booleans(3))
case("logical_xor", lambda x, y: mx.logical_xor(x, y), booleans(2, 3), booleans(3))
for name in ("bitwise_and", "bitwise_or", "bitwise_xor", "left_shift", "right_shift"):
    case(name, getattr(mx, name), integers(2, 3, high=64), integers(3))
for name in ("bitwise_left_shift", "bitwise_right_shift"):
    case(name, lambda x, y, n=name: getattr(mx, n)(x, y), integers(2, 3, high=64), integers(3))
case("bitwise_and/booleans", mx.bitwise_and, booleans(2, 3), booleans(3))
case("bitwise_and/of floats", lambda x: x * (x.astype(mx.int32) & 3), uniform(2, 3, high=9.0))
case("isclose", lambda x, y: mx.isclose(x, y, atol=0.5), normal(2, 3), normal(3))
case("isclose/nan", lambda x, y: mx.isclose(x, y, equal_nan=True), _odd_values, _odd_values)

# Types ------------------------------------------------------------------------------------------

case("astype", lambda x: mx.astype(x, mx.float16), normal(2, 3))
case("view", lambda x: mx.view(x, mx.int16), integers(2, 3, low=-9, high=9))
case("view/smaller", lambda x: mx.view(x, mx.uint8), normal(3))
