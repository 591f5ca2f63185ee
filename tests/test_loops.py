"""Loops and branches where JAX answers NaN or hangs, and what their functions have captured."""

from __future__ import annotations

import mlx.core as mx
import pytest
from libraries import same

from mlxshim import NoBatchingRule, PerformanceWarning, cond, grad, jvp, vmap, while_loop

# What JAX leaves to NaN, and hangs on ---------------------------------------------------------


def test_what_is_not_taken_does_not_reach_a_gradient():
    xs = mx.array([4.0, 0.0, -1.0])
    want = mx.array([0.25, 3.0, 3.0])

    def f(x):
        return cond(x > 0, mx.sqrt, lambda x: 3 * x, x)

    def g(x):
        return cond(x > 0, lambda: mx.sqrt(x), lambda: 3 * x)

    for fun in (f, g):
        same(vmap(grad(fun))(xs), want)
        same(grad(lambda xs, fun=fun: vmap(fun)(xs).sum())(xs), want)
        same(vmap(lambda x, fun=fun: jvp(fun, [x], [mx.array(1.0)])[1][0])(xs), want)
        curvature = mx.array([-1 / 32, 0.0, 0.0])
        same(vmap(grad(grad(fun)))(xs), curvature)
        same(grad(lambda xs, fun=fun: vmap(grad(fun))(xs).sum())(xs), curvature)


def test_what_is_finished_does_not_reach_a_gradient():
    def f(x):  # one more round from 0 has no derivative
        return while_loop(lambda s: s > 0.5, lambda s: mx.sqrt(s) - 0.5, x)

    xs = mx.array([0.0, 0.9, 4.0])
    want = mx.array([grad(f)(x).item() for x in xs])
    assert not mx.any(mx.isnan(want))
    same(vmap(grad(f))(xs), want)
    same(grad(lambda xs: vmap(f)(xs).sum())(xs), want)


def test_a_loop_in_a_branch_that_is_not_taken_does_not_run():
    def f(x):  # neither loop ends for the other's samples
        return cond(
            x > 0,
            lambda x: while_loop(lambda s: s > 0, lambda s: s - x, 5 * x),
            lambda x: while_loop(lambda s: s < 0, lambda s: s - x, 5 * x),
            x,
        )

    same(vmap(f)(mx.array([1.0, -2.0])), mx.array([0.0, 0.0]))

    def g(x):  # once it is done, the inner loop would not end
        def body(s):
            return while_loop(lambda t: t != 0, lambda t: t - 1, s) - 1

        return while_loop(lambda s: s > 0, body, x)

    same(vmap(g)(mx.array([3, 0, -2])), mx.array([-1, 0, -2]))


def test_reading_a_predicate_keeps_the_graph_of_an_inner_derivative():
    """MLX's own answer is zero where a value that depends on one has been read."""

    def f(s, a):
        return s**3 - a * s

    def root(a):  # of f's derivative in s, by Newton's method: sqrt(a / 3)
        slope = grad(f)

        def step(s):
            return s - slope(s, a) / grad(slope)(s, a)

        return while_loop(lambda s: mx.abs(slope(s, a)) > 1e-4, step, mx.array(2.0))

    xs = mx.array([1.0, 2.0, 3.0])
    want = 0.5 / mx.sqrt(3 * xs)
    same(mx.array([grad(root)(x).item() for x in xs]), want, 1e-3)
    same(mx.array([jvp(root, [x], [mx.array(1.0)])[1][0].item() for x in xs]), want, 1e-3)
    same(vmap(grad(root))(xs), want, 1e-3)
    same(grad(lambda xs: vmap(root)(xs).sum())(xs), want, 1e-3)
    chosen = lambda x: cond(grad(f)(x, x) > 0, lambda y: y * y, mx.sin, grad(f)(x, x))  # noqa: E731
    same(mx.array([grad(chosen)(x).item() for x in xs]), vmap(grad(chosen))(xs))
    assert grad(chosen)(mx.array(2.0)).item() == 220.0


