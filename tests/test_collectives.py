"""Collectives against their meaning on the stacked samples."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

import mlxshim
from mlxshim import (
    all_gather,
    all_to_all,
    axis_index,
    axis_size,
    grad,
    jvp,
    pmax,
    pmean,
    pmin,
    ppermute,
    pshuffle,
    psum,
    psum_scatter,
    pswapaxes,
    vmap,
)

N = 4


def close(a, b):
    assert a.shape == b.shape, (a.shape, b.shape)
    assert mx.allclose(a, b, rtol=1e-5, atol=1e-6), (a, b)


def every(x):
    """`x` for each sample."""
    return mx.broadcast_to(x, (N, *x.shape))


PERM = [(0, 2), (2, 3), (3, 1)]
SENT = mx.array([[0, 0, 0, 0], [0, 0, 0, 1], [1, 0, 0, 0], [0, 0, 1, 0]], mx.float32)

#: name -> (collective, the same on all samples at once); each linear but the extrema.
CASES = {
    "psum": (lambda x: psum(x, "i"), lambda xs: every(xs.sum(0))),
    "pmean": (lambda x: pmean(x, "i"), lambda xs: every(xs.mean(0))),
    "pmax": (lambda x: pmax(x, "i"), lambda xs: every(xs.max(0))),
    "pmin": (lambda x: pmin(x, "i"), lambda xs: every(xs.min(0))),
    "all_gather": (lambda x: all_gather(x, "i"), lambda xs: every(xs)),
    "all_gather-1": (lambda x: all_gather(x, "i", axis=-1), lambda xs: every(xs.moveaxis(0, -1))),
    "all_gather-tiled": (
        lambda x: all_gather(x, "i", tiled=True),
        lambda xs: every(xs.flatten(0, 1)),
    ),
    "ppermute": (lambda x: ppermute(x, "i", PERM), lambda xs: mx.tensordot(SENT, xs, 1)),
    "pshuffle": (lambda x: pshuffle(x, "i", [2, 0, 3, 1]), lambda xs: xs[mx.array([2, 0, 3, 1])]),
    "pswapaxes": (
        lambda x: pswapaxes(mx.stack([x, 2 * x, 3 * x, 4 * x], 1), "i", 1),
        lambda xs: mx.stack([(n + 1) * xs.moveaxis(0, 1) for n in range(N)]),
    ),
    "all_to_all": (
        lambda x: all_to_all(mx.stack([x, 2 * x, 3 * x, 4 * x], 1), "i", 1, -1),
        lambda xs: mx.stack([(n + 1) * xs.moveaxis(0, -1) for n in range(N)]),
    ),
    "all_to_all-tiled": (
        lambda x: all_to_all(mx.tile(x, (4, 1)), "i", 0, 1, tiled=True),
        lambda xs: every(xs.moveaxis(0, 1).flatten(1, 2)),
    ),
    "psum_scatter": (
        lambda x: psum_scatter(mx.stack([x, 2 * x, 3 * x, 4 * x], 1), "i", scatter_dimension=1),
        lambda xs: mx.stack([(n + 1) * xs.sum(0) for n in range(N)]),
    ),
}


@pytest.fixture(params=list(CASES))
def pair(request):
    return CASES[request.param]


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_equals_its_meaning(pair, axis):
    f, meaning = pair
    xs = mx.random.normal((N, 3, 2))
    close(vmap(f, in_axes=axis, axis_name="i")(mx.moveaxis(xs, 0, axis)), meaning(xs))


def test_grad_outside(pair):
    f, meaning = pair
    xs = mx.random.normal((N, 3, 2))
    w = mx.random.normal(meaning(xs).shape)
    got = grad(lambda xs: (vmap(f, axis_name="i")(xs) * w).sum())(xs)
    close(got, mx.grad(lambda xs: (meaning(xs) * w).sum())(xs))


def test_grad_inside_is_that_of_the_sum_over_samples(pair):
    """The transpose of a collective is a collective: every sample's loss sends its cotangent."""
    f, meaning = pair
    xs = mx.random.normal((N, 3, 2))
    w = mx.random.normal(meaning(xs).shape)
    got = vmap(grad(lambda x, w: (f(x) * w).sum()), axis_name="i")(xs, w)
    close(got, mx.grad(lambda xs: (meaning(xs) * w).sum())(xs))


def test_jvp_inside_and_outside(pair):
    f, meaning = pair
    xs, ts = mx.random.normal((N, 3, 2)), mx.random.normal((N, 3, 2))
    want = mx.jvp(meaning, [xs], [ts])[1][0]
    close(vmap(lambda x, t: jvp(f, [x], [t])[1][0], axis_name="i")(xs, ts), want)
    close(jvp(vmap(f, axis_name="i"), [xs], [ts])[1][0], want)


def test_nested_inner_and_outer(pair):
    f, meaning = pair
    xs = mx.random.normal((N, 5, 3, 2))
    want = mx.stack([meaning(xs[:, j]) for j in range(5)], axis=1)
    close(vmap(vmap(f), axis_name="i")(xs), want)  # an unnamed level further in
    close(vmap(vmap(f, axis_name="i"))(mx.swapaxes(xs, 0, 1)), mx.swapaxes(want, 0, 1))
    close(vmap(vmap(f, axis_name="j"), axis_name="i")(xs), want)


def test_compile(pair):
    f, meaning = pair
    xs = mx.random.normal((N, 3, 2))
    close(mx.compile(vmap(f, axis_name="i"))(xs), meaning(xs))


