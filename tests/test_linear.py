"""vjp, jvp and linearize where MLX's own would go wrong or a second run could differ."""

from __future__ import annotations

import gc
import itertools

import mlx.core as mx
import mlx.nn as nn
import pytest

import mlxshim
from mlxshim import checkpoint, grad, jvp, linear_transpose, linearize, value_and_grad, vjp, vmap
from mlxshim.core.versions import MLX
from mlxshim.testing import loop

X, Y = mx.array([1.0, 2.0]), mx.array([3.0, 5.0])


def close(got, want):
    assert got.shape == want.shape and bool(mx.allclose(got, want, atol=1e-5)), (got, want)


def test_a_stopped_output_takes_no_cotangent_of_another():
    def f(x):
        return mx.stop_gradient(x), 2 * x

    close(vjp(f, [X], [Y, 10 * Y])[1][0], 20 * Y)
    close(vjp(f, X)[1]((Y, 10 * Y))[0], 20 * Y)
    # MLX's own habit, one cotangent for each output that has a derivative, still works.
    close(vjp(f, [X], [Y])[1][0], 2 * Y)
    close(vjp(mx.stop_gradient, X)[1](Y)[0], mx.zeros(2))


@pytest.mark.parametrize("names", [{"primals": [X], "cotangents": [Y]}, {"cotangents": [Y]}])
def test_mlx_form_by_name(names):
    given = () if "primals" in names else ([X],)
    outputs, grads = vjp(mx.sin, *given, **names)
    close(outputs[0], mx.sin(X))
    close(grads[0], mx.cos(X) * Y)


def test_which_form():
    assert type(vjp(mx.sin, [X], [Y])[1]) is list
    assert type(jvp(mx.sin, [X], [Y])[1]) is list
    # Two lists as two arguments that are trees.
    close(vjp(lambda a, b: (a[0] * b[0], 0), [X], [Y], has_aux=True)[1](X)[0][0], X * Y)
    close(jvp(lambda a: 2 * a[0], ([X],), ([Y],))[1], 2 * Y)


def test_an_assignment_to_a_primal_comes_too_late():
    x, y = mx.array(X), mx.array(X)
    _, pullback = vjp(lambda x, y: x * x * y, x, {"y": y}["y"])
    _, tangent_map = linearize(lambda x: x * x, x)
    x[:] = mx.array([0.0, 0.0])
    y += 1
    close(pullback(Y)[0], 2 * X * X * Y)
    close(tangent_map(Y), 2 * X * Y)


DRAWS = {
    "vjp": lambda f, x: (lambda out, pullback: (out, pullback(mx.ones_like(x))[0]))(*vjp(f, x)),
    "linearize": lambda f, x: (lambda out, push: (out, push(mx.ones_like(x))))(*linearize(f, x)),
    "vmap(vjp)": lambda f, x: vmap(lambda x: DRAWS["vjp"](f, x))(x),
    "vjp(vmap)": lambda f, x: DRAWS["vjp"](vmap(f), x),
    "grad(vjp)": lambda f, x: (lambda value, g: (value[1], g))(
        *value_and_grad(
            lambda x: (lambda o, g: ((g * x).sum(), o))(*DRAWS["vjp"](f, x)), has_aux=True
        )(x)
    ),
}


@pytest.mark.parametrize("name", DRAWS)
def test_the_second_run_draws_the_same(name):
    dropout = nn.Dropout(0.5)
    x = mx.ones((4, 64))
    before = mx.random.state[0]
    out, derivative = DRAWS[name](lambda x: dropout(x) + mx.random.uniform(), x)
    kept, same_kept = derivative != 0, derivative == 2
    assert 0 < kept.sum().item() < x.size
    assert mx.all(kept == same_kept).item()
    assert mx.all((out >= 2) == kept).item()
    assert not mx.array_equal(before, mx.random.state[0])
    assert len({str(row.tolist()) for row in kept}) == 4


