"""Axes: reductions over several between two vmaps, wherever both are mapped; rolls."""

from __future__ import annotations

import itertools

import mlx.core as mx
import pytest

from mlxshim import jvp, vjp, vmap
from mlxshim.testing import loop

REDUCTIONS = {
    f"{name} {axes} {keepdims}": lambda x, n=name, a=axes, k=keepdims: getattr(mx, n)(x, a, k)
    for name, axes, keepdims in itertools.product(
        ("max", "prod", "sum", "logsumexp"), (None, (0, 1), (1, 2)), (False, True)
    )
}
REDUCTIONS["einsum"] = lambda x: mx.einsum("ijk->", x)


@pytest.mark.parametrize("name", REDUCTIONS)
def test_derivatives_of_a_reduction_between_two_vmaps(name: str):
    reduction = REDUCTIONS[name]
    # MLX 0.31's own tangent of one sample is none: it is made of booleans.
    meant = REDUCTIONS[name.replace("logsumexp", "sum")]
    true = (lambda x: mx.log(meant(mx.exp(x)))) if "logsumexp" in name else reduction
    # The last and the last but one, of the inner and of the outer array.
    for inner, outer in itertools.product((2, 3), (3, 4)):
        x = mx.moveaxis(mx.moveaxis(mx.random.normal((2, 3, 4, 5, 6)), 3, inner), 4, outer)
        mapped = vmap(reduction, inner, fallback="error")

        def tangent(x, mapped=mapped):
            return jvp(mapped, (x,), (2 * x,))[1]

        def gradient(x, mapped=mapped, inner=inner):
            outputs, pullback = vjp(mapped, x)
            return mx.moveaxis(pullback(outputs + 1)[0], inner, 0)

        def true_tangent(x):
            return mx.jvp(true, [x], [2 * x])[1][0]

        def true_gradient(x):
            return mx.vjp(true, [x], [true(x) + 1])[1][0]

        for ours, oracle in ((tangent, true_tangent), (gradient, true_gradient)):
            got = vmap(ours, outer, fallback="error")(x)
            want = loop(loop(oracle, (inner,)), (outer,))(x)
            assert got.shape == want.shape
            assert mx.allclose(got, want, rtol=1e-3, atol=1e-3)


def test_a_roll_by_what_is_no_number_says_so():
    x, ns = mx.zeros((2, 3)), mx.array([1, 2])
    with pytest.raises(ValueError, match=r"\[roll\] shift must be an integer.*float32"):
        vmap(lambda n: mx.roll(x, n + 0.5, 0))(ns)
    with pytest.raises(ValueError, match=r"\[roll\] shift has 1 numbers for 2 axes"):
        vmap(lambda n: mx.roll(x, [n], [0, 1]))(ns)
    with pytest.raises(ValueError, match=r"\[roll\] axis 2 is out of range for shape \(2, 3\)"):
        vmap(lambda n: mx.roll(x, n, 2))(ns)
