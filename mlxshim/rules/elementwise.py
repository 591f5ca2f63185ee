"""Element-wise operations whose own batching rules are wrong in every MLX so far.

    BitwiseBinary   takes the first operand's shape for the result, and broadcasts nothing: wrong
                    where one operand is unmapped. Here a primitive.
    NotEqual        answers with the operands' axes: wrong where only the second is mapped.
                    Here a != b is not (a == b), NaN included.
    DivMod          answers one axis for two outputs and is read out of bounds. Here it is
                    (floor_divide(a, b), remainder(a, b)), in old versions truncated towards zero,
                    with the derivatives of MLX's divmod, which are zero.

Source: mlx/primitives.cpp, `vmap_binary_op` and the `vmap` of these three.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import mlx.core as mx

from ..core import levels
from ..core.interception import intercept, original
from ..core.primitive import Arrays, Axes, Primitive
from ..core.versions import SELECT_JVP_BUG
from ._devices import within
from ._dtypes import HALVES
from ._folding import aligned
from .truths import as_truth

Operand = Any  # an array, or a scalar that MLX makes one


# and, or, xor, shifts ---------------------------------------------------------------------------


def _value(a: mx.array, b: mx.array, *, name: str) -> list[mx.array]:
    # In a trace this is thrown away unless both are unmapped: then it is right.
    return [original(mx, name)(mx.stop_gradient(a), mx.stop_gradient(b))]


def _batch(size: int, arrays: Arrays, axes: Axes, *, name: str) -> tuple[list[mx.array], list[int]]:
    return bitwise(*aligned(size, arrays, axes), name=name), [0]


bitwise = Primitive("bitwise", decomposition=_value, lowering=_value, batch=_batch)


def _bitwise(owner: Any, name: str, same: str) -> Callable[..., mx.array]:
    """`owner.name`, which is `mx.same`."""

    @intercept(owner, name)
    def handler(a: Operand, b: Operand, stream: Any = None) -> mx.array:
        if "vmap" not in levels.active() or not isinstance(b, mx.array):
            on = {} if stream is None else {"stream": stream}  # an operator takes none
            return original(owner, name)(a, b, **on)
        if not isinstance(a, mx.array):
            a = mx.array(a, b.dtype)
        with within(stream):
            return bitwise(a, b, name=same)[0]

    return handler


def _in_place(name: str, operator: Callable[..., mx.array]) -> None:
    @intercept(mx.array, name)
    def assign(a: mx.array, b: Operand) -> mx.array:
        if not isinstance(b, mx.array) or "vmap" not in levels.active():
            return original(mx.array, name)(a, b)
        result = operator(a, b)
        a *= False  # the same array object, which others may hold too
        a += result
        return a


for _name in ("and", "or", "xor"):
    _same = f"bitwise_{_name}"
    _bitwise(mx, _same, _same)
    _in_place(f"__i{_name}__", _bitwise(mx.array, f"__{_name}__", _same))
for _name in ("left_shift", "right_shift"):
    _bitwise(mx, _name, _name)
    if hasattr(mx, f"bitwise_{_name}"):
        _bitwise(mx, f"bitwise_{_name}", _name)
    _dunder = f"{_name[0]}shift__"
    _in_place(f"__i{_dunder}", _bitwise(mx.array, f"__{_dunder}", _name))


# not equal --------------------------------------------------------------------------------------


@intercept(mx, "not_equal")
def not_equal(a: Operand, b: Operand, stream: Any = None) -> mx.array:
    if not isinstance(b, mx.array) or "vmap" not in levels.active():
        return original(mx, "not_equal")(a, b, stream=stream)
    return mx.logical_not(mx.equal(a, b, stream=stream), stream=stream)


@intercept(mx.array, "__ne__")
def __ne__(a: mx.array, b: Operand) -> Any:
    if not isinstance(b, mx.array) or "vmap" not in levels.active():
        return original(mx.array, "__ne__")(a, b)
    return not_equal(a, b)


if hasattr(mx, "logical_xor"):

    @intercept(mx, "logical_xor")
    def logical_xor(a: Operand, b: Operand, *, stream: Any = None) -> mx.array:
        a, b = as_truth(a), as_truth(b)
        if not isinstance(b, mx.array) or "vmap" not in levels.active():
            return original(mx, "logical_xor")(a, b, stream=stream)
        a, b = mx.logical_not(a, stream=stream), mx.logical_not(b, stream=stream)
        return not_equal(a, b, stream=stream)


# divmod -----------------------------------------------------------------------------------------


@intercept(mx, "divmod")
def divmod(a: Operand, b: Operand, stream: Any = None) -> list[mx.array]:
    stack = levels.active()
    if not ("vmap" in stack or (SELECT_JVP_BUG and "jvp" in stack)):
        return original(mx, "divmod")(a, b, stream=stream)
    a, b = (mx.stop_gradient(x) if isinstance(x, mx.array) else x for x in (a, b))
    return _divmod(a, b, {"stream": stream})


def _floored(a: Operand, b: Operand, on: dict[str, Any]) -> list[mx.array]:
    return [mx.floor_divide(a, b, **on), mx.remainder(a, b, **on)]


def _truncated(a: Operand, b: Operand, on: dict[str, Any]) -> list[mx.array]:
    dtype = original(mx, "divmod")(a, b, **on)[0].dtype
    a, b = (mx.array(x).astype(dtype, **on) for x in (a, b))
    sign_a, sign_b = mx.sign(a, **on), mx.sign(b, **on)
    a, b = mx.abs(a, **on), mx.abs(b, **on)
    quotient, rest = _floored(a, b, on)
    if dtype in HALVES:  # whose remainders may be those of a - b
        rest = mx.remainder(a.astype(mx.float32, **on), b.astype(mx.float32, **on), **on)
        rest = rest.astype(dtype, **on)
    sign = mx.multiply(sign_a, sign_b, **on)
    return [mx.multiply(sign, quotient, **on), mx.multiply(sign_a, rest, **on)]


def _divmod(a: Operand, b: Operand, on: dict[str, Any]) -> list[mx.array]:
    return (_truncated if _truncates() else _floored)(a, b, on)


@functools.cache
def _truncates() -> bool:
    """Whether MLX's own rounds towards zero, as it did up to 0.32.0 at least."""
    return original(mx, "divmod")(mx.array(-1), mx.array(2), stream=mx.cpu)[0].item() == 0
