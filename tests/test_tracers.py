"""A derivative takes the mark of a tracer from what its function captured; rules still see one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import mlxshim
from mlxshim.core import levels
from mlxshim.core.versions import SELECT_JVP_BUG

Derivative = Callable[[Callable[[mx.array], mx.array], mx.array], mx.array]
# fmt: off
DERIVATIVES: dict[str, Derivative] = {
    "grad": lambda f, w: mlxshim.grad(f)(w),
    "vjp": lambda f, w: mlxshim.vjp(f, [w], [mx.array(1.0)])[1][0],
    "jvp": lambda f, w: mlxshim.jvp(f, [w], [w])[1][0],
    "mx.grad": lambda f, w: mx.grad(f)(w),
    "mx.vjp": lambda f, w: mx.vjp(f, [w], [mx.array(1.0)])[1][0],
    "mx.jvp": lambda f, w: mx.jvp(f, [w], [w])[1][0],
}
# fmt: on


@pytest.mark.parametrize("name", sorted(DERIVATIVES))
def test_what_is_written_after_a_derivative_that_captured_the_array(name: str):
    w, ys = mx.random.normal((3, 2)), mx.random.normal((4, 3, 2))

    def f(y: mx.array) -> mx.array:
        y = mx.tanh(y)
        found = DERIVATIVES[name](lambda w: mx.sum(w * w * y), w)
        y[1:] = mx.ones((2, 2))
        return y + found

    got, want = mlxshim.vmap(f)(ys), mx.stack([f(y) for y in ys])
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    assert not levels.unmarked()


def second(inner: Any, f: Any, x: mx.array, w: mx.array, dx: mx.array, dw: mx.array) -> Any:
    return mlxshim.jvp(lambda x: inner(lambda w: f(x, w), w, dw), [x], [dx])[1][0]


@pytest.mark.skipif(SELECT_JVP_BUG, reason="MLX's own jvp crashes")
@pytest.mark.parametrize("padding", [0, 1])
def test_mixed_second_derivatives_of_a_convolution(padding: int):
    """It is bilinear, so the mixed derivative is the convolution of the two directions."""
    shapes = (1, 3, 3, 2), (2, 2, 2, 2)
    x, dx, w, dw = (mx.random.normal(s) for s in (shapes[0], shapes[0], shapes[1], shapes[1]))

    def f(x: mx.array, w: mx.array) -> mx.array:
        return mx.sum(mx.conv2d(x, w, padding=padding))

    ways = {
        "jvp": lambda g, w, dw: mlxshim.jvp(g, [w], [dw])[1][0],
        "grad": lambda g, w, dw: mx.sum(mlxshim.grad(g)(w) * dw),
        "mx.jvp": lambda g, w, dw: mx.jvp(g, [w], [dw])[1][0],
    }
    for name, way in ways.items():
        np.testing.assert_allclose(
            second(way, f, x, w, dx, dw), f(dx, dw), rtol=1e-4, atol=1e-5, err_msg=name
        )


@pytest.mark.parametrize("outer", ["grad", "jvp"])
@pytest.mark.parametrize("middle", ["grad", "jvp"])
@pytest.mark.parametrize("inner", ["grad", "jvp"])
def test_derivatives_that_capture_the_same_array_all_count(inner, middle, outer):
    """MLX's own lose all but the first: its array is a tracer no more."""

    def derivative(kind, f, x):
        if kind == "grad":
            return mlxshim.grad(f)(x)
        return mlxshim.jvp(f, (x,), (mx.ones_like(x),))[1]

    def h(a):  # 3 a^2
        return derivative(middle, lambda c: derivative(inner, lambda x: c * x**3, a), mx.array(1.0))

    a = mx.array(0.7)
    for f, want in (
        (h, 6 * a),
        (lambda a: h(a) + h(a), 12 * a),
        (lambda a: h(a) + derivative(inner, lambda x: x**3, a), 12 * a),
        (lambda a: h(a) + h(a) + a * a, 14 * a),
        (lambda a: mlxshim.vmap(lambda c: c * (h(a) + h(a)))(mx.ones((2,))).sum(), 24 * a),
    ):
        assert abs(float(derivative(outer, f, a)) - float(want)) < 1e-3
