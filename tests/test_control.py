"""Checkpoint and custom functions where one sample is not enough to see what goes wrong."""

from __future__ import annotations

import gc
import warnings
import weakref

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from mlxshim import checkpoint, grad, jvp, value_and_grad, vmap, while_loop


def rand(*shape):
    return mx.random.normal(shape)


def same(got, want, tol=1e-5):
    assert got.shape == want.shape
    assert bool(mx.allclose(got, want, rtol=tol, atol=tol)), (got, want)


def layer(x, w):
    return mx.tanh(x @ w) * mx.sin(x.sum())


COMPOSITIONS = {
    "vmap(grad)": lambda f, x, w: vmap(grad(f, argnums=1), in_axes=(0, None))(x[0], w),
    "grad(vmap)": lambda f, x, w: grad(lambda w: vmap(f, in_axes=(0, None))(x[0], w).sum())(w),
    "vmap(vmap(grad))": lambda f, x, w: vmap(
        vmap(grad(f, argnums=1), in_axes=(0, None)), in_axes=(0, None)
    )(x, w),
    "vmap(grad(vmap))": lambda f, x, w: vmap(
        grad(lambda w, x: vmap(f, in_axes=(0, None))(x, w).sum()), in_axes=(None, 0)
    )(w, x),
    "grad(vmap(vmap))": lambda f, x, w: grad(
        lambda w: vmap(vmap(f, in_axes=(0, None)), in_axes=(0, None))(x, w).sum()
    )(w),
    "vmap(grad(grad))": lambda f, x, w: vmap(
        grad(lambda x, w: grad(f, argnums=1)(x, w).sum()), in_axes=(0, None)
    )(x[0], w),
    "grad(vmap(grad))": lambda f, x, w: grad(
        lambda w: vmap(grad(f), in_axes=(0, None))(x[0], w).sum()
    )(w),
    "compile(grad(vmap))": lambda f, x, w: mx.compile(
        grad(lambda w: vmap(f, in_axes=(0, None))(x[0], w).sum())
    )(w),
}


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_a_checkpoint_changes_no_number(name):
    compose, x, w = COMPOSITIONS[name], rand(2, 3, 4), rand(4, 4)

    def plain(x, w):
        return layer(layer(x, w), w).sum()

    def checkpointed(x, w):
        return mx.checkpoint(layer)(mx.checkpoint(layer)(x, w), w).sum()

    same(compose(checkpointed, x, w), compose(plain, x, w), 1e-4)


def test_the_backward_pass_recomputes():
    """The forward's intermediates are not on the backward's path: it runs the function again."""
    calls = []

    def counted(x, w):
        calls.append(x.shape)
        return layer(x, w)

    x, w = rand(5, 3, 4), rand(4, 4)
    vmap(grad(lambda x, w: mx.checkpoint(counted)(x, w).sum()), in_axes=(0, None))(x, w)
    assert calls == [(3, 4)] * 2


def test_the_peak_memory_is_a_checkpoint_s():
    def deep(x, w):
        for _ in range(30):
            x = mx.tanh(x @ w)
        return x

    x, w = rand(4, 64, 64), rand(64, 64) * 0.1
    mx.eval(x, w)

    def peak(block, compose):
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()

        def loss(w, x):
            for _ in range(4):
                x = block(x, w)
            return x.sum()

        mx.eval(compose(loss))
        return mx.get_peak_memory() - before

    for compose in (
        lambda loss: vmap(grad(loss, argnums=1), in_axes=(None, 0))(w, x),
        lambda loss: grad(lambda x: vmap(loss, in_axes=(None, 0))(w, x).sum())(x),
    ):
        recomputed = peak(lambda x, w: mx.checkpoint(deep)(x, w), compose)
        assert recomputed < 0.6 * peak(lambda x, w: deep(x, w), compose)


