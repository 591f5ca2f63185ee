"""Whole programs, transforms inside transforms as people write them: the same numbers as in JAX.

What one transform makes of one function is tested elsewhere.
"""

from __future__ import annotations

import pytest
from libraries import OURS, normal, same

PROGRAMS = {}


def program(fun):
    PROGRAMS[fun.__name__] = fun
    return fun


@program
def bilevel_optimisation(lib):
    """The gradient of what gradient descent arrives at."""
    np = lib.np

    def inner(theta):
        def loss(w):
            return np.sum(np.square(w - theta)) * np.sum(np.cos(theta * w))

        def step(w, _):
            return w - 0.1 * lib.grad(loss)(w), None

        return lib.lax.scan(step, np.zeros((2,)), None, length=3)[0]

    thetas = normal(lib, 3, 2)
    outer = lib.grad(lambda theta: np.sum(np.square(inner(theta))))(thetas[0])
    return outer, lib.jacfwd(inner)(thetas[0]), lib.vmap(lib.jacrev(inner))(thetas)


@program
def lagrangian_mechanics(lib):
    """Accelerations from an energy, after Lagrangian neural networks (Cranmer et al. 2020)."""
    np = lib.np

    def energy(q, v):
        return 0.5 * np.sum(v * v) * (2 + np.sum(np.cos(q))) - np.sum(np.sin(q))

    def acceleration(q, v):
        mass = np.diag(lib.hessian(energy, 1)(q, v))
        mixed = lib.jacfwd(lib.grad(energy, 1), 0)(q, v)
        return (lib.grad(energy, 0)(q, v) - mixed @ v) / mass

    q, v = normal(lib, 3, 2), normal(lib, 3, 2, seed=1)
    return lib.vmap(acceleration)(q, v), lib.vmap(lib.jacrev(acceleration))(q, v)


@program
def a_differential_equation_in_the_loss(lib):
    """The heat equation's residual of a network, after Raissi et al. 2019."""
    np = lib.np
    parameters = [(normal(lib, 2, 8), normal(lib, 8)), (normal(lib, 8, 1), normal(lib, 1))]

    def u(parameters, t, x):
        (w1, b1), (w2, b2) = parameters
        return (np.tanh(np.stack([t, x]) @ w1 + b1) @ w2 + b2)[0]

    def residual(parameters, t, x):
        u_xx = lib.grad(lib.grad(u, 2), 2)(parameters, t, x)
        return lib.grad(u, 1)(parameters, t, x) - 0.1 * u_xx

    def loss(parameters, t, x):
        return np.mean(np.square(lib.vmap(residual, in_axes=(None, 0, 0))(parameters, t, x)))

    t, x = normal(lib, 5, seed=1), normal(lib, 5, seed=2)
    return lib.value_and_grad(loss)(parameters, t, x)


@program
def derivatives_of_a_solution(lib):
    """How a pendulum's path, by Runge and Kutta's steps, depends on its length."""
    np = lib.np
    times = np.linspace(0.0, 1.0, 6)

    def path(length):
        def slope(y):
            return np.stack([y[1], -length * np.sin(y[0])])

        def step(y, h):
            k1 = slope(y)
            k2 = slope(y + h * k1 / 2)
            k3 = slope(y + h * k2 / 2)
            k4 = slope(y + h * k3)
            y = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
            return y, y

        return lib.lax.scan(step, np.array([1.0, 0.0]), times[1:] - times[:-1])[1]

    def end(length):
        return path(length)[-1, 0]

    several = np.array([1.0, 2.0, 3.0])
    return lib.jacrev(path)(several[0]), lib.vmap(lib.jacfwd(lib.grad(end)))(several)


@program
def tangent_kernel(lib):
    """By Jacobians, and by products with them that never are one."""
    np = lib.np
    weights = {"w": normal(lib, 4, 3), "v": normal(lib, 4)}

    def f(weights, x):
        return np.sum(np.tanh(weights["w"] @ x) * weights["v"])

    def by_jacobians(x1, x2):
        one, two = (lib.vmap(lib.jacrev(f), (None, 0))(weights, x) for x in (x1, x2))
        rows = [(one[k].reshape(len(x1), -1), two[k].reshape(len(x2), -1)) for k in weights]
        return sum(a @ b.T for a, b in rows)

    def by_products(x1, x2):
        def entry(a, b):
            pullback = lib.vjp(lambda w: f(w, a), weights)[1]
            return lib.jvp(lambda w: f(w, b), (weights,), pullback(np.array(1.0)))[1]

        return lib.vmap(lib.vmap(entry, (None, 0)), (0, None))(x1, x2)

    x1, x2 = normal(lib, 3, 3), normal(lib, 2, 3, seed=1)
    return by_jacobians(x1, x2), by_products(x1, x2)


