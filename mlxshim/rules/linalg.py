"""Linear algebra: `mx.linalg`, where MLX's own batching rule is missing or wrong.

    qr(A): A = Q R      lu(A): A[P] = L U      solve(A, B): A X = B      tri_inv(A): A^-1

of (..., n, n) or (..., m, n). All take leading batch dimensions, so a rule moves the mapped axis
to the front. Under MLX's own vmap the factorisations QR and LU have no rule (nor then have solve,
det and slogdet of more than 3 rows), and the rule of the triangular inverse inverts the whole
matrix, what lies across the diagonal included: wrong numbers. A derivative of solve with respect to
the matrix MLX has not, with a vmap or without.

Source: mlx/linalg.cpp, mlx/primitives.cpp (`Inverse::vmap`). Derivatives of solve: Giles, "An
extended collection of matrix derivative results", 2008.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from ..core import levels
from ..core.interception import intercept, original
from ..core.primitive import Arrays, Axes, Primitive
from ..core.tracers import is_tracer
from ._mlx_0_31 import matmul
from ._opaque import Opaque


def _raw(name: str, *arrays: mx.array, **static: Any) -> list[mx.array]:
    out = original(mx.linalg, name)(*arrays, **static)
    return [out] if isinstance(out, mx.array) else list(out)


def _place(stream: Any) -> Any:
    """Where to run, in a form that is still true when a rule runs, and hashed by its value."""
    if stream is None or isinstance(stream, mx.Device):
        return (stream or mx.default_device()).type
    return stream


# One matrix ------------------------------------------------------------------------------------


def _one_matrix(name: str) -> None:
    """Intercept a function of one matrix that has no derivative."""

    def lowering(a: mx.array, **static: Any) -> list[mx.array]:
        return _raw(name, a, **static)

    def batch(size: int, arrays: Arrays, axes: Axes, stream: Any) -> list[mx.array]:
        return opaque(_front(arrays[0], axes[0], stream), stream=stream)

    opaque = Opaque(f"linalg.{name}", lowering=lowering, batch=batch)
    # Up to 3 rows a determinant is a polynomial, with a derivative.
    polynomial = name in ("det", "slogdet")

    @intercept(mx.linalg, name)
    def call(a: mx.array, *, stream: Any = None) -> Any:
        if (
            not levels.vmaps()
            or not isinstance(a, mx.array)
            or (polynomial and a.shape[-1:] < (4,))
        ):
            return original(mx.linalg, name)(a, stream=stream)
        outputs = opaque(a, stream=_place(stream))
        return outputs[0] if name == "det" else tuple(outputs)


for _name in ("qr", "lu", "lu_factor", "det", "slogdet"):
    if hasattr(mx.linalg, _name):
        _one_matrix(_name)


def _front(x: mx.array, axis: int | None, stream: Any) -> mx.array:
    return mx.moveaxis(x, axis, 0, stream=stream) if axis else x


# Triangular matrices ---------------------------------------------------------------------------


def _triangular(name: str) -> Primitive:
    """Intercept an inverse of a triangular matrix, which looks at one triangle only."""

    def lowering(a: mx.array, **static: Any) -> list[mx.array]:
        return _raw(name, a, **static)

    def batch(
        size: int, arrays: Arrays, axes: Axes, stream: Any, **static: Any
    ) -> tuple[list[mx.array], list[int]]:
        return primitive(_front(arrays[0], axes[0], stream), stream=stream, **static), [0]

    # MLX does have a batching rule: its wrong result is thrown away.
    primitive = Primitive(f"linalg.{name}", decomposition=lowering, lowering=lowering, batch=batch)

    @intercept(mx.linalg, name)
    def call(a: mx.array, upper: bool = False, *, stream: Any = None) -> mx.array:
        if "vmap" not in levels.active():
            return original(mx.linalg, name)(a, upper, stream=stream)
        return primitive(a, upper=bool(upper), stream=_place(stream))[0]

    return primitive


tri_inv = _triangular("tri_inv")
cholesky_inv = _triangular("cholesky_inv")


@intercept(mx.linalg, "solve_triangular")
def solve_triangular(
    a: mx.array, b: mx.array, *, upper: bool = False, stream: Any = None
) -> mx.array:
    checked = original(mx.linalg, "solve_triangular")(a, b, upper=upper, stream=stream)
    if "vmap" not in levels.active():
        return checked
    with mx.stream(_place(stream)):
        return _times(mx.linalg.tri_inv(a, upper), b)


def _times(a: mx.array, b: mx.array) -> mx.array:
    """`a @ b`, where `b` may be a vector."""
    return matmul(a, b) if b.ndim > 1 else mx.squeeze(matmul(a, mx.expand_dims(b, -1)), -1)


# Solve -----------------------------------------------------------------------------------------


def _solve(a: mx.array, b: mx.array, **static: Any) -> list[mx.array]:
    return _raw("solve", a, b, **static)


def _solve_batch(size: int, arrays: Arrays, axes: Axes, stream: Any) -> list[mx.array]:
    (a, b), (a_axis, b_axis) = arrays, axes
    with mx.stream(stream):
        a, b = _front(a, a_axis, stream), _front(b, b_axis, stream)
        vector = b.ndim - (b_axis is not None) == 1
        if vector:
            b = mx.expand_dims(b, -1)
        if b_axis is None:
            b = mx.broadcast_to(b, (size, *b.shape))
        x = _bound(a, b, stream) if a_axis is not None else _side_by_side(a, b, stream)
        return [mx.squeeze(x, -1) if vector else x]


def _side_by_side(a: mx.array, b: mx.array, stream: Any) -> mx.array:
    """One matrix is factorised once: the samples' right-hand sides are its columns."""
    samples, columns = b.shape[0], b.shape[-1]
    b = mx.moveaxis(b, 0, -1)
    b = mx.reshape(b, (*b.shape[:-2], columns * samples))
    x = _bound(a, b, stream)
    return mx.moveaxis(mx.reshape(x, (*x.shape[:-1], columns, samples)), -1, 0)


