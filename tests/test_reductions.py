"""Reductions over no entries: MLX's kernel on the CPU may leave what was in the memory."""

from __future__ import annotations

from math import nan

import mlx.core as mx
import pytest

from mlxshim import grad, jvp, vmap

OF_NOTHING = {"sum": 0, "prod": 1, "any": 0, "all": 1, "mean": nan, "var": nan, "std": nan}
#: The shape of one sample, and the axes that are reduced.
SAMPLES = [((2, 0, 2), [0, 1]), ((0, 2, 2), None), ((0, 3, 2), [0, 2]), ((2, 0), -1)]


@pytest.mark.parametrize("owner", [mx, mx.array], ids=["mx", "array"])
@pytest.mark.parametrize("name", OF_NOTHING)
@pytest.mark.parametrize(("shape", "axis"), SAMPLES)
def test_of_mapped_samples(owner, name, shape, axis):
    def reduced(x, keepdims=False):
        return getattr(owner, name)(x, axis, keepdims)

    for keepdims in (False, True):
        form = reduced(mx.zeros(shape), keepdims)
        want = mx.broadcast_to(mx.array(OF_NOTHING[name], form.dtype), (3, *form.shape))
        for in_axis in range(len(shape) + 1):
            x = mx.zeros((*shape[:in_axis], 3, *shape[in_axis:]))
            got = vmap(lambda x, keepdims=keepdims: reduced(x, keepdims), in_axis)(x)
            assert (got.shape, got.dtype) == (want.shape, want.dtype)
            assert mx.array_equal(got, want, equal_nan=name in ("mean", "var", "std")).item()


def test_of_a_norm():
    x = mx.zeros((0, 3, 2))
    assert mx.array_equal(vmap(lambda x: mx.linalg.norm(x.T), 1)(x), mx.zeros(3)).item()


@pytest.mark.parametrize("name", ["sum", "prod"])
def test_what_nothing_was_made_of_has_no_slope(name):
    """Its broadcast is undone by a sum over nothing, of a cotangent that is not contiguous."""

    def loss(x):
        return getattr(mx, name)(mx.swapaxes(mx.broadcast_to(x, (0, 3, 2)), 0, 1), (0, 2)).sum()

    xs = mx.ones((4, 2))
    assert mx.array_equal(vmap(grad(loss))(xs), mx.zeros((4, 2))).item()
    assert jvp(loss, [xs[0]], [xs[0]])[1][0].item() == 0


def test_the_slope_of_a_mean_of_nothing_is_not_a_number():
    x = mx.zeros((0,))
    for name in ("mean", "var", "std"):
        tangent = jvp(lambda x, name=name: getattr(mx, name)(x[None]), [x], [x])[1][0]
        assert mx.isnan(tangent).item(), name
