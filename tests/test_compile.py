"""`mx.compile` around every transform and inside of it; state that it captures."""

from __future__ import annotations

import functools

import libraries
import mlx.core as mx
import pytest
from libraries import OURS, normal

import mlxshim as shim
from mlxshim import grad, vmap

numbers = functools.partial(normal, OURS)
same = functools.partial(libraries.same, tol=1e-5)


W = numbers(3, 3, seed=9)


def vector(x):
    """A vector of a vector, whose second derivatives are not zero."""
    return mx.tanh(W @ x) * x


def scalar(x):
    return (mx.sin(x) * vector(x)).sum()


def linear(x):
    return W @ x


def of_axis(x):
    return vector(x) - shim.pmean(x, "i") + shim.axis_index("i")


def halved(x):
    return shim.while_loop(lambda s: mx.abs(s).max() > 0.5, lambda s: s * 0.5, x)


#: name: (the transform of a function, the function, whether the compiled one fits in)
TRANSFORMS = {
    "vmap": (lambda f: vmap(f), vector),
    "vmap, keyword and axes": (
        lambda f: vmap(lambda x, y: {"a": f(x) + y}, in_axes=(1, None), out_axes=-1),
        vector,
    ),
    "vmap in chunks": (lambda f: vmap(f, chunk_size=2), vector),
    "vmap, named": (lambda f: vmap(f, axis_name="i"), of_axis),
    "grad": (lambda f: grad(lambda x, y: f(x[0]) + f(y)), scalar),
    "value_and_grad": (lambda f: shim.value_and_grad(lambda x, y: f(x[0] * y), (0, 1)), scalar),
    "grad_and_value": (lambda f: shim.grad_and_value(lambda x, y: f(x[0] * y)), scalar),
    "vjp": (lambda f: lambda x, y: shim.vjp(f, x[0])[1](y), vector),
    "jvp": (lambda f: lambda x, y: shim.jvp(f, (x[0],), (y,)), vector),
    "linearize": (lambda f: lambda x, y: shim.linearize(f, x[0])[1](y), vector),
    "linear_transpose": (lambda f: lambda x, y: shim.linear_transpose(f, y)(x[0]), linear),
    "jacrev": (lambda f: lambda x, y: shim.jacrev(f)(y), vector),
    "jacfwd": (lambda f: lambda x, y: shim.jacfwd(f)(y), vector),
    "hessian": (lambda f: lambda x, y: shim.hessian(f)(y), scalar),
    "hvp": (lambda f: lambda x, y: shim.hvp(f, (x[0],), (y,)), scalar),
    "vhp": (lambda f: lambda x, y: shim.vhp(f, (x[0],), (y,)), scalar),
    "scan": (lambda f: lambda x, y: shim.scan(lambda c, x: (f(c + x), c), y, x), vector),
    "map": (lambda f: lambda x, y: shim.map(f, x, batch_size=2), vector),
    "associative_scan": (
        lambda f: lambda x, y: shim.associative_scan(lambda a, b: a + b * 0.5, f(x)),
        lambda x: x * 2,
    ),
    "cond": (
        lambda f: lambda x, y: vmap(lambda x: shim.cond(x.sum() > 0, f, lambda x: -x, x))(x),
        vector,
    ),
    "switch": (
        lambda f: lambda x, y: shim.switch((y.sum() > 0).astype(mx.int32), [f, mx.sin], y),
        vector,
    ),
    "fori_loop": (lambda f: lambda x, y: shim.fori_loop(0, 3, lambda i, y: f(y) + i, y), vector),
    "checkpoint": (lambda f: vmap(grad(lambda x: shim.checkpoint(f)(x).sum())), vector),
    "vmap(grad)": (lambda f: vmap(grad(f)), scalar),
    "grad(vmap)": (lambda f: grad(lambda x, y: (vmap(f)(x) * vmap(f)(x)).sum()), scalar),
    "vmap(hessian)": (lambda f: vmap(shim.hessian(f)), scalar),
    "jvp(vmap(grad))": (lambda f: lambda x, y: shim.jvp(vmap(grad(f)), (x,), (x * x,)), scalar),
    "vmap(vmap)": (
        lambda f: lambda x, y: vmap(vmap(lambda x, y: f(x * y), (0, None)), (None, 0))(x, x),
        vector,
    ),
}
ONE_ARGUMENT = {
    "vmap", "vmap in chunks", "vmap, named", "checkpoint", "vmap(grad)", "vmap(hessian)"
}  # fmt: skip


@pytest.mark.parametrize("name", TRANSFORMS)
def test_compiled_around_and_inside(name):
    transform, fun = TRANSFORMS[name]
    around = mx.compile(transform(fun))
    inside = transform(mx.compile(fun))
    both = mx.compile(transform(mx.compile(fun)))
    # More than once, on other values and another number of samples: what is kept must not be seen.
    for seed, size in ((1, 4), (2, 4)) if "hessian" in name else ((1, 4), (2, 4), (3, 5)):
        x, y = numbers(size, 3, seed=seed), numbers(3, seed=seed + 10)
        args = (x,) if name in ONE_ARGUMENT else (x, y)
        if name.startswith("vmap, keyword"):
            args = (x.T, y)
        want = transform(fun)(*args)
        for compiled in (around, inside, both):
            same(compiled(*args), want)