def test_a_seed_inside_leaves_the_state_to_the_first_run():
    def f(x):
        mx.random.seed(3)
        return x * mx.random.uniform(shape=x.shape)

    out, pullback = vjp(f, X)
    close(pullback(X)[0] * 1.0, out)
    state = mx.random.state[0]
    pullback(X)
    assert mx.array_equal(state, mx.random.state[0])


def test_gradients_of_a_module():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv1d(2, 3, 2, padding=1)
            self.table = mx.array([1, 2, 3])

        def __call__(self, x):
            return mx.tanh(self.conv(x)).sum()

    net, x = Net(), mx.random.normal((1, 4, 2))
    value, grads = value_and_grad(lambda net, x: net(x))(net, x)
    want = mx.grad(lambda p, x: (net.update(p), net(x))[1])({"conv": net.conv.parameters()}, x)
    assert type(grads) is Net and grads["table"] is None
    close(value, net(x))
    close(grads.conv.weight, want["conv"]["weight"])
    close(grads.conv.bias, want["conv"]["bias"])


def test_compiled_around_and_inside():
    def f(x):
        return mx.sin(x) * x

    def both(x, c):
        out, pullback = vjp(f, x)
        return out, pullback(c)[0], jvp(f, (x,), (c,))[1], linearize(f, x)[1](c)

    for got, want in zip(mx.compile(both)(X, Y), both(X, Y)):
        close(got, want)
    compiled = mx.compile(f)
    close(vjp(compiled, X)[1](Y)[0], both(X, Y)[1])
    close(jvp(compiled, (X,), (Y,))[1], both(X, Y)[2])
    close(grad(lambda x: compiled(x).sum())(X), mx.grad(lambda x: f(x).sum())(X))
    mapped = mx.compile(vmap(lambda c: vjp(compiled, X)[1](c)[0]))
    close(mapped(mx.stack([X, Y])), mx.stack([both(X, X)[1], both(X, Y)[1]]))


def test_compiled_with_captured_state():
    """A training step that owns its parameters and the random state, as mlx's examples write it."""
    state = {"w": mx.array([1.0, -2.0]), "steps": mx.array(0)}

    def loss(w, x):
        noise = mx.random.uniform(shape=w.shape)
        return ((w * x * (1 + noise)) ** 2).sum()

    def step(x):
        value, g = value_and_grad(loss)(state["w"], x)
        _, pullback = vjp(lambda w: w * mx.random.uniform(shape=w.shape), state["w"])
        state["w"] = state["w"] - 0.1 * g - 0.01 * pullback(x)[0]
        state["steps"] = state["steps"] + 1
        return value

    def run(step):
        state.update(w=mx.array([1.0, -2.0]), steps=mx.array(0))
        mx.random.seed(7)
        values = [step(x) for x in (X, Y, X)]
        mx.eval(state, values)
        return mx.stack(values), state["w"], state["steps"]

    plain = run(step)
    captured = [state, mx.random.state]
    compiled = run(mx.compile(step, inputs=captured, outputs=captured))
    for got, want in zip(compiled, plain):
        close(got, want)
    assert plain[2].item() == 3 and len(set(plain[0].tolist())) == 3


def test_linear_transpose_reads_no_value():
    like = {"a": mx.zeros((2,)), "b": mx.zeros((3, 2))}
    with pytest.raises(ValueError, match="not linear"):
        linear_transpose(lambda t: t["b"] @ t["a"], like)
    mapped = linear_transpose(vmap(lambda x: x.sum() * 3), mx.zeros((4, 2)))
    close(mapped(mx.arange(4.0))[0], mx.broadcast_to(3 * mx.arange(4.0)[:, None], (4, 2)))
    inside = vmap(lambda x, c: linear_transpose(lambda y: y * x, x)(c)[0])
    close(inside(X, Y), X * Y)


def test_nothing_is_left_in_place():
    _, pullback = vjp(mx.sin, X)
    assert not mlxshim.core.interception.in_place()
    with pytest.raises(ValueError):
        pullback(mx.zeros((3,)))


