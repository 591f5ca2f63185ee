"""Tangents of what selects, against differences: MLX 0.31's own are no oracle."""

from __future__ import annotations

import mlx.core as mx
import pytest

from mlxshim import jvp, vmap

FUNCTIONS = {
    "logsumexp": lambda x: mx.logsumexp(x),
    "logsumexp/axis": lambda x: mx.logsumexp(x, axis=-1),
    "logsumexp/axes": lambda x: x.logsumexp(axis=(0, 1), keepdims=True),
    "nan_to_num": lambda x: mx.nan_to_num(mx.sin(x)),
    "triu": lambda x: mx.triu(x * x),
    "tril": lambda x: mx.tril(mx.cos(x)),
    "where": lambda x: mx.where(x > 0, mx.sin(x), x * x),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("mapped", [False, True], ids=["one", "vmap"])
def test_tangents_are_differences(name, mapped):
    f, shape = FUNCTIONS[name], (4, 3, 5) if mapped else (3, 5)
    x, t = mx.random.normal(shape), mx.random.normal(shape)
    x = mx.where(mx.abs(x) < 0.2, x + 0.5, x)  # further from the choice than a step
    step = 1e-2

    def tangent(x, t):
        return jvp(f, [x], [t])[1][0]

    def difference(x, t):
        return (f(x + step * t) - f(x - step * t)) / (2 * step)

    got, want = ((vmap(g) if mapped else g)(x, t) for g in (tangent, difference))
    assert got.dtype == mx.float32 and got.shape == want.shape
    assert mx.all(mx.abs(got - want) < 2e-3 * (1 + mx.abs(want))), (got, want)