def test_a_loop_inside_a_compiled_function_that_is_mapped():
    xs = numbers(4, 3)
    want = mx.stack([halved(x) for x in xs])
    same(vmap(mx.compile(halved))(xs), want)
    same(
        vmap(grad(mx.compile(lambda x: halved(x).sum())))(xs),
        vmap(grad(lambda x: halved(x).sum()))(xs),
    )


def test_shapeless():
    f = mx.compile(vmap(grad(scalar)), shapeless=True)
    g = vmap(mx.compile(vector, shapeless=True))
    for size in (2, 2, 5):
        xs = numbers(size, 3, seed=size)
        same(g(xs), vmap(vector)(xs))
        same(f(xs), vmap(grad(scalar))(xs))


# State -------------------------------------------------------------------------------------------


def steps(step, state, count=3):
    """The outputs of some calls, and the state after them."""
    outputs = [step(numbers(4, 3, seed=seed)) for seed in range(count)]
    return outputs, dict(state)


STEPS = {
    "vmap(grad)": lambda w, xs: vmap(grad(lambda w, x: scalar(w * x)), (None, 0))(w, xs),
    "grad(vmap)": lambda w, xs: grad(lambda w: vmap(lambda x: scalar(w * x))(xs).sum())(w),
    "value_and_grad": lambda w, xs: shim.value_and_grad(lambda w: scalar(w * xs[0]))(w)[1],
    "jvp": lambda w, xs: shim.jvp(vmap(lambda x: vector(w * x)), (xs,), (xs,))[1],
    "vjp": lambda w, xs: shim.vjp(lambda w: vmap(lambda x: vector(w * x))(xs), w)[1](xs)[0],
    "hessian": lambda w, xs: shim.hessian(lambda w: scalar(w * xs[0]))(w),
    "hvp": lambda w, xs: shim.hvp(lambda w: scalar(w * xs[0]), (w,), (w,)),
    "scan": lambda w, xs: shim.scan(lambda c, x: (vector(c * w) + x, c), w, xs)[1],
    "checkpoint": lambda w, xs: vmap(grad(shim.checkpoint(lambda x: scalar(w * x))))(xs),
}


@pytest.mark.parametrize("name", STEPS)
def test_state_read_and_changed_around_a_transform(name):
    def made(wrap):
        state = {"w": numbers(3), "n": mx.array(0)}

        def step(xs):
            found = STEPS[name](state["w"], xs)
            state["w"] = state["w"] - 0.1 * shim.tree_leaves(found)[-1].mean()
            state["n"] = state["n"] + 1
            return found

        return steps(wrap(step, state), state)

    want = made(lambda step, state: step)
    same(made(lambda step, state: mx.compile(step, inputs=state, outputs=state)), want)


def test_state_read_inside_a_mapped_function():
    """It is no argument, and is the same for all samples; a change of it reaches the next call."""
    state = {"w": numbers(3)}

    def f(x):
        return scalar(state["w"] * x)

    inside = mx.compile(f, inputs=state)
    around = mx.compile(vmap(grad(f)), inputs=state)
    for seed in (1, 2):
        state["w"] = numbers(3, seed=seed)
        xs = numbers(4, 3, seed=seed + 5)
        want = mx.stack([grad(f)(x) for x in xs])
        same(around(xs), want)
        same(vmap(grad(inside))(xs), want)
        same(grad(lambda xs: vmap(inside)(xs).sum())(xs), want)


def test_state_changed_inside_a_differentiated_function():
    def run(compiled):
        state = {"n": mx.array(0.0)}

        def f(x):
            state["n"] = state["n"] + 1
            return scalar(x[0]) * state["n"]

        step = mx.compile(grad(f), inputs=state, outputs=state) if compiled else grad(f)
        return steps(step, state)

    same(run(True), run(False))


def test_random_state():
    def f(x):
        return x * mx.random.normal(x.shape) + mx.random.uniform()

    plain, compiled = vmap(f), mx.compile(vmap(f), mx.random.state, mx.random.state)
    xs = mx.ones((4, 3))

    def drawn(step):
        mx.random.seed(5)
        return [step(xs) for _ in range(3)]

    want = drawn(plain)
    same(drawn(compiled), want)
    assert len({str(row.tolist()) for batch in want for row in batch}) == 12
    both = lambda xs: vmap(shim.value_and_grad(lambda x: f(x).sum()))(xs)  # noqa: E731
    want = drawn(both)
    same(drawn(mx.compile(both, mx.random.state, mx.random.state)), want)
    inner = mx.compile(f, mx.random.state, mx.random.state)
    rows = [str(row.tolist()) for batch in drawn(vmap(inner)) for row in batch]
    assert len(set(rows)) == 12


def test_training_with_an_optimizer():
    from mlx import nn, optimizers

    def trained(compiled):
        mx.random.seed(1)
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Dropout(0.2), nn.Linear(4, 1))
        optimizer = optimizers.Adam(0.1)
        state = [model.state, optimizer.state, mx.random.state]

        def loss(params, x):
            model.update(params)
            return (model(x) ** 2).sum()

        def step(xs):
            losses, grads = vmap(shim.value_and_grad(loss), in_axes=(None, 0))(
                model.trainable_parameters(), xs
            )
            optimizer.update(model, shim.tree_map(lambda g: g.mean(axis=0), grads))
            return losses

        step = mx.compile(step, inputs=state, outputs=state) if compiled else step
        losses = [step(numbers(4, 3, seed=seed)) for seed in range(3)]
        return losses, model.trainable_parameters()

    same(trained(True), trained(False))