def test_reverse_mode_of_complex_arrays_is_right_or_refused():
    z, c = mx.array([0.3 + 0.7j]), mx.array([1.0 + 0.0j])
    calls = (
        lambda: mlxshim.vjp(mx.exp, [z], [c])[1][0],
        lambda: mx.conjugate(mlxshim.vjp(mx.exp, z)[1](c)[0]),
        lambda: mx.conjugate(mlxshim.grad(lambda z: mx.exp(z).sum(), holomorphic=True)(z)),
    )
    for call in calls:
        if MLX < (0, 32, 0):
            with pytest.raises(NotImplementedError, match=r"needs MLX 0\.32"):
                call()
        else:
            assert mx.allclose(call(), mx.conjugate(mx.exp(z))), call()


@pytest.mark.parametrize("name", ["vjp", "jvp", "linearize", "jacrev", "jacfwd", "hessian", "hvp"])
def test_nothing_waits_for_the_garbage_collector(name):
    """Arrays are large: once nobody has them their memory is free."""
    x = mx.random.normal((50,))

    def f(x):
        return mx.tanh(x * x).sum()

    call = {
        "vjp": lambda: mlxshim.vjp(f, x)[1](mx.array(1.0)),
        "jvp": lambda: mlxshim.jvp(f, (x,), (x,)),
        "linearize": lambda: mlxshim.linearize(f, x)[1](x),
        "jacrev": lambda: mlxshim.jacrev(f)(x),
        "jacfwd": lambda: mlxshim.jacfwd(f)(x),
        "hessian": lambda: mlxshim.hessian(f)(x),
        "hvp": lambda: mlxshim.hvp(f, x, x),
    }[name]
    for _ in range(4):  # what is kept for later calls
        mx.eval(call())
    gc.collect()
    gc.disable()
    try:
        before = mx.get_active_memory()
        mx.eval(call())
        assert mx.get_active_memory() == before
    finally:
        gc.enable()


MAPPED = [m for m in itertools.product((0, None), repeat=4) if any(axis == 0 for axis in m)]


@pytest.mark.parametrize("place", MAPPED, ids=str)
def test_tangents_of_a_product_of_which_any_are_mapped(place):
    def tangent(a, b, ta, tb):
        return jvp(lambda a, b: mx.tanh(a @ b), [a, b], [ta, tb])[1][0]

    shapes = ((4, 5), (5, 3)) * 2
    arrays = [mx.random.normal(s if axis is None else (2, *s)) for s, axis in zip(shapes, place)]
    got = vmap(tangent, in_axes=place, fallback="error")(*arrays)
    close(got, loop(tangent, place)(*arrays))
    again = vmap(lambda *xs: vmap(tangent, (None,) * 4, axis_size=2)(*xs), in_axes=place)(*arrays)
    assert again.shape == (2, 2, 4, 3)


@pytest.mark.parametrize("place", MAPPED, ids=str)
@pytest.mark.parametrize("argnum", [0, 1])
def test_tangents_of_a_product_in_a_checkpoint_of_which_one_argument_has_one(place, argnum):
    """The other's is zero, which no vmap maps."""

    def tangent(a, b, ta, tb):
        def of_one(x):
            return checkpoint(lambda a, b: mx.tanh(a @ b))(*((x, b), (a, x))[argnum])

        return jvp(of_one, [(a, b)[argnum]], [(ta, tb)[argnum]])[1][0]

    shapes = ((4, 5), (5, 3)) * 2
    arrays = [mx.random.normal(s if axis is None else (2, *s)) for s, axis in zip(shapes, place)]
    close(vmap(tangent, place, fallback="error")(*arrays), loop(tangent, place)(*arrays))


def test_shared_tangents_where_one_is_mapped_by_an_outer_vmap_alone():
    a, b, ta, tb = (mx.random.normal(s) for s in ((4, 5), (5, 3), (2, 4, 5), (5, 3)))
    xs = mx.random.normal((3, 4, 3))

    def tangent(ta, x):
        return jvp(lambda a, b: x * (a @ b), [a, b], [ta, tb])[1][0]

    each = vmap(vmap(tangent, (None, 0)), (0, None), fallback="error")(ta, xs)
    close(each, xs * mx.expand_dims(ta @ b + a @ tb, 1))
