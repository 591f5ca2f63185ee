"""checkpoint: what is computed anew, with which draws, and what is kept."""

from __future__ import annotations

import mlx.core as mx
import pytest
from libraries import OURS, normal, same

import mlxshim
from mlxshim import PerformanceWarning, grad, jvp, vmap


def test_a_recomputation_draws_what_the_first_run_drew():
    noisy = mlxshim.checkpoint(lambda x: x * mx.random.normal() + mx.sin(x))
    keys = vmap(grad(noisy))(mx.zeros(4))
    assert len(set(keys.tolist())) == 4

    def both(compose):
        """(the values, the gradients) of noise * x at 1: alike where the draws are."""
        f = mlxshim.checkpoint(lambda x: x * mx.random.normal())
        return compose(f)

    value, slope = both(lambda f: mlxshim.value_and_grad(f)(mx.array(1.0)))
    same(slope, value)
    value, slope = both(lambda f: vmap(mlxshim.value_and_grad(f))(mx.ones(4)))
    same(slope, value)
    assert len(set(value.tolist())) == 4
    values = []

    def batch(f, xs):
        values.append(vmap(f)(xs))
        return values[-1].sum(), values[-1]

    (_, value), slope = both(
        lambda f: mlxshim.value_and_grad(lambda xs: batch(f, xs), has_aux=True)(mx.ones(4))
    )
    same(slope, value)
    assert len(set(value.tolist())) == 4
    f = mlxshim.checkpoint(lambda x: x * mx.random.normal())
    same(*reversed(mlxshim.value_and_grad(lambda x: mlxshim.checkpoint(f)(x))(mx.array(1.0))))
    value, slope = mx.value_and_grad(f)(mx.array(1.0))  # MLX's own
    same(slope, value)


def test_a_recomputation_leaves_the_random_state_as_a_run_does():
    def after(f):
        mx.random.seed(3)
        mx.eval(grad(lambda x: f(x) + f(2 * x))(mx.array(1.0)))
        return mx.random.uniform()

    plain = lambda x: x * mx.random.normal()  # noqa: E731
    assert after(plain).item() == after(mlxshim.checkpoint(plain)).item()
    mx.random.seed(3)
    want = grad(lambda x: plain(x) + plain(2 * x))(mx.array(1.0))
    mx.random.seed(3)
    f = mlxshim.checkpoint(plain)
    same(grad(lambda x: f(x) + f(2 * x))(mx.array(1.0)), want)


def test_a_checkpoint_runs_again_and_keeps_little():
    calls = []

    def counted(x):
        calls.append(x.shape)
        return mx.sin(x)

    f = mlxshim.checkpoint(counted)
    for compose in (
        lambda: grad(lambda x: f(x).sum())(mx.ones(3)),
        lambda: vmap(grad(f))(mx.ones(3)),
        lambda: grad(lambda xs: vmap(f)(xs).sum())(mx.ones(3)),
        lambda: mx.grad(lambda x: f(x).sum())(mx.ones(3)),
    ):
        calls.clear()
        same(compose(), mx.cos(mx.ones(3)))
        assert len(calls) == 2

    def deep(x):
        for _ in range(30):
            x = mx.tanh(x * 1.01)
        return x

    def peak(block, compose):
        def loss(x):
            for _ in range(4):
                x = block(x)
            return x.sum()

        x = mx.ones((4, 4096))
        mx.eval(x)
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        mx.eval(compose(loss)(x))
        return mx.get_peak_memory() - before

    for compose in (
        grad,
        lambda loss: vmap(grad(loss)),
        lambda loss: grad(lambda x: vmap(loss)(x).sum()),
    ):
        assert peak(mlxshim.checkpoint(deep), compose) < 0.6 * peak(deep, compose)


def test_a_checkpoint_of_modules_and_integers():
    from mlx import nn

    layer = nn.Sequential(nn.Linear(3, 3), nn.GELU(), nn.Linear(3, 2))
    params = layer.trainable_parameters()
    x, i = mx.random.normal((4, 3)), mx.array([0, 1, 1, 0])

    def loss(params, x, i, block):
        layer.update(params)
        return block(layer)(x)[i] ** 2

    for compose in (
        lambda block: vmap(grad(lambda p, x, i: loss(p, x, i, block)), in_axes=(None, 0, 0)),
        lambda block: grad(
            lambda p, x, i: vmap(lambda p, x, i: loss(p, x, i, block), in_axes=(None, 0, 0))(
                p, x, i
            ).sum()
        ),
    ):
        got = compose(mlxshim.checkpoint)(params, x, i)
        want = compose(lambda f: f)(params, x, i)
        layer.update(params)
        same(mlxshim.tree_leaves(got), mlxshim.tree_leaves(want))

    picked = mlxshim.checkpoint(lambda x, i: mx.sin(x[i]))
    same(vmap(grad(picked))(x, i), vmap(grad(lambda x, i: mx.sin(x[i])))(x, i))
    same(
        jvp(vmap(picked), (x, i), (x, None))[1],
        jvp(vmap(lambda x, i: mx.sin(x[i])), (x, i), (x, None))[1],
    )


