"""Functions with rules of their own under every transform, against JAX's."""

from __future__ import annotations

import functools

import mlx.core as mx
import pytest
from custom_programs import (
    BOTH,
    REVERSE,
    both,
    checkpointed,
    in_while,
    of_scan,
    reverse,
    with_jvp,
    with_vjp,
)
from libraries import OURS, normal, same

import mlxshim
from mlxshim import grad, jvp, vmap


@pytest.mark.parametrize("make", [*REVERSE, *BOTH], ids=lambda f: f.__name__)
def test_compositions(jax, make):
    kinds = both if make in BOTH else reverse
    want = jax.jit(lambda: dict(kinds(jax, make(jax))))()
    got = kinds(OURS, make(OURS))
    wrong = []
    for name, value in got:
        try:
            same(value, want.pop(name))
        except AssertionError as e:
            wrong.append(f"{name}: {e}")
    assert not wrong, "\n".join(wrong)
    assert not want


@pytest.mark.parametrize("make", [with_jvp, checkpointed], ids=lambda f: f.__name__)
def test_in_a_while_loop(jax, make):
    def under(lib):
        f = in_while(make)(lib)
        xs, ts = normal(lib, 4, seed=1), normal(lib, 4, seed=2)
        return [lib.vmap(f)(xs), lib.jvp(lib.vmap(f), (xs,), (ts,)), f(xs[0])]

    same(under(OURS), under(jax))
    xs = normal(OURS, 4, seed=1)
    for made in (with_vjp, with_jvp, checkpointed):
        f = in_while(made)(OURS)
        want = mx.array([grad(f)(x).item() for x in xs])
        same(vmap(grad(f))(xs), want)
        same(grad(lambda xs, f=f: vmap(f)(xs).sum())(xs), want)


# The examples of JAX's documentation --------------------------------------------------------------


def log1pexp(lib):
    @lib.custom_jvp
    def f(x):
        return lib.np.log(1.0 + lib.np.exp(x))

    @f.defjvp
    def rule(primals, tangents):
        (x,), (dx,) = primals, tangents
        return f(x), (1 - 1 / (1 + lib.np.exp(x))) * dx

    return f


def clip_gradient(lib):
    @lib.custom_vjp
    def clip(lo, hi, x):
        return x

    clip.defvjp(
        lambda lo, hi, x: (x, (lo, hi)),
        lambda res, g: (None, None, lib.np.clip(g, res[0], res[1])),
    )
    return lambda x: lib.np.sin(clip(-0.75, 0.75, x))


def square_root(lib):
    """By a fixed point, whose derivative is that of the implicit function."""

    @functools.partial(lib.custom_vjp, nondiff_argnums=(0,))
    def fixed_point(f, a, guess):
        def unlike(state):
            return lib.np.abs(state[0] - state[1]) > 1e-6

        def step(state):
            return state[1], f(a, state[1])

        return lib.lax.while_loop(unlike, step, (guess, f(a, guess)))[1]

    def fwd(f, a, guess):
        x = fixed_point(f, a, guess)
        return x, (a, x)

    def rev(f, res, ct):
        def back(packed, u):
            a, x, ct = packed
            return ct + lib.vjp(lambda x: f(a, x), x)[1](u)[0]

        a, x = res
        u = fixed_point(back, (a, x, ct), ct)
        return lib.vjp(lambda a: f(a, x), a)[1](u)[0], lib.np.zeros_like(x)

    fixed_point.defvjp(fwd, rev)
    return lambda a: fixed_point(lambda a, x: 0.5 * (x + a / x), a, a)


@pytest.mark.parametrize("make", [log1pexp, clip_gradient, square_root], ids=lambda f: f.__name__)
def test_documented_examples(jax, make):
    def under(lib):
        f, xs = make(lib), lib.np.abs(normal(lib, 4)) + 0.5
        return [
            lib.vmap(f)(xs),
            lib.grad(f)(xs[0]),
            lib.vmap(lib.grad(f))(xs),
            lib.grad(lambda xs: lib.vmap(f)(xs).sum())(xs),
            lib.grad(lib.grad(f))(xs[0]),
            lib.vmap(lib.grad(lib.grad(f)))(xs),
        ]

    same(under(OURS), under(jax), 1e-3)


def test_under_mlx_s_own_transforms():
    f, g = with_vjp(OURS), with_jvp(OURS)
    xs = normal(OURS, 4)
    for h in (f, g, checkpointed(OURS)):
        want = vmap(grad(h))(xs)
        same(mx.vmap(h)(xs), vmap(h)(xs))
        same(mx.grad(lambda xs, h=h: h(xs).sum())(xs), want)
        same(mx.compile(mx.grad(lambda xs, h=h: h(xs).sum()))(xs), want)
        same(mx.grad(lambda xs, h=h: mx.vmap(h)(xs).sum())(xs), want)
        same(vmap(mx.grad(h))(xs), want)
    for h in (f, g):
        want = vmap(grad(h))(xs)
        same(mx.vmap(mx.grad(h))(xs), want)
        same(mx.compile(mx.vmap(mx.grad(h)))(xs), want)
    same(mx.jvp(g, [xs], [xs])[1][0], jvp(g, (xs,), (xs,))[1])


# mx.compile --------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [with_vjp, with_jvp, checkpointed, of_scan])
def test_compiled_with_captured_state(make):
    """State that a compiled function reads and changes by `inputs=` and `outputs=`."""
    xs = normal(OURS, 4)
    f = make(OURS)

    def train(compiled):
        state = {"w": mx.array(0.7), "steps": mx.array(0)}

        def step(xs):
            losses, grads = vmap(mlxshim.value_and_grad(lambda w, x: f(w * x)), (None, 0))(
                state["w"], xs
            )
            state["w"] = state["w"] - 0.1 * grads.mean()
            state["steps"] = state["steps"] + 1
            return losses

        if compiled:
            step = mx.compile(step, inputs=state, outputs=state)
        return [step(xs) for _ in range(3)], state

    same(train(True), train(False))