def test_unmapped_operands():
    x, dummy = mx.random.normal((3,)), mx.zeros((N,))
    mapped = {"in_axes": (0, None), "axis_name": "i"}
    close(vmap(lambda d, x: psum(x, "i"), **mapped)(dummy, x), every(N * x))
    close(vmap(lambda d, x: all_gather(x, "i"), **mapped)(dummy, x), every(every(x)))
    close(
        vmap(lambda d, x: ppermute(x, "i", PERM), **mapped)(dummy, x),
        mx.tensordot(SENT, every(x), 1),
    )
    y = mx.random.normal((N, 3))
    close(vmap(lambda d, y: psum_scatter(y, "i"), **mapped)(dummy, y), N * y)


def test_two_names():
    xs = mx.random.normal((N, 5, 3))

    def both(f, x):
        return vmap(vmap(f, axis_name="j"), axis_name="i")(x)

    close(both(lambda x: psum(x, ("i", "j")), xs)[1, 2], xs.sum((0, 1)))
    close(both(lambda x: psum(x, "j"), xs)[:, 0], xs.sum(1))
    close(both(lambda x: x * 0 + axis_index(("i", "j")), xs)[..., 0], mx.arange(20.0).reshape(4, 5))
    assert both(lambda x: x * axis_size(("i", "j")), xs).shape == xs.shape
    inner = both(lambda x: psum(psum(x, "i") * axis_index("j"), "j"), xs)
    close(inner[0, 0], (xs.sum(0) * mx.arange(5)[:, None]).sum(0))


def test_axis_index_under_grad_and_without_arguments():
    xs = mx.random.normal((N, 3))
    got = vmap(grad(lambda x: (x * axis_index("i")).sum()), axis_name="i")(xs)
    close(got, mx.broadcast_to(mx.arange(4.0)[:, None], (N, 3)))
    close(vmap(lambda: axis_index("i"), axis_name="i", axis_size=N)(), mx.arange(4))


def test_outputs_that_collectives_made_the_same():
    xs = mx.random.normal((N, 3))
    close(vmap(lambda x: psum(x, "i") + 1, out_axes=None, axis_name="i")(xs), xs.sum(0) + 1)
    got, mean = vmap(lambda x: (x, pmean(x, "i")), out_axes=(0, None), axis_name="i")(xs)
    close(got, xs)
    close(mean, xs.mean(0))
    loss = lambda xs: vmap(lambda x: pmean(x**2, "i").sum(), out_axes=None, axis_name="i")(xs)  # noqa: E731
    close(grad(loss)(xs), 2 * xs / N)
    with pytest.raises(ValueError, match="out_axes is None"):
        vmap(lambda x: x + psum(x, "i"), out_axes=None, axis_name="i")(xs)


def test_trees():
    xs = mx.random.normal((N, 3))
    got = vmap(lambda x: psum({"a": x, "b": [x * 2, 1.0]}, "i"), axis_name="i")(xs)
    close(got["a"][0], xs.sum(0))
    close(got["b"][0][0], 2 * xs.sum(0))
    close(got["b"][1][0], mx.array(float(N)))


@pytest.mark.parametrize("f", [psum, all_gather, pmax])
def test_numbers_are_arrays(f):
    xs = mx.ones((N,))
    want = vmap(lambda x: f(2 * x, "i"), axis_name="i")(xs)
    close(vmap(lambda x: x * f(2.0, "i"), axis_name="i")(xs), want)


@pytest.mark.parametrize("f", [lambda x: psum_scatter(x, "i"), lambda x: all_to_all(x, "i", 0, 0)])
def test_arrays_of_numpys_are_arrays(f):
    xs, shared = mx.ones((N,)), np.arange(N, dtype=np.float32)
    want = vmap(lambda x: x * f(mx.array(shared)), axis_name="i")(xs)
    close(vmap(lambda x: x * f(shared), axis_name="i")(xs), want)


def test_errors_name_what_is_wrong():
    xs = mx.ones((N, 3))
    with pytest.raises(NameError, match=r"axis_name='k'.*\['i'\]"):
        vmap(lambda x: psum(x, "k"), axis_name="i")(xs)
    with pytest.raises(NameError, match="psum"):
        psum(xs, "i")
    with pytest.raises(ValueError, match="at most once"):
        vmap(lambda x: ppermute(x, "i", [(0, 1), (0, 2)]), axis_name="i")(xs)
    with pytest.raises(ValueError, match="dealt out"):
        vmap(lambda x: psum_scatter(x, "i"), axis_name="i")(xs)
    with pytest.raises(ValueError, match=r"scatter_dimension 0 .* a multiple of 4"):
        vmap(lambda x: psum_scatter(x, "i", tiled=True), axis_name="i")(xs)
    with pytest.raises(ValueError, match=r"scatter_dimension 1 is out of range"):
        vmap(lambda x: psum_scatter(x, "i", scatter_dimension=1), axis_name="i")(xs)
    with pytest.raises(ValueError, match="out of range"):
        vmap(lambda x: all_gather(x, "i", axis=3), axis_name="i")(xs)
    vmap(lambda x: all_gather(x, "i", to="varying"), axis_name="i")(xs)
    with pytest.raises(ValueError, match="to must be 'varying', found 'reduced': leave it out"):
        vmap(lambda x: all_gather(x, "i", to="reduced"), axis_name="i")(xs)
    with pytest.raises(ValueError, match=r"split_axis 0 .* cannot be dealt out to 4"):
        vmap(lambda x: all_to_all(x, "i", 0, 0), axis_name="i")(xs)
    with pytest.raises(ValueError, match="concat_axis 1 is out of range"):
        vmap(lambda x: all_to_all(x, "i", 0, 1), axis_name="i")(mx.ones((N, N)))
    with pytest.raises(ValueError, match="each of the 4 samples once"):
        vmap(lambda x: pshuffle(x, "i", [0, 0, 1, 2]), axis_name="i")(xs)
    assert mlxshim.core.levels.vmaps() == []