# What a loop uses -------------------------------------------------------------------------------


def test_variables_are_those_of_the_call():
    """The batching rule runs later: what has been assigned since must not be seen."""

    def f(x):
        total = mx.array(0.0)
        for k in range(1, 4):
            scale = mx.array(1.0 + k)
            x = while_loop(lambda s: s < 10 * k, lambda s: s * scale + k, x)  # noqa: B023
            total = total + x
        scale += 5.0
        return total

    xs = mx.array([1.0, 5.0, 50.0])
    same(vmap(f)(xs), mx.array([f(x).item() for x in xs]))


class Holder:
    def __init__(self, k):
        self.k = k

    def grow(self, s):
        return s * 2 + self.k


def test_objects():
    def constant(x):
        return while_loop(lambda s: s < 10, Holder(1.0).grow, x)

    xs = mx.array([1.0, 5.0, 50.0])
    same(vmap(constant)(xs), mx.array([constant(x).item() for x in xs]))

    def mapped(x):
        return while_loop(lambda s: s < 10, Holder(x).grow, x)

    def changed(x):
        holder = Holder(1.0)
        y = while_loop(lambda s: s < 10, holder.grow, x)
        holder.k = 2.0
        return y

    def counted(x):
        total = mx.array(0.0)

        def step(s):
            nonlocal total
            total = total + s
            return s * 2 + 1

        return while_loop(lambda s: s < 10, step, x) + total

    def listed(x):
        seen = []

        def step(s):
            seen.append(s)
            return s * 2 + 1

        return while_loop(lambda s: s < 10, step, x) + len(seen)

    def shared(x):
        parts = {"k": x}
        inner = grad(lambda s: s * s * parts["k"])

        def step(s):
            parts["k"] = parts["k"] + 1
            return s + mx.abs(inner(s)) + 1

        return while_loop(lambda s: s < 10, step, x)

    for f, reason in (
        (mapped, "neither in its arguments nor in a variable of the function around it"),
        (changed, "a Holder that .* captured has been changed since, .*: pass .* as an argument"),
        (counted, "assigns a variable that it has captured, .*: return the new value"),
        (listed, "a list that a function has captured is changed by it, .*: return the new value"),
        (shared, "changes a container that it has captured, .*: return the new value"),
    ):
        with pytest.warns(PerformanceWarning, match=reason):
            got = vmap(f)(xs)
        same(got, mx.array([f(x).item() for x in xs]))
        with pytest.raises(NoBatchingRule, match=reason):
            vmap(f, fallback="error")(xs)


def test_a_weight_that_is_hidden_from_a_loop_is_no_silent_zero():
    def f(w, x):
        return while_loop(lambda s: s < 10, Holder(w).grow, x)

    w, xs = mx.array(0.5), mx.array([1.0, 5.0])
    want = mx.array([grad(f)(w, x).item() for x in xs])
    with pytest.warns(PerformanceWarning):
        same(vmap(lambda x: grad(f)(w, x))(xs), want)
    same(grad(lambda w: vmap(lambda x: f(w, x))(xs).sum())(w), want.sum())


def test_partials_methods_modules_and_defaults():
    import functools

    from mlx import nn

    layer = nn.Linear(3, 3, bias=False)

    def f(x):
        def step(w, s, scale=x):
            return mx.abs(s @ w) * 1.1 + mx.abs(layer(s)) + scale * x

        return while_loop(lambda s: s.sum() < 9, functools.partial(step, mx.eye(3)), x)

    xs = mx.random.normal((4, 3))
    same(vmap(f)(xs), mx.stack([f(x) for x in xs]))

    def through_module(weight, x):
        inner = nn.Linear(3, 3, bias=False)
        inner.weight = weight
        return while_loop(lambda s: s.sum() < 9, lambda s: mx.abs(inner(s)) + s + 0.1, x).sum()

    ws = mx.random.normal((4, 3, 3))
    want = mx.stack([grad(through_module)(w, x) for w, x in zip(ws, xs)])
    same(vmap(grad(through_module))(ws, xs), want)