def test_a_checkpoint_made_before_is_looped_over():
    made_before, x, w = mx.checkpoint(layer), rand(3, 4), rand(4, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got = vmap(grad(lambda x, w: made_before(x, w).sum()), in_axes=(0, None))(x, w)
    same(got, vmap(grad(lambda x, w: layer(x, w).sum()), in_axes=(0, None))(x, w))


@mx.custom_function
def lower_inverse(a):
    return mx.linalg.tri_inv(a, stream=mx.cpu)


@lower_inverse.vjp
def _(a, cotangent, output):
    return cotangent * output


@pytest.mark.parametrize(
    "fun", [lower_inverse, mx.checkpoint(lambda a: mx.linalg.tri_inv(a, stream=mx.cpu))]
)
def test_what_mlx_maps_by_calling_it_again_has_every_rule(fun):
    """The triangular inverse is wrong under MLX's own vmap."""
    a = rand(2, 3, 4, 4) + 3 * mx.eye(4)
    want = mx.stack([mx.stack([fun(x) for x in row]) for row in a])
    same(vmap(fun)(a[0]), want[0], 1e-4)
    same(vmap(vmap(fun))(a), want, 1e-4)
    same(vmap(mx.vmap(fun))(a), want, 1e-4)
    same(mx.compile(vmap(fun))(a[0]), want[0], 1e-4)
    same(vmap(lambda a: vmap(fun)(a) + mx.linalg.tri_inv(a, stream=mx.cpu))(a), 2 * want, 1e-4)


def test_a_draw_in_what_mlx_calls_again():
    layer, x = nn.Dropout(0.5), mx.ones((4, 64))
    made_before = nn.utils.checkpoint(layer)
    with pytest.warns(UserWarning, match="bernoulli"):
        kept = vmap(made_before)(x)
    assert len({str(row.tolist()) for row in kept}) == 4
    inside = vmap(lambda x: nn.utils.checkpoint(layer)(x))(x)
    assert len({str(row.tolist()) for row in inside}) == 4


def test_what_a_checkpoint_captures():
    x, w, shared = rand(3, 4), rand(3, 4), rand(4)

    def loss(x, w, block):
        return block(lambda x: mx.sin(x * w) * shared)(x).sum()

    want = vmap(grad(lambda x, w: loss(x, w, lambda f: f)))(x, w)
    same(vmap(grad(lambda x, w: loss(x, w, mx.checkpoint)))(x, w), want)
    # Where its backward pass comes after the vmap, a mapped array that is no argument is gone.
    with pytest.warns(UserWarning, match="neither an argument"):
        got = grad(lambda x: vmap(lambda x, w: loss(x, w, mx.checkpoint))(x, w).sum())(x)
    same(got, want)


def test_a_loop_in_a_checkpoint_that_would_not_end_at_zero():
    def f(x):
        return while_loop(lambda s: s < 10, lambda s: s * 2, x)

    x = mx.array([1.0, 3.0, 20.0])
    want = mx.array([16.0, 4.0, 1.0])
    same(vmap(grad(lambda x: mx.checkpoint(f)(x)))(x), want)
    same(grad(lambda x: vmap(lambda x: mx.checkpoint(f)(x))(x).sum())(x), want)
    same(vmap(grad(checkpoint(f)))(x), want)
    same(grad(lambda x: vmap(checkpoint(f))(x).sum())(x), want)


def test_as_mlx_lm_checkpoints_a_layer():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.norm = nn.Linear(4, 4), nn.RMSNorm(4)

        def __call__(self, x, mask=None):
            return x + nn.gelu(self.linear(self.norm(x)))

    model = Block()

    def checkpointed(x, mask=None):
        def inner(params, *args, **kwargs):
            model.update(params)
            return model(*args, **kwargs)

        return mx.checkpoint(inner)(model.trainable_parameters(), x, mask=mask)

    def loss(params, x, forward):
        model.update(params)
        return forward(x).sum() ** 2

    params, x = model.trainable_parameters(), rand(3, 2, 4)
    got = vmap(value_and_grad(lambda p, x: loss(p, x, checkpointed)), in_axes=(None, 0))(params, x)
    want = vmap(value_and_grad(lambda p, x: loss(p, x, model)), in_axes=(None, 0))(params, x)
    model.update(params)
    same(got[0], want[0])
    for (_, g), (_, v) in zip(tree_flatten(got[1]), tree_flatten(want[1]), strict=True):
        same(g, v, 1e-4)


def test_integers_among_the_arguments():
    x, i = rand(3, 4), mx.array([[0, 1], [2, 2], [3, 0]])
    f = vmap(grad(lambda x, i: mx.checkpoint(lambda x, i: mx.sin(x[i]).sum())(x, i)))
    same(f(x, i), vmap(grad(lambda x, i: mx.sin(x[i]).sum()))(x, i))


@mx.custom_function
def doubled(x):
    return x * 2


@doubled.vjp
def _hundred(x, cotangent, output):
    return cotangent * 100


@doubled.jvp
def _seven(x, tangent):
    return tangent * 7


def test_a_derivative_of_its_own_survives_a_vmap():
    x = rand(3, 4)
    hundred = mx.full(x.shape, 100.0)
    same(grad(lambda x: vmap(doubled)(x).sum())(x), hundred)
    same(grad(lambda x: vmap(vmap(doubled))(x).sum())(x), hundred)
    same(vmap(grad(lambda x: vmap(doubled)(x).sum()))(x), hundred)
    same(grad(lambda x: vmap(grad(lambda a: (doubled(a) ** 2).sum()))(x).sum())(x), hundred * 200)
    same(jvp(vmap(doubled), [x], [x])[1][0], 7 * x)
    same(vmap(lambda x, t: jvp(vmap(doubled), [x], [t])[1][0])(x, x), 7 * x)


def test_samples_that_share_an_argument_sum_its_cotangents():
    x, w = rand(5, 3), rand(3)

    @mx.custom_function
    def scaled(x, w):
        return x * w

    @scaled.vjp
    def _(primals, cotangent, output):
        return cotangent, 2 * cotangent * primals[0]

    got = grad(lambda w: vmap(scaled, in_axes=(0, None))(x, w).sum())(w)
    same(got, 2 * x.sum(axis=0))


def test_a_custom_function_on_what_no_sample_changes():
    x, w = rand(5, 3), rand(3)
    got = grad(lambda w: vmap(lambda x: x * doubled(w))(x).sum())(w)
    same(got, 100 * x.sum(axis=0))


def test_nothing_is_kept_alive():
    class Kept:
        pass

    def run():
        kept = Kept()

        def f(x):
            return mx.checkpoint(lambda y, kept=kept: mx.sin(y))(doubled(x)).sum()

        mx.eval(grad(lambda x: vmap(f)(x).sum())(rand(3, 4)), vmap(grad(f))(rand(3, 4)))
        return weakref.ref(kept)

    watch = run()
    gc.collect()
    assert watch() is None


def test_compiled_functions_draw_for_each_sample():
    def f(x, shared):
        noise = mx.compile(lambda s: s + mx.random.uniform(), mx.random.state, mx.random.state)
        return x + noise(shared)

    got = vmap(f, in_axes=(0, None))(mx.zeros(5), mx.array(0.0))
    assert len(set(got.tolist())) == 5
    assert len(set(vmap(f, in_axes=(0, None))(mx.zeros(5), mx.array(0.0)).tolist())) == 5


def test_what_a_checkpointed_function_puts_into_a_module_is_taken_out_again():
    """As mlx-lm's trainer does it: the parameters go into the module inside the function."""
    layer = nn.Linear(3, 3)
    before = dict(layer.parameters())

    def call(params, x):
        layer.update(params)
        return mx.tanh(layer(x))

    def loss(params, xs):
        layer.update(params)
        ys = vmap(lambda x: mx.checkpoint(call)(layer.trainable_parameters(), x))(xs)
        return (ys**2).sum() + layer.weight.square().sum()  # read after the call

    def plain(params, xs):
        ys = mx.tanh(xs @ params["weight"].T + params["bias"])
        return (ys**2).sum() + params["weight"].square().sum()

    xs = mx.random.normal((4, 3))
    got = grad(loss)(before, xs)
    want = mx.grad(plain)(before, xs)
    for name, g in got.items():
        assert mx.allclose(g, want[name], rtol=1e-4, atol=1e-5), name
        mx.eval(layer.parameters())  # nothing of a trace is in it
        assert mx.array_equal(layer[name], before[name])
