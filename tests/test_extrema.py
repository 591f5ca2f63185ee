"""Running extrema of what is no number: their gradients, for which MLX's process dies."""

from __future__ import annotations

import math

import mlx.core as mx
import pytest

from mlxshim import grad, vjp, vmap
from mlxshim.core.versions import MLX

pytestmark = pytest.mark.skipif(MLX < (0, 32, 0), reason="MLX has no derivative of them")

NAN = float("nan")
#: Of their sum with the weights 1, 2, 3, 4, for (reverse, inclusive).
GRADIENTS = {
    (NAN, 1.0, 2.0, 0.0): {(False, True): [0, 0, 0, 0], (True, True): [0, 0, 5, 4]},
    (1.0, NAN, 2.0, 3.0): {(False, True): [1, 0, 0, 0], (True, False): [0, 0, 0, 5]},
    (NAN, NAN, NAN, NAN): {(False, True): [0, 0, 0, 0], (False, False): [0, 0, 0, 0]},
    (1.0, 3.0, 2.0, 3.0): {(False, True): [1, 5, 0, 4], (True, True): [0, 3, 0, 7]},
}


@pytest.mark.parametrize("numbers", GRADIENTS, ids=str)
def test_gradients_of_running_extrema(numbers: tuple[float, ...]):
    x, weights = mx.array(numbers), mx.arange(1.0, 5.0)
    for (reverse, inclusive), want in GRADIENTS[numbers].items():
        for sign, name in ((1, "cummax"), (-1, "cummin")):

            def extrema(x, name=name, reverse=reverse, inclusive=inclusive):
                return getattr(mx, name)(x, reverse=reverse, inclusive=inclusive)

            gradient = grad(lambda x, f=extrema: (f(x) * weights).sum())
            got = gradient(sign * x).tolist()
            # Before 0.32.4 some of the values pass over what is no number.
            assert got == want if MLX >= (0, 32, 4) else all(map(math.isfinite, got))
            assert vmap(gradient)(mx.stack([sign * x] * 2)).tolist() == [got, got]
            value = vjp(extrema, sign * x)[0]
            assert mx.array_equal(value, extrema(sign * x), equal_nan=True)
