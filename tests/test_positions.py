"""Rotary positions: the second derivative, and what stands in for MLX's before 0.32.4."""

from __future__ import annotations

import mlx.core as mx
import pytest

from mlxshim import grad, hvp, vhp, vmap
from mlxshim.rules.positions_plain import turned

FORMS = {
    "": {},
    "traditional": {"traditional": True},
    "partial": {"dims": 6, "scale": 0.5, "offset": 3},
    "partial traditional": {"dims": 4, "traditional": True},
    "an offset for each": {"offset": mx.array([2, 7])},
    "frequencies": {"base": None, "freqs": mx.array([1.0, 3.0, 10.0, 40.0])},
}
SHAPES = [(2, 3, 5, 8), (2, 5, 8), (2, 2, 3, 5, 8)]


def form(name):
    return {"dims": 8, "traditional": False, "base": 1e4, "scale": 1.0, "offset": 0, **FORMS[name]}


def close(got, want):
    assert got.shape == want.shape and got.dtype == want.dtype
    assert mx.allclose(got, want, rtol=1e-4, atol=1e-4).item()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", FORMS)
def test_by_operations(name, shape):
    x, options = mx.random.normal(shape), form(name)
    offset, freqs = options.pop("offset"), options.pop("freqs", None)
    want = mx.fast.rope(x, offset=offset, freqs=freqs, **options)
    close(turned(x, offset, freqs, **options), want)


@pytest.mark.parametrize("name", FORMS)
def test_hessian_products(name):
    """Forward over reverse, against a difference of gradients that is exact for a cubic."""

    def cubic(x):
        return (mx.fast.rope(x, **form(name)) ** 3).sum()

    x, v = mx.random.normal((2, 4, 2, 3, 5, 8))
    gradient = grad(cubic)
    want = mx.stack([(gradient(a + b) - gradient(a - b)) / 2 for a, b in zip(x, v)])
    close(vmap(lambda a, b: hvp(cubic, a, b)[1])(x, v), want)
    close(hvp(cubic, x[0], v[0])[1], want[0])
    close(vhp(cubic, x[0], v[0])[1], want[0])