def test_what_changes_things_is_not_run_twice():
    seen, weight = {"calls": 0}, mx.array(2.0)

    def f(x):
        seen["calls"] += 1
        return mx.sin(x * weight)

    with pytest.warns(PerformanceWarning, match="changes what it has captured"):
        same(grad(mlxshim.checkpoint(f))(mx.array(0.3)), 2 * mx.cos(mx.array(0.6)))
    assert seen == {"calls": 1}
    assert mlxshim.checkpoint(f)(mx.array(0.0)).item() == 0


def test_a_checkpoint_of_methods_and_transforms():
    from mlx import nn

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def __call__(self, x):
            return mlxshim.checkpoint(self.inner)(x)

        def inner(self, x):
            return mx.sin(self.linear(x)) * x

    model, x = Block(), normal(OURS, 4, 3)

    def loss(call):
        def of(params, x):
            model.update(params)
            return (call(x) ** 2).sum()

        return of

    params = model.trainable_parameters()
    for compose in (grad, lambda f: vmap(grad(f), in_axes=(None, 0))):
        got = compose(loss(model))(params, x)
        want = compose(loss(model.inner))(params, x)
        model.update(params)
        same(mlxshim.tree_leaves(got), mlxshim.tree_leaves(want))

    w = normal(OURS, 3)
    mapped = lambda w, wrap: wrap(vmap(lambda x: mx.sin(x * w)))(x).sum()  # noqa: E731
    with pytest.warns(PerformanceWarning, match="another transform"):
        got = grad(lambda w: mapped(w, mlxshim.checkpoint))(w)
    same(got, grad(lambda w: mapped(w, lambda f: f))(w))
    mapped = mlxshim.checkpoint(vmap(lambda x: mx.sin(x * x)))
    same(grad(lambda x: mapped(x).sum())(x), 2 * x * mx.cos(x * x))


def test_a_compiled_draw_in_a_checkpoint_is_drawn_again():
    f = mlxshim.checkpoint(lambda x: x * mx.random.normal())

    def step(xs):
        return vmap(mlxshim.value_and_grad(f))(xs)

    compiled = mx.compile(step, inputs=mx.random.state, outputs=mx.random.state)
    before = []
    for _ in range(2):
        value, slope = compiled(mx.ones(3))
        same(slope, value)
        before += value.tolist()
    assert len(set(before)) == 6


@pytest.mark.parametrize("inner", ["grad", "jvp"])
@pytest.mark.parametrize("outer", ["grad", "jvp"])
@pytest.mark.parametrize("library", [mx, mlxshim], ids=["mx", "mlxshim"])
def test_mixed_second_derivatives(inner, outer, library):
    """Of sin(x) y: to MLX's own jvp of a checkpoint y is a constant, wherever it came from."""

    def derivative(kind, f, x):
        return grad(f)(x) if kind == "grad" else jvp(f, [x], [mx.array(1.0)])[1][0]

    def product(x, y):
        # Looked up inside the transforms, which replace MLX's.
        return library.checkpoint(lambda x, y: mx.sin(x) * y)(x, y)

    def mixed(x, y):
        return derivative(outer, lambda y: derivative(inner, lambda x: product(x, y), x), y)

    x, ys = mx.array(0.3), mx.array([0.7, -2.0])
    same(mixed(x, ys[0]), mx.cos(x))
    same(vmap(mixed, (None, 0))(x, ys), mx.broadcast_to(mx.cos(x), (2,)))


def test_what_has_no_tangent_is_constant_to_the_derivative_further_out():
    """MLX refuses the gradient of the tangent of a maximum, of which there is none here."""

    def tangent(x, y):
        f = mlxshim.checkpoint(lambda x, y: mx.sin(x) * mx.max(y))
        return jvp(lambda x: f(x, y), [x], [mx.array(1.0)])[1][0]

    x, y = mx.array(0.3), mx.array([1.0, 2.0])
    same(grad(lambda y: tangent(x, y))(y), mx.array([0.0, 1.0]) * mx.cos(x))


def test_policies_keep_everything_or_nothing():
    policies, calls = mlxshim.checkpoint_policies, []

    def block(x):
        calls.append(x)
        return mx.square(mx.sin(x))

    for policy, count in (
        (None, 2),
        (policies.nothing_saveable, 2),
        (policies.everything_saveable, 1),
    ):
        calls.clear()
        mx.eval(grad(mlxshim.checkpoint(block, policy=policy))(mx.array(0.5)))
        assert len(calls) == count


def test_a_result_that_is_there_twice_is_the_same_for_all_axes():
    def twice(x):
        y = mx.abs(mx.sin(mx.broadcast_to(x, (3, 2))))
        return [y, y]

    x, t = mx.random.normal((2, 4)), mx.random.normal((2, 4))
    got = [
        mlxshim.jvp(mlxshim.vmap(f, in_axes=1, out_axes=[2, 1]), [x], [t])
        for f in (mlxshim.checkpoint(twice), twice)
    ]
    for results, wanted in zip(*got):
        for y, want in zip(results, wanted):
            assert y.shape == want.shape and mx.allclose(y, want, atol=1e-6)
