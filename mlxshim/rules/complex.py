"""Gradients of complex numbers: powers, sums of exponentials, signs, and before 0.32.4 the
elementary functions.

The pullback of a holomorphic f is c -> conj(f'(z)) c, MLX's convention and PyTorch's. That of MLX's
powers multiplies by f'(z) itself, on every version so far, and up to 0.32.0 so does that of many
functions of one argument. That of logaddexp is made of sigmoids, which are wrong there, and refused
later. MLX's signs have no derivative, and so lengths no second one. Real arrays are MLX's own.

Source: mlx/primitives.cpp, `Power::vjp`, `LogAddExp::vjp`, `Cos::vjp`, …
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import mlx.core as mx

from ..core import levels
from ..core.interception import intercept, original
from ..core.primitive import Arrays, Axes, Primitive
from ..core.versions import MLX, MLX_VERSION
from ._constants import constant
from ._devices import within
from ._folding import aligned, on_stream, sum_to

#: f'(z), given z and y = f(z).
DERIVATIVES: dict[str, Callable[[mx.array, mx.array], mx.array]] = {
    "exp": lambda z, y: y,
    "log": lambda z, y: 1 / z,
    "log1p": lambda z, y: 1 / (1 + z),
    "log2": lambda z, y: (1 / math.log(2)) / z,
    "log10": lambda z, y: (1 / math.log(10)) / z,
    "sin": lambda z, y: mx.cos(z),
    "cos": lambda z, y: -mx.sin(z),
    "tan": lambda z, y: 1 + y * y,
    "sinh": lambda z, y: mx.cosh(z),
    "cosh": lambda z, y: mx.sinh(z),
    "tanh": lambda z, y: 1 - y * y,
    "arcsin": lambda z, y: 1 / mx.sqrt(1 - z * z),
    "arccos": lambda z, y: -1 / mx.sqrt(1 - z * z),
    "arctan": lambda z, y: 1 / (1 + z * z),
    "arcsinh": lambda z, y: 1 / mx.sqrt(1 + z * z),
    "arccosh": lambda z, y: 1 / (mx.sqrt(z - 1) * mx.sqrt(z + 1)),
    "arctanh": lambda z, y: 1 / (1 - z * z),
    "sqrt": lambda z, y: 0.5 / y,
    "rsqrt": lambda z, y: -0.5 * y / z,
    "square": lambda z, y: 2 * z,
}


def _value(*arrays: mx.array, name: str) -> list[mx.array]:
    # Of a node that has the derivatives.
    return [original(mx, name)(*(mx.stop_gradient(x) for x in arrays))]


def _bind(*arrays: mx.array, name: str) -> mx.array:
    bound = function if "vmap" in levels.active() else function.differentiable
    return bound(*arrays, name=name)[0]


def _slopes(arrays: Arrays, y: mx.array, name: str) -> list[mx.array]:
    """The derivative with respect to each argument."""
    if name == "power":
        z, w = arrays
        of_exponent = mx.where(mx.equal(y, 0), mx.zeros((), y.dtype), y * mx.log(z))
        return [w * _bind(z, w - 1, name=name), of_exponent]
    if name == "logaddexp":
        return [mx.exp(x - y) for x in arrays]
    return [DERIVATIVES[name](arrays[0], y)]


def _batch(size: int, arrays: Arrays, axes: Axes, *, name: str) -> tuple[list[mx.array], list[int]]:
    return [_bind(*aligned(size, arrays, axes), name=name)], [0]


def _vjp(primals: Arrays, cotangents: Arrays, outputs: Arrays, *, name: str) -> list[mx.array]:
    slopes = _slopes(primals, outputs[0], name)
    return [sum_to(cotangents[0] * mx.conjugate(s), x.shape) for s, x in zip(slopes, primals)]


def _jvp(primals: Arrays, tangents: Any, *, name: str) -> list[mx.array]:
    y = _bind(*primals, name=name)
    terms = [s * t for s, t in zip(_slopes(primals, y, name), tangents) if t is not None]
    return [mx.broadcast_to(sum(terms[1:], terms[0]), y.shape)]


function = Primitive(
    "complex function", decomposition=_value, lowering=_value, batch=_batch, vjp=_vjp, jvp=_jvp
)


def _is_complex(*operands: Any) -> bool:
    return any(
        x.dtype == mx.complex64 if isinstance(x, mx.array) else isinstance(x, complex)
        for x in operands
    )


def _differentiated() -> bool:
    stack = levels.active()
    return "grad" in stack or "jvp" in stack


# Functions of one argument ------------------------------------------------------------------------


def _unary(owner: Any, name: str) -> None:
    @intercept(owner, name)
    def call(a: Any, *args: Any, **kwargs: Any) -> mx.array:
        raw = original(owner, name)
        if not (_differentiated() and isinstance(a, mx.array) and a.dtype == mx.complex64):
            return raw(a, *args, **kwargs)
        return on_stream(kwargs.get("stream"), _bind, a, name=name)


if MLX < (0, 32, 4):
    for _name in DERIVATIVES:
        for _owner in (mx, mx.array):
            if hasattr(_owner, _name):
                _unary(_owner, _name)


def std(a: Any, *args: Any, **kwargs: Any) -> mx.array | None:
    """`mx.std` where the square root in it has the wrong derivative, else None."""
    if MLX >= (0, 32, 4) or not (_differentiated() and _is_complex(a)):
        return None
    with within(kwargs.get("stream")):
        return mx.sqrt(mx.var(a, *args, **kwargs))


def _conjugate(owner: Any, name: str) -> None:
    @intercept(owner, name)
    def conjugate(a: Any, *, stream: Any = None) -> mx.array:
        if not (_differentiated() and _is_complex(a)):
            return original(owner, name)(a, stream=stream)
        with within(stream):
            return mx.real(a) - 1j * mx.imag(a)


if MLX < (0, 32, 0):  # whose own has no vjp, nor jvp in 0.31.1
    for _place in ((mx, "conjugate"), (mx, "conj"), (mx.array, "conj")):
        _conjugate(*_place)

# What is not holomorphic -------------------------------------------------------------------------


_LARGEST = mx.finfo(mx.float32).max


def _length(z: mx.array) -> mx.array:
    """In units of the greater part of z, whose square neither underflows nor overflows.

    A constant unit: what is divided by it is multiplied by it, so it has no derivative.
    """
    x, y = mx.real(z), mx.imag(z)
    greater = mx.maximum(mx.abs(mx.stop_gradient(x)), mx.abs(mx.stop_gradient(y)))
    unit = mx.minimum(greater, constant(_LARGEST, mx.float32))
    unit = unit + mx.equal(unit, 0).astype(mx.float32)
    square = mx.square(x / unit) + mx.square(y / unit)
    zero = mx.equal(square, 0).astype(mx.float32)  # of which the derivative is zero
    return (mx.sqrt(square + zero) - zero) * unit


def lengths(a: Any, stream: Any = None) -> mx.array | None:
    """`mx.abs(a)` where it is complex and differentiated, else None."""
    if not (_differentiated() and _is_complex(a)):
        return None
    with within(stream):
        return _length(a)


def _abs(owner: Any, name: str) -> None:
    @intercept(owner, name)
    def absolute(a: Any, *args: Any, **kwargs: Any) -> mx.array:
        found = lengths(a, kwargs.get("stream"))
        return original(owner, name)(a, *args, **kwargs) if found is None else found


_abs(mx, "abs")
_abs(mx.array, "abs")
_abs(mx.array, "__abs__")


@intercept(mx, "sign")
def sign(a: Any, stream: Any = None) -> mx.array:
    if not (_differentiated() and _is_complex(a)):
        return original(mx, "sign")(a, stream=stream)
    with within(stream):
        length = _length(a)
        return a / (length + mx.equal(length, 0).astype(mx.float32))


# What is refused ----------------------------------------------------------------------------------


def _refused(owner: Any, name: str, why: str) -> None:
    @intercept(owner, name)
    def call(a: Any, *args: Any, **kwargs: Any) -> mx.array:
        if _differentiated() and _is_complex(a):
            raise NotImplementedError(f"[{name}] of complex numbers {why}.")
        return original(owner, name)(a, *args, **kwargs)


for _owner in (mx, mx.array):
    _refused(_owner, "cumprod", "has no right derivative in MLX: take mx.prod of slices instead")
if MLX < (0, 32, 4):  # from which on MLX refuses it
    for _name, _formula in (("expm1", "mx.exp(z) - 1"), ("sigmoid", "1 / (1 + mx.exp(-z))")):
        _refused(mx, _name, f"is wrong in MLX {MLX_VERSION}, and none later: write {_formula}")


def refuse_reverse(name: str, a: Any) -> None:
    """For what 0.31 does not conjugate and Python cannot reach: it is made in C++ of what it is."""
    if MLX < (0, 32, 0) and "grad" in levels.active() and _is_complex(a):
        raise NotImplementedError(
            f"[{name}] of complex numbers in reverse mode needs MLX 0.32 (this is {MLX_VERSION})."
        )


# Of two arguments ---------------------------------------------------------------------------------


def _complexes(*operands: Any) -> list[mx.array]:
    arrays = (x if isinstance(x, mx.array) else mx.array(x, mx.complex64) for x in operands)
    return [x.astype(mx.complex64) for x in arrays]


@intercept(mx, "logaddexp")
def logaddexp(a: Any, b: Any, /, *, stream: Any = None) -> mx.array:
    if not (_differentiated() and _is_complex(a, b)):
        return original(mx, "logaddexp")(a, b, stream=stream)
    with within(stream):
        return _bind(*_complexes(a, b), name="logaddexp")


def power(a: Any, b: Any) -> mx.array | None:
    """`a ** b` where its derivative is not MLX's own, else None."""
    if not _differentiated():
        return None
    if _is_complex(a, b):
        return _bind(*_complexes(a, b), name="power")
    return _real_power(a, b)


def _real_power(a: Any, b: Any) -> mx.array | None:
    """On 0.31, whose jvp takes the first tangent for both arguments."""
    both = isinstance(a, mx.array) and isinstance(b, mx.array)
    if MLX >= (0, 32, 0) or not both or "jvp" not in levels.active():
        return None
    dtype = original(mx, "power")(a, b).dtype
    if not mx.issubdtype(dtype, mx.floating):
        return None
    return _bind(a.astype(dtype), b.astype(dtype), name="power")


def _power(owner: Any, name: str) -> None:
    @intercept(owner, name)
    def call(a: Any, b: Any, *args: Any, **kwargs: Any) -> mx.array:
        found = power(b, a) if name == "__rpow__" else power(a, b)
        if found is None:
            return original(owner, name)(a, b, *args, **kwargs)
        if name != "__ipow__":
            return found
        original(mx.array, "__setitem__")(a, None, found)  # the same array object
        return a


for _owner, _name in ((mx, "power"), (mx, "pow")):
    if hasattr(_owner, _name):
        _power(_owner, _name)
for _name in ("__pow__", "__ipow__", "__rpow__"):
    _power(mx.array, _name)