def _solve_vjp(primals: Arrays, cotangents: Arrays, outputs: Arrays, stream: Any) -> list[mx.array]:
    """B' = A^-T X',  A' = -B' X^T"""
    (a, b), x = primals, outputs[0]
    with mx.stream(stream):
        to_b = _bound(mx.swapaxes(a, -1, -2), cotangents[0], stream)
        if b.ndim == 1:
            return [-mx.expand_dims(to_b, -1) * x, to_b]
        return [_unbroadcast(-matmul(to_b, mx.swapaxes(x, -1, -2)), a), _unbroadcast(to_b, b)]


def _solve_jvp(primals: Arrays, tangents: Arrays, outputs: Arrays, stream: Any) -> list[mx.array]:
    """dX = A^-1 (dB - dA X)"""
    with mx.stream(stream):
        rest = tangents[1] - _times(tangents[0], outputs[0])
        return [_bound(primals[0], rest, stream)]


def _unbroadcast(x: mx.array, like: mx.array) -> mx.array:
    """The sum over the batch dimensions in which `like` has only one."""
    axes = [i for i, (n, m) in enumerate(zip(x.shape, like.shape)) if n != m]
    return mx.sum(x, axis=axes, keepdims=True) if axes else x


solve = Opaque("linalg.solve", lowering=_solve, batch=_solve_batch, vjp=_solve_vjp, jvp=_solve_jvp)


@intercept(mx.linalg, "solve")
def _call_solve(a: mx.array, b: mx.array, *, stream: Any = None) -> mx.array:
    raw = original(mx.linalg, "solve")(a, b, stream=stream)
    if not levels.active():
        return raw
    return _bound(a.astype(raw.dtype), b.astype(raw.dtype), _place(stream))


def _bound(a: mx.array, b: mx.array, stream: Any) -> mx.array:
    # Of the right-hand side alone MLX has the derivative, and factorises once for both passes.
    if not levels.vmaps() and levels.differentiates() and is_tracer(a):
        return solve.differentiable(a, b, stream=stream)[0]
    return solve(a, b, stream=stream)[0]