@program
def learning_to_learn(lib):
    """The gradient of a loss after two steps on each of several tasks (Finn et al. 2017)."""
    np = lib.np
    weights = {"w": normal(lib, 3, 4), "v": normal(lib, 4)}

    def loss(weights, x, y):
        return np.mean(np.square(np.tanh(x @ weights["w"]) @ weights["v"] - y))

    def task(weights, x, y, x_new, y_new):
        for _ in range(2):
            slopes = lib.grad(loss)(weights, x, y)
            weights = {name: weights[name] - 0.1 * slopes[name] for name in weights}
        return loss(weights, x_new, y_new)

    data = [normal(lib, *s, seed=n) for n, s in enumerate([(2, 5, 3), (2, 5), (2, 6, 3), (2, 6)])]

    def meta(weights):
        return np.mean(lib.vmap(task, in_axes=(None, 0, 0, 0, 0))(weights, *data))

    return lib.value_and_grad(meta)(weights)


@program
def an_optimiser_in_a_scan(lib):
    """Adam (Kingma and Ba 2015), for one start and for several."""
    np = lib.np

    def loss(p):
        return np.sum(np.square(p["a"] - 3)) + np.sum(p["b"] ** 4)

    def adam(start):
        def step(state, _):
            p, m, v = state
            value, g = lib.value_and_grad(loss)(p)
            m = {k: 0.9 * m[k] + 0.1 * g[k] for k in p}
            v = {k: 0.99 * v[k] + 0.01 * g[k] * g[k] for k in p}
            p = {k: p[k] - 0.1 * m[k] / (np.sqrt(v[k]) + 1e-3) for k in p}
            return (p, m, v), value

        zeros = {k: np.zeros_like(x) for k, x in start.items()}
        return lib.lax.scan(step, (start, zeros, zeros), None, length=5)

    starts = {"a": normal(lib, 3, 2), "b": normal(lib, 3, 4, seed=1)}
    one = {k: x[0] for k, x in starts.items()}
    return lib.vmap(adam)(starts), lib.grad(lambda p: adam(p)[1][-1])(one)


@program
def newton_until_it_is_near(lib):
    """A derivative inside of a loop that ends when each sample does."""
    np = lib.np

    def root(a):
        def f(x):
            return x * x - a

        def far(state):
            return (np.abs(f(state[0])) > 1e-4) & (state[1] < 50)

        def step(state):
            x, steps = state
            return x - f(x) / lib.grad(f)(x), steps + 1

        return lib.lax.while_loop(far, step, (a, np.array(0)))

    values = np.array([1.0, 2.0, 9.0])
    slope = lib.jvp(lambda a: root(a)[0], (values[1],), (np.array(1.0),))
    return lib.vmap(root)(values), slope


@program
def implicit_differentiation(lib):
    """The derivative of a fixed point is one of another fixed point (Christianson 1994)."""
    np = lib.np

    def iterated(f, x):
        def far(pair):
            return np.max(np.abs(pair[0] - pair[1])) > 1e-6

        return lib.lax.while_loop(far, lambda pair: (pair[1], f(pair[1])), (x, f(x)))[1]

    def f(a, x):
        return np.cos(a * x) / 2

    @lib.custom_vjp
    def fixed_point(a, x):
        return iterated(lambda x: f(a, x), x)

    def forward(a, x):
        out = fixed_point(a, x)
        return out, (a, out)

    def backward(kept, cotangent):
        a, x = kept
        u = iterated(lambda u: cotangent + lib.vjp(lambda x: f(a, x), x)[1](u)[0], cotangent)
        return lib.vjp(lambda a: f(a, x), a)[1](u)[0], np.zeros_like(x)

    fixed_point.defvjp(forward, backward)

    def found(a):
        return fixed_point(a, np.zeros_like(a))

    several = np.array([0.3, 0.6, 0.9])
    total = lib.grad(lambda a: np.sum(lib.vmap(found)(a)))
    return lib.vmap(lib.grad(found))(several), total(several)


@program
def perturbations_do_not_meet(lib):
    """Siskind and Pearlmutter 2005."""
    np = lib.np
    one, several = np.array(1.0), np.array([2.0, 3.0])

    def f(x):
        return x * lib.grad(lambda y: x + y)(one)

    def g(x):
        return x * lib.jvp(lambda y: x * y, (one,), (x,))[1]

    def h(x):
        return lib.jvp(lambda s: s * lib.grad(lambda y: x * s * y * y)(one), (x,), (one,))[1]

    return [(lib.grad(k)(several[0]), lib.vmap(lib.hessian(k))(several)) for k in (f, g, h)]


@program
def curvature_by_probes(lib):
    """Hutchinson's trace of a Hessian, by products forward over reverse, and linearized."""
    np = lib.np

    def f(x):
        return np.sum(np.square(np.sin(x)) * x)

    x, probes = normal(lib, 4), np.sign(normal(lib, 6, 4, seed=1))
    of = lib.linearize(lib.grad(f), x)[1]
    products = lib.vmap(lambda v: np.sum(v * lib.jvp(lib.grad(f), (x,), (v,))[1]))(probes)
    return products, lib.vmap(lambda v: np.sum(v * of(v)))(probes)


@pytest.mark.parametrize("name", PROGRAMS)
def test_program(jax, name):
    # Compiled as one: JAX takes longer to compile the operations one by one.
    same(PROGRAMS[name](OURS), jax.jit(lambda: PROGRAMS[name](jax))(), 1e-3)
