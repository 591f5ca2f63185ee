"""Derivatives through complex numbers, against differences: old versions' own are no oracle."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import pytest

from mlxshim import jvp, vjp, vmap
from mlxshim.core.versions import MLX
from mlxshim.rules.complex import DERIVATIVES

Fun = Callable[[mx.array, mx.array], Any]


def _named(name: str) -> Fun:
    return lambda z, w: getattr(mx, name)(z)


def _in_place(z: mx.array, w: mx.array) -> mx.array:
    z = z + 0
    z **= w
    return z


FUNCTIONS: dict[str, Fun] = {
    name: _named(name) for name in (*DERIVATIVES, "abs", "reciprocal", "sign")
}
FUNCTIONS |= {
    "multiply": lambda z, w: z * w,
    "divide": lambda z, w: z / w,
    "logaddexp": lambda z, w: mx.logaddexp(z, w),
    "logaddexp of rows": lambda z, w: mx.logaddexp(z, w[0]),
    "logaddexp of a number": lambda z, w: mx.logaddexp(mx.real(w), z),
    "logsumexp": lambda z, w: mx.logsumexp(z, axis=0),
    "std": lambda z, w: mx.std(z * mx.array([1.0, 2.0, 4.0]), axis=1),
    "std of all": lambda z, w: (z * mx.array([1.0, 2.0, 4.0])).std(),
    "prod": lambda z, w: mx.prod(z, axis=1),
    "softmax": lambda z, w: mx.softmax(z, axis=1),
    "conjugate": lambda z, w: mx.conjugate(z) * w,
    "norm": lambda z, w: mx.linalg.norm(z),
    "norm of rows": lambda z, w: mx.linalg.norm(z, 3, axis=-1, keepdims=True),
    "norm of a matrix": lambda z, w: mx.linalg.norm(z, 1),
}
POWERS: dict[str, Fun] = {
    "power": lambda z, w: mx.power(z, w),
    "square": lambda z, w: z**2,
    "real base": lambda z, w: 2.5**z,
    "real exponent": lambda z, w: z ** mx.real(w),
    "rows": lambda z, w: z ** w[0],
    "in place": _in_place,
}


def _parts(fun: Fun, a: mx.array, b: mx.array, c: mx.array, d: mx.array) -> list[mx.array]:
    y = fun(a + 1j * b, c + 1j * d)
    return [mx.real(y), mx.imag(y)] if y.dtype == mx.complex64 else [y]


def _products(xs: mx.array, ys: mx.array) -> mx.array:
    return mx.sum(mx.reshape(xs * ys, (len(xs), -1)), axis=1)


def _check(fun: Fun) -> None:
    mx.random.seed(3)
    xs = [mx.random.uniform(0.3, 0.7, (3, 2, 3)) for _ in range(4)]
    vs = [mx.random.normal(x.shape) for x in xs]
    step = 2e-3

    def of(*xs: mx.array) -> list[mx.array]:
        return _parts(fun, *xs)

    def moved(by: float) -> list[mx.array]:
        samples = [of(*(x[n] + by * v[n] for x, v in zip(xs, vs))) for n in range(3)]
        return [mx.stack(list(parts)) for parts in zip(*samples)]

    want = [(up - down) / (2 * step) for up, down in zip(moved(step), moved(-step))]
    cotangents = [mx.random.normal(y.shape) for y in want]
    tangents = vmap(lambda xs, vs: jvp(of, xs, vs)[1])(xs, vs)
    pulled = vmap(lambda xs, cs: vjp(of, xs, cs)[1])(xs, cotangents)
    alone = vjp(of, [x[0] for x in xs], [c[0] for c in cotangents])[1]
    for got, y in zip(tangents, want):
        assert mx.allclose(got, y, rtol=2e-2, atol=2e-2)
    by_vjp = sum(_products(g, v) for g, v in zip(pulled, vs))
    by_differences = sum(_products(c, y) for c, y in zip(cotangents, want))
    assert mx.allclose(by_vjp, by_differences, rtol=2e-2, atol=3e-2)  # pyright: ignore
    for got, one in zip(pulled, alone):
        assert mx.allclose(got[0], one, rtol=1e-4, atol=1e-5)


#: What 0.31 refuses in reverse mode.
LATER = ("logsumexp", "std", "std of all", "prod", "softmax")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name: str):
    if MLX < (0, 32, 0) and name in LATER:
        with pytest.raises(NotImplementedError, match=r"needs MLX 0\.32"):
            _check(FUNCTIONS[name])
    else:
        _check(FUNCTIONS[name])


@pytest.mark.parametrize("name", POWERS)
def test_powers(name: str):
    _check(POWERS[name])


def test_second_derivative_of_a_power():
    z, v = mx.array([0.3 + 0.4j]), mx.array([1.0 + 0.5j])

    def slope(z: mx.array) -> mx.array:
        return jvp(lambda z: z**3, [z], [v])[1][0]

    got = jvp(slope, [z], [v])[1][0]
    assert mx.allclose(mx.abs(got - 6 * z * v * v), mx.zeros(1), atol=1e-4)


def _refused(name: str, fun: Callable[[mx.array], mx.array]) -> None:
    def of_parts(a: mx.array) -> mx.array:
        return mx.real(fun(a + 1j * a))

    x = mx.array([0.5, 0.7])
    with pytest.raises(NotImplementedError, match=rf"\[{name}\] of complex numbers"):
        vjp(of_parts, [x], [x])
    with pytest.raises(NotImplementedError, match=rf"\[{name}\] of complex numbers"):
        jvp(of_parts, [x], [x])
    assert vmap(of_parts)(mx.stack([x, x])).shape == (2, 2)


@pytest.mark.parametrize("name", ["cumprod", "logcumsumexp"])
@pytest.mark.parametrize("method", [False, True], ids=["function", "method"])
def test_running_products_and_sums_of_exponentials_are_refused(name: str, method: bool):
    _refused(name, lambda z: getattr(z, name)() if method else getattr(mx, name)(z))


@pytest.mark.skipif(MLX >= (0, 32, 4), reason="MLX has none of complex numbers")
@pytest.mark.parametrize("name", ["expm1", "sigmoid"])
def test_functions_that_are_wrong_are_refused(name: str):
    _refused(name, lambda z: getattr(mx, name)(z))


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_lengths_whose_squares_are_no_numbers(size: float):
    a, b = mx.array([3.0, 0.0]) * size, mx.array([4.0, 1.0]) * size

    def length(a: mx.array, b: mx.array) -> mx.array:
        return mx.abs(a + 1j * b)

    def sign(a: mx.array, b: mx.array) -> list[mx.array]:
        y = mx.sign(a + 1j * b)
        return [mx.real(y), mx.imag(y)]

    cosines, sines = mx.array([0.6, 0.0]), mx.array([0.8, 1.0])
    values, tangents = jvp(length, [a, b], [mx.full(2, size), mx.zeros(2)])
    pulled = vjp(length, [a, b], [mx.ones(2)])[1]
    for got, want in (
        (values[0] / size, mx.array([5.0, 1.0])),
        (tangents[0] / size, cosines),
        *zip(pulled, (cosines, sines)),
        *zip(vjp(sign, [a, b], [mx.ones(2), mx.ones(2)])[0], (cosines, sines)),
    ):
        assert mx.allclose(got, want, rtol=1e-5, atol=1e-6)
