"""logcumsumexp against the sums written out, whose derivatives MLX has right."""

from __future__ import annotations

import mlx.core as mx
import pytest
from libraries import OURS, normal, same

from mlxshim import grad, jvp, vmap

FORMS = [{}, {"reverse": True}, {"inclusive": False}, {"reverse": True, "inclusive": False}]


def written_out(x, reverse=False, inclusive=True):
    """Of a vector; 0 for the logarithm of nothing."""
    n = mx.arange(x.size)
    i, j = (n[:, None], n) if reverse else (n, n[:, None])
    used = (i <= j) if inclusive else (i < j)
    nothing = mx.logical_not(mx.any(used, axis=1))
    return mx.log(mx.sum(mx.exp(x) * used, axis=1) + nothing)


def along(f, t):
    """The gradient of `f`, times `t`."""
    return lambda x: mx.sum(grad(f)(x) * t)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_derivatives_of_every_order(form):
    """MLX's third one is not a number."""
    x, t = normal(OURS, 4), normal(OURS, 4, seed=2)
    place = slice(None, -1) if form.get("reverse") else slice(1, None)

    def orders(scan):
        def of(x):
            return mx.sum(mx.sin(scan(x)[place]) * mx.array([1.0, -2.0, 3.0]))

        first = along(of, t)
        second = along(first, t)
        tangents = [jvp(f, [x], [t])[1][0] for f in (of, first, second)]
        return grad(of)(x), grad(first)(x), grad(second)(x), tangents

    want = orders(lambda x: written_out(x, **form))
    same(orders(lambda x: mx.logcumsumexp(x, axis=0, **form)), want, 1e-3)


@pytest.mark.parametrize("in_axis", [0, 1, 2])
def test_mapped(in_axis):
    ct = normal(OURS, 5, seed=2)

    def slopes(scan):
        """Of the columns."""

        def of(x):
            return sum(mx.sum(mx.sin(scan(x, i)) * ct) for i in range(2))

        return lambda x: (grad(of)(x), grad(along(of, x))(x))

    ours = slopes(lambda x, i: mx.logcumsumexp(x, axis=0)[:, i])
    wanted = slopes(lambda x, i: written_out(x[:, i]))
    xs = normal(OURS, 3, 5, 2)
    want = tuple(map(mx.stack, zip(*(wanted(x) for x in xs))))
    same(vmap(ours, in_axis)(mx.moveaxis(xs, 0, in_axis)), want, 1e-3)


def test_large_numbers_and_nothing():
    x = mx.array([1000.0, -1000.0, float("-inf"), 1001.0])
    same(grad(lambda x: mx.logcumsumexp(x, axis=0)[-1])(x), mx.softmax(x))
    square = mx.reshape(x, (2, 2))
    same(grad(lambda x: mx.logcumsumexp(x)[-1])(square), mx.reshape(mx.softmax(x), (2, 2)))
