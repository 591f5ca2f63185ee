"""A derivative takes the mark of a tracer from what its function captured; rules still see one."""

from __future__ import annotations

import io
import pickle
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


READS: dict[str, Callable[[mx.array], Any]] = {
    "item": lambda x: x.item(),
    "tolist": lambda x: x.tolist(),
    "bool": bool,
    "int": int,
    "float": float,
    "index": lambda x: [0][(x * 0).astype(mx.int32)],
    "complex": complex,
    "repr": repr,
    "str": str,
    "format": lambda x: f"{x}",
    "pickle": pickle.dumps,
    "dlpack": np.from_dlpack,
    "eval": lambda x: mx.eval(x),
    "async_eval": lambda x: mx.async_eval(x),
    "NumPy, once evaluated": lambda x: (mx.eval(x), np.array(x)),
    "save": lambda x: mx.save(io.BytesIO(), x),
}


@pytest.mark.parametrize("outer", ["grad", "vjp", "jvp"])
@pytest.mark.parametrize("name", sorted(READS))
def test_what_is_read_after_an_inner_derivative_keeps_its_own(name: str, outer: str):
    if name == "index" and not hasattr(mx.array, "__index__"):
        pytest.skip("MLX 0.31 has no __index__")
    read, x = READS[name], mx.array(2.0)

    def f(x: mx.array) -> mx.array:
        y = mx.sin(x)
        z = mlxshim.grad(lambda w: w * w * y)(mx.array(3.0))  # 6 y
        read(z)
        read(y)
        return z * y

    slope = 12 * mx.sin(x) * mx.cos(x)
    want = slope * x if outer == "jvp" else slope
    np.testing.assert_allclose(DERIVATIVES[outer](f, x), want, rtol=1e-5)
    # What is read after the derivative, or in another one, keeps no graph.
    assert not levels.unmarked()


def test_a_value_is_read_after_a_rule_has_taken_a_derivative():
    @mlxshim.custom_vjp
    def cube(x):
        return x**3

    def fwd(x):
        return cube(x), mlxshim.grad(lambda w: w**3 * x)(x) / x

    cube.defvjp(fwd, lambda slope, ct: (slope * ct,))

    def f(x):
        y = mx.sin(x)
        z = cube(y)
        assert y.item() ** 3 == pytest.approx(z.item())
        return z * y

    x = mx.array(2.0)
    np.testing.assert_allclose(
        mlxshim.grad(f)(x), 4 * mx.sin(x) ** 3 * mx.cos(x), rtol=1e-5, atol=1e-6
    )
    assert not levels.unmarked()


def test_a_python_branch_on_an_inner_derivative_is_differentiated():
    """Backtracking: a step is halved until it descends, and the outer gradient goes through it."""

    def descended(a, steps):
        def loss(w):
            return (w - a) ** 4

        w, searching = mx.array(0.0), not steps
        for n in range(3):
            g, step = mlxshim.grad(loss)(w), 1.0 if searching else steps[n]
            while searching and loss(w - step * g) > loss(w):
                step /= 2
            w = w - step * g
            if searching:
                steps.append(step)
        return w

    a, steps = mx.array(1.3), []
    found = mlxshim.grad(lambda a: descended(a, steps))(a)
    assert len(set(steps)) > 1
    np.testing.assert_allclose(found, mlxshim.grad(lambda a: descended(a, steps))(a), rtol=1e-5)
    assert float(found) != 0
