"""Functions with rules of their own against JAX's, under every transform."""

from __future__ import annotations

import functools
import gc
import types
import warnings
import weakref

import mlx.core as mx
import numpy as np
import pytest

import mlxshim
from mlxshim import PerformanceWarning, grad, jvp, vmap

OURS = types.SimpleNamespace(
    **{name: getattr(mlxshim, name) for name in mlxshim.__all__ if name != "map"},
    np=mx,
    jit=mx.compile,
    lax=mlxshim,
    f32=mx.float32,
    i32=mx.int32,
)


@pytest.fixture(scope="module")
def jax():
    jax = pytest.importorskip("jax")
    jnp = pytest.importorskip("jax.numpy")
    batching = pytest.importorskip("jax.custom_batching")
    names = (
        "vmap grad value_and_grad vjp jvp jacrev jacfwd hessian linearize custom_vjp custom_jvp "
        "checkpoint jit lax"
    )
    return types.SimpleNamespace(
        **{name: getattr(jax, name) for name in names.split()},
        np=jnp,
        custom_vmap=batching.custom_vmap,
        f32=jnp.float32,
        i32=jnp.int32,
    )


def same(got, want, tol=1e-4):
    if isinstance(want, (list, tuple)):
        assert len(got) == len(want)
        for a, b in zip(got, want):
            same(a, b, tol)
    elif isinstance(want, dict):
        assert set(got) == set(want)
        for key in want:
            same(got[key], want[key], tol)
    else:
        got, want = np.array(got), np.array(want)
        assert got.shape == want.shape and got.dtype == want.dtype
        np.testing.assert_allclose(got, want, rtol=tol, atol=tol)


# Functions of a scalar: each is run by both libraries. No rule is its function's derivative ---


def with_vjp(lib):
    @lib.custom_vjp
    def f(x, y):
        return lib.np.sin(x) * y

    def fwd(x, y):
        return lib.np.sin(x) * y, (lib.np.cos(x), {"y": y})

    def bwd(res, ct):
        c, rest = res
        return 3 * c * rest["y"] * ct, -2 * c * ct

    f.defvjp(fwd, bwd)
    return lambda x: f(x, x * x) + x


def with_vjp_of_trees(lib):
    def f(scale, tree, k):
        return {"out": tree["a"] * tree["b"][0] * scale, "n": k + 1}

    def fwd(scale, tree, k):
        return f(scale, tree, k), (tree, k, None, "kept")

    def bwd(scale, res, ct):
        tree, _, nothing, word = res
        assert nothing is None and word == "kept"
        return {"a": 5 * ct["out"] * tree["b"][0] * scale, "b": [None, None]}, None

    rule = lib.custom_vjp(f, nondiff_argnums=(0,))
    if lib is OURS:  # JAX's residuals hold no words
        rule.defvjp(fwd, bwd)
    else:
        rule.defvjp(
            lambda s, t, k: (f(s, t, k), (t, k)), lambda s, r, ct: bwd(s, (*r, None, "kept"), ct)
        )
    k = lib.np.array(2)
    return lambda x: rule(0.5, {"a": x, "b": [x + 1, x]}, k)["out"] * x


def with_vjp_of_functions(lib):
    @functools.partial(lib.custom_vjp, nondiff_argnums=(0, 2))
    def apply(fun, x, power=3):
        return fun(x) ** power

    apply.defvjp(
        lambda fun, x, power: (fun(x) ** power, x),
        lambda fun, power, x, ct: (power * fun(x) * ct,),
    )
    return lambda x: apply(lib.np.cos, x) + apply(lib.np.sin, x, 2) * x


def clipped(lib):
    """A second derivative is that of the forward function, not of the rule."""

    @lib.custom_vjp
    def f(x):
        return x

    f.defvjp(lambda x: (x, None), lambda _, ct: (lib.np.clip(ct, -0.5, 0.5),))
    return lambda x: f(x) ** 2 + lib.np.sin(f(x))


def vjp_in_vjp(lib):
    inner = with_vjp(lib)

    @lib.custom_vjp
    def f(x):
        return inner(x) * x

    f.defvjp(lambda x: (f(x), x), lambda x, ct: (inner(x) * ct,))
    return lambda x: f(x) + inner(f(x))


def with_jvp(lib):
    @lib.custom_jvp
    def f(x, y):
        return lib.np.sin(x) * y

    @f.defjvp
    def rule(primals, tangents):
        (x, y), (dx, dy) = primals, tangents
        return f(x, y), 3 * lib.np.cos(x) * y * dx + 7 * y * dy

    return lambda x: f(x, x * x) + x


def with_jvps(lib):
    f = lib.custom_jvp(lambda x, y, z: x * y * z)
    f.defjvps(lambda t, out, x, y, z: 10 * t * y + out * t, None, lambda t, out, x, y, z: t * x)
    return lambda x: f(x, x + 1, lib.np.sin(x))


def with_jvp_of_trees(lib):
    @functools.partial(lib.custom_jvp, nondiff_argnums=(1,))
    def f(tree, fun):
        return {"out": fun(tree["a"]) * tree["n"], "twice": 2 * tree["a"]}

    @f.defjvp
    def rule(fun, primals, tangents):
        (tree,), (along,) = primals, tangents
        slope = 3 * along["a"] * tree["a"]
        return f(tree, fun), {"out": slope, "twice": -slope}

    n = lib.np.array(3)

    def run(x):
        out = f({"a": x, "n": n}, lib.np.cos)
        return out["out"] * x + out["twice"]

    return run


def jvp_in_jvp(lib):
    inner = with_jvp(lib)
    f = lib.custom_jvp(lambda x: inner(x) * x)
    f.defjvp(lambda p, t: (f(*p), inner(p[0]) * t[0] * lib.np.cos(p[0])))
    return lambda x: f(x) + inner(f(x))


def checkpointed(lib):
    w = lib.np.array([0.5, -1.0])

    def block(x, i, scale=2.0):
        return lib.np.sin(x * w[i]) * scale

    safe = lib.checkpoint(block, static_argnums=(1,))
    return lambda x: safe(safe(x, 0), 1, scale=3.0) * x


def checkpoint_of_captured(lib):
    def f(x):
        y = lib.np.sin(x)
        inner = lib.checkpoint(lambda z: lib.np.cos(z * y) * x)
        return lib.checkpoint(lambda: inner(y) * inner(x))()

    return f


def jvp_in_checkpoint(lib):
    inner = with_jvp(lib)
    return lib.checkpoint(lambda x: lib.np.cos(inner(x)) * inner(x * x))


def vjp_in_checkpoint(lib):
    inner = with_vjp(lib)
    return lib.checkpoint(lambda x: lib.np.cos(inner(x)) * inner(x * x))


def checkpoint_in_vjp(lib):
    block = lib.checkpoint(lambda x: lib.np.sin(x * x))

    @lib.custom_vjp
    def f(x):
        return block(x)

    f.defvjp(lambda x: (block(x), block(x * 2)), lambda res, ct: (block(res) * ct,))
    return lambda x: f(x) * x


def in_scan(make):
    def of(lib):
        f = make(lib)

        def run(x):
            def step(carry, y):
                carry = f(carry * y)
                return carry, carry * x

            xs = lib.np.array([0.5, 1.0, -0.3])
            if lib is OURS:
                carry, ys = lib.scan(step, x, xs)
                return carry + ys.sum()
            # Reverse mode of JAX's scan takes the second derivative of a rule that is none for
            # another number than that of its loop.
            carry, ys = x, []
            for y in xs:
                carry, y = step(carry, y)
                ys.append(y)
            return carry + sum(ys)

        return run

    of.__name__ = f"{make.__name__} in scan"
    return of


def in_cond(make):
    def of(lib):
        f = make(lib)
        return lambda x: lib.lax.cond(x > 0, lambda x: f(x) * x, lambda x: 2 * f(-x), x)

    of.__name__ = f"{make.__name__} in cond"
    return of


def in_while(make):
    def of(lib):
        f = make(lib)

        def run(x):
            def body(state):
                return state[0] + 1, f(state[1]) * 0.5 + 0.3

            n = (lib.np.abs(x) * 2).astype(lib.i32) + 1
            return lib.lax.while_loop(lambda state: state[0] < n, body, (n * 0, x))[1]

        return run

    of.__name__ = f"{make.__name__} in while"
    return of


def of_scan(lib):
    @lib.checkpoint
    def loop(x):
        def step(carry, y):
            return lib.np.sin(carry * y) + x, carry

        carry, ys = lib.lax.scan(step, x, lib.np.array([0.5, 1.0, -0.3]))
        return lib.lax.cond(x > 0, lambda: carry * ys.sum(), lambda: carry - (ys * ys).sum())

    return loop


def vjp_of_scan(lib):
    def forward(x):
        return lib.lax.scan(lambda c, y: (lib.np.sin(c * y), c), x, lib.np.array([0.5, 1.0]))

    @lib.custom_vjp
    def f(x):
        return forward(x)[0]

    def bwd(ys, ct):
        return (lib.lax.scan(lambda c, y: (c * y + 1, None), ct, ys)[0],)

    f.defvjp(lambda x: forward(x), bwd)
    return f


REVERSE = [
    with_vjp,
    with_vjp_of_trees,
    with_vjp_of_functions,
    clipped,
    vjp_in_vjp,
    vjp_in_checkpoint,
    checkpoint_in_vjp,
    in_scan(with_vjp),
    in_cond(with_vjp),
    vjp_of_scan,
]
BOTH = [
    with_jvp,
    with_jvps,
    with_jvp_of_trees,
    jvp_in_jvp,
    checkpointed,
    checkpoint_of_captured,
    jvp_in_checkpoint,
    in_scan(with_jvp),
    in_cond(with_jvp),
    in_scan(checkpointed),
    in_cond(checkpointed),
    of_scan,
]


def numbers(lib, *shape, seed=0):
    return lib.np.array(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def compositions(lib, f):
    x, xs, grid = numbers(lib), numbers(lib, 4, seed=1), numbers(lib, 2, 3, seed=2)
    yield "value", f(x)
    yield "vmap", lib.vmap(f)(xs)
    yield "vmap(vmap)", lib.vmap(lib.vmap(f), in_axes=1, out_axes=1)(grid)
    yield "compile(vmap)", lib.jit(lib.vmap(f))(xs)


def reverse(lib, f):
    x, xs, grid = numbers(lib), numbers(lib, 4, seed=1), numbers(lib, 2, 3, seed=2)
    yield from compositions(lib, f)
    yield "grad", lib.grad(f)(x)
    yield "compile(grad)", lib.jit(lib.grad(f))(x)
    yield "grad(compile)", lib.grad(lib.jit(f))(x)
    yield "vmap(grad)", lib.vmap(lib.grad(f))(xs)
    yield "grad(vmap)", lib.grad(lambda xs: (lib.vmap(f)(xs) ** 2).sum())(xs)
    yield "grad(vmap(compile))", lib.grad(lambda xs: lib.vmap(lib.jit(f))(xs).sum())(xs)
    yield "compile(vmap(grad))", lib.jit(lib.vmap(lib.grad(f)))(xs)
    yield "grad(grad)", lib.grad(lib.grad(f))(x)
    yield "vmap(grad(grad))", lib.vmap(lib.grad(lib.grad(f)))(xs)
    yield "grad(vmap(grad))", lib.grad(lambda xs: lib.vmap(lib.grad(f))(xs).sum())(xs)
    yield (
        "grad(grad(vmap))",
        lib.grad(lambda x: lib.grad(lambda x: lib.vmap(f)(x * xs).sum())(x))(x),
    )
    yield "vmap(vmap(grad))", lib.vmap(lib.vmap(lib.grad(f)))(grid)
    yield "vmap(grad(vmap))", lib.vmap(lib.grad(lambda xs: lib.vmap(f)(xs).sum()))(grid)
    yield "grad(vmap(vmap))", lib.grad(lambda g: lib.vmap(lib.vmap(f))(g).sum())(grid)
    yield "jacrev(vmap)", lib.jacrev(lib.vmap(f))(xs)
    yield "vjp", lib.vjp(lib.vmap(f), xs)[1](xs)
    # Samples that share the argument.
    yield "grad, shared", lib.grad(lambda x: lib.vmap(lambda y: f(x) * y + f(x + y))(xs).sum())(x)


def both(lib, f):
    x, xs, ts = numbers(lib), numbers(lib, 4, seed=1), numbers(lib, 4, seed=2)
    yield from reverse(lib, f)
    yield "jvp", lib.jvp(f, (x,), (ts[0],))
    yield "jvp(vmap)", lib.jvp(lib.vmap(f), (xs,), (ts,))
    yield "vmap(jvp)", lib.vmap(lambda x, t: lib.jvp(f, (x,), (t,)))(xs, ts)
    yield "jacfwd(vmap)", lib.jacfwd(lib.vmap(f))(xs)
    yield "hessian", lib.hessian(f)(x)
    yield "vmap(hessian)", lib.vmap(lib.hessian(f))(xs)
    yield "jvp(grad)", lib.jvp(lib.grad(f), (x,), (ts[0],))
    yield "grad(jvp)", lib.grad(lambda x: lib.jvp(f, (x,), (ts[0],))[1])(x)
    yield "jvp(jvp)", lib.jvp(lambda x: lib.jvp(f, (x,), (x,))[1], (x,), (ts[0],))
    yield "vmap(jvp(grad))", lib.vmap(lambda x, t: lib.jvp(lib.grad(f), (x,), (t,)))(xs, ts)
    yield "jvp(vmap(grad))", lib.jvp(lib.vmap(lib.grad(f)), (xs,), (ts,))
    yield "linearize", lib.linearize(lib.vmap(f), xs)[1](ts)


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
        xs, ts = numbers(lib, 4, seed=1), numbers(lib, 4, seed=2)
        return [lib.vmap(f)(xs), lib.jvp(lib.vmap(f), (xs,), (ts,)), f(xs[0])]

    same(under(OURS), under(jax))
    xs = numbers(OURS, 4, seed=1)
    for made in (with_vjp, with_jvp, checkpointed):
        f = in_while(made)(OURS)
        want = mx.array([grad(f)(x).item() for x in xs])
        same(vmap(grad(f))(xs), want)
        same(grad(lambda xs, f=f: vmap(f)(xs).sum())(xs), want)


# custom_vmap -------------------------------------------------------------------------------------


def with_rule(lib, seen):
    @lib.custom_vmap
    def f(x, tree):
        return {"sum": x + tree["y"], "y": lib.np.sin(tree["y"])}

    @f.def_vmap
    def rule(axis_size, in_batched, x, tree):
        x_batched, tree_batched = in_batched
        seen.append((axis_size, x_batched, tree_batched["y"], x.shape, tree["y"].shape))
        return (
            {"sum": 100 * x + tree["y"], "y": lib.np.cos(tree["y"])},
            {"sum": x_batched or tree_batched["y"], "y": tree_batched["y"]},
        )

    return f


def test_custom_vmap(jax):
    def under(lib):
        seen = []
        f = with_rule(lib, seen)
        xs, grid = numbers(lib, 4, seed=1), numbers(lib, 3, 4, seed=2)
        both = lambda x, y: f(x, {"y": y})  # noqa: E731
        sums = lambda *a: lib.vmap(both)(*a)["sum"].sum()  # noqa: E731
        found = [
            both(xs[0], xs[1]),
            lib.vmap(both)(xs, xs),
            lib.vmap(both, in_axes=(0, None))(xs, xs[0]),
            lib.vmap(both, in_axes=(None, 0))(xs[0], xs),
            lib.vmap(both, in_axes=(None, 1))(xs[:3], grid),
            lib.vmap(lib.vmap(both, in_axes=(0, None)), in_axes=(None, 0))(xs, xs),
            lib.vmap(lib.vmap(both))(grid, grid),
            lib.grad(sums)(xs, xs),
            lib.jvp(lib.vmap(both), (xs, xs), (xs, xs)),
            lib.vmap(lambda x: lib.jvp(both, (x, x), (x, x)))(xs),
            lib.jit(lib.vmap(both))(xs, xs),
        ]
        return found, [entry[:3] for entry in seen[:4]]

    (got, seen), (want, seen_by_jax) = under(OURS), under(jax)
    same(got, want)
    assert seen == seen_by_jax


def test_custom_vmap_where_jax_has_no_derivative():
    f = mlxshim.custom_vmap(lambda x, y: mx.sin(x) * y)
    calls = []

    @f.def_vmap
    def rule(size, in_batched, x, y):
        calls.append(size)
        return mx.sin(x) * y, True

    xs, ys = numbers(OURS, 4), numbers(OURS, 4, seed=1)
    plain = lambda x, y: mx.sin(x) * y  # noqa: E731
    for transform in (
        lambda f: vmap(grad(f, argnums=(0, 1))),
        lambda f: vmap(grad(grad(f))),
        lambda f: vmap(lambda x, y: jvp(grad(f), (x, y), (y, x))),
        lambda f: vmap(lambda x, y: vmap(grad(f), in_axes=(None, 0))(x, ys) * y),
        lambda f: grad(lambda x, y: vmap(grad(f))(x, y).sum()),
        lambda f: mx.compile(vmap(grad(f))),
    ):
        calls.clear()
        same(transform(f)(xs, ys), transform(plain)(xs, ys))
        assert calls and set(calls) == {4}


# Checkpoints -------------------------------------------------------------------------------------


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

    model, x = Block(), numbers(OURS, 4, 3)

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

    w = numbers(OURS, 3)
    mapped = lambda w, wrap: wrap(vmap(lambda x: mx.sin(x * w)))(x).sum()  # noqa: E731
    with pytest.warns(PerformanceWarning, match="another transform"):
        got = grad(lambda w: mapped(w, mlxshim.checkpoint))(w)
    same(got, grad(lambda w: mapped(w, lambda f: f))(w))
    mapped = mlxshim.checkpoint(vmap(lambda x: mx.sin(x * x)))
    same(grad(lambda x: mapped(x).sum())(x), 2 * x * mx.cos(x * x))


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
        f, xs = make(lib), lib.np.abs(numbers(lib, 4)) + 0.5
        return [
            lib.vmap(f)(xs),
            lib.grad(f)(xs[0]),
            lib.vmap(lib.grad(f))(xs),
            lib.grad(lambda xs: lib.vmap(f)(xs).sum())(xs),
            lib.grad(lib.grad(f))(xs[0]),
            lib.vmap(lib.grad(lib.grad(f)))(xs),
        ]

    same(under(OURS), under(jax), 1e-3)


RULES = {
    "no NaN of what a rule replaces": lambda lib, x: [
        wrap(lib.grad(f))(x * 0 if wrap is lib.vmap else x[0] * 0)
        for wrap in (lib.vmap, lambda g: g)
        for f in (
            rules(lib, lib.np.sqrt, lambda x: (lib.np.sqrt(x), None), lambda _, ct: (ct,)),
            jvp_rule(lib, lib.np.sqrt, lambda p, t: (lib.np.sqrt(p[0]), t[0])),
        )
    ],
    "nothing mapped": lambda lib, x: lib.vmap(
        lambda x: (
            vmap_rule(lib, lambda y: y + 1, lambda n, b, y: (y * 0, True))(lib.np.ones(())) + x
        )
    )(x),
    "a rule in a rule": lambda lib, x: lib.grad(
        lambda x: lib.vmap(
            vmap_rule(
                lib,
                lambda x: x * 2,
                lambda n, b, x: (
                    lib.vmap(
                        rules(lib, lambda x: x * 2, lambda x: (x * 2, None), lambda _, c: (5 * c,))
                    )(x),
                    True,
                ),
            )
        )(x).sum()
    )(x),
    "no arguments": lambda lib, x: rules(
        lib, lambda: x[0], lambda: (x[0], None), lambda _, ct: ()
    )(),
    "names": lambda lib, x: lib.grad(
        rules(
            lib,
            lambda x, s: x * s,
            lambda x, s: (x * s, None),
            lambda s, _, ct: (ct * s * 2,),
            nondiff_argnames=("s",),
        )
    )(x[0], 3.0),
    "an unmapped argument": lambda lib, x: lib.vmap(
        lib.grad(
            rules(
                lib,
                lambda x, y: x * y,
                lambda x, y: (x * y, (x, y)),
                lambda r, ct: (ct * r[1], ct * r[0] * 3),
            ),
            argnums=1,
        ),
        in_axes=(0, None),
    )(x, x[0]),
    "static": lambda lib, x: lib.grad(
        lib.checkpoint(lambda x, up: lib.np.sin(x) if up else x, static_argnums=(1,))
    )(x[0], True),
    "keyword": lambda lib, x: lib.grad(lib.checkpoint(lambda x, *, y: lib.np.sin(x * y["a"])))(
        x[0], y={"a": x[1]}
    ),
}


@pytest.mark.parametrize("name", RULES)
def test_rules(jax, name):
    same(RULES[name](OURS, numbers(OURS, 4)), RULES[name](jax, numbers(jax, 4)))


def test_nothing_is_kept_alive():
    class Kept:
        pass

    def run(make):
        kept = Kept()
        f = make(lambda x: mx.sin(x) if kept else x)
        h = lambda x: f(x) * f(2 * x)  # noqa: E731
        xs = numbers(OURS, 4)
        mx.eval(
            vmap(grad(h))(xs),
            grad(lambda xs: vmap(h)(xs).sum())(xs),
            vmap(grad(grad(h)))(xs),
            grad(h)(xs[0]),
        )
        return weakref.ref(kept)

    for make in (
        mlxshim.checkpoint,
        lambda f: rules(OURS, f, lambda x: (f(x), x), lambda x, ct: (ct * f(x),)),
        lambda f: jvp_rule(OURS, f, lambda p, t: (f(p[0]), t[0] * f(p[0]))),
        lambda f: vmap_rule(OURS, f, lambda n, b, x: (f(x), True)),
    ):
        watch = run(make)
        gc.collect()
        assert watch() is None


# What they use -----------------------------------------------------------------------------------


class Holder:
    def __init__(self, w):
        self.w = w

    def scaled(self, x):
        return mx.sin(x) * self.w


def test_what_a_function_has_captured():
    x, ws = mx.array(0.3), numbers(OURS, 4)

    def scaled(make):
        return lambda w: make(lambda x: mx.sin(x) * w)(x)

    def by_vjp(f):
        g = mlxshim.custom_vjp(f)
        g.defvjp(lambda x: (f(x), x), lambda x, ct: (ct * f(x),))
        return g

    def by_jvp(f):
        g = mlxshim.custom_jvp(f)
        g.defjvp(lambda p, t: (f(*p), t[0] * f(*p)))
        return g

    def hidden(make):
        return lambda w: make(Holder(w).scaled)(x)

    for make in (by_vjp, by_jvp):
        with pytest.raises(TypeError, match="no argument of it"):
            grad(scaled(make))(x)
        with pytest.raises(TypeError, match="no argument of it"):
            vmap(grad(scaled(make)))(ws)
        with pytest.raises(TypeError, match="no argument of it"):
            grad(lambda ws, make=make: vmap(scaled(make))(ws).sum())(ws)
        # Mapped ones are no trouble.
        same(vmap(scaled(make))(ws), mx.sin(x) * ws)
        slopes = vmap(lambda w, make=make: grad(make(lambda x: mx.sin(x) * w))(x))(ws)
        same(slopes, mx.sin(x) * ws)
        for wrap in (scaled, lambda make: hidden(make)):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", PerformanceWarning)
                slope = grad(
                    lambda x, wrap=wrap, make=make: vmap(
                        lambda w: (wrap(lambda f: lambda _: make(f)(x)))(w)
                    )(ws).sum()
                )(x)
            same(slope, (mx.sin(x) * ws).sum())
    same(vmap(grad(scaled(mlxshim.checkpoint)))(ws), mx.sin(x) * mx.ones(4))
    with pytest.warns(PerformanceWarning, match="an array of an object"):
        same(grad(hidden(mlxshim.checkpoint))(x), mx.sin(x))
    constant = by_vjp(lambda x: mx.sin(x) * mx.stop_gradient(ws[0]))
    same(grad(constant)(x), mx.sin(x) * ws[0])


def test_residuals_that_are_functions():
    f = mlxshim.custom_vjp(lambda x: mx.sin(x))
    f.defvjp(lambda x: mlxshim.vjp(mx.sin, x), lambda pullback, ct: pullback(3 * ct))
    xs = numbers(OURS, 4)
    same(vmap(grad(f))(xs), 3 * mx.cos(xs))
    with pytest.warns(PerformanceWarning, match="residuals"):
        got = grad(lambda xs: vmap(f)(xs).sum())(xs)
    same(got, 3 * mx.cos(xs))


def test_draws_in_the_rules():
    f = mlxshim.custom_vjp(lambda x: x * mx.random.normal())

    def fwd(x):
        noise = mx.random.normal()
        return x * noise, noise

    f.defvjp(fwd, lambda noise, ct: (noise * ct,))
    value, slope = vmap(mlxshim.value_and_grad(f))(mx.ones(4))
    same(slope, value)
    assert len(set(value.tolist())) == 4
    value, slope = mlxshim.value_and_grad(f)(mx.array(1.0))
    same(slope, value)


def test_methods_and_keywords(jax):
    def under(lib):
        class Layer:
            @functools.partial(lib.custom_vjp, nondiff_argnums=(0,))
            def f(self, x, y=2.0):
                return x * y

        Layer.f.defvjp(
            lambda self, x, y: (x * y, (x, y)), lambda self, r, ct: (10 * ct * r[1], None)
        )
        g = lib.custom_jvp(lambda x, y=3.0: x * y)
        g.defjvp(lambda p, t: (p[0] * p[1], 20 * t[0] * p[1]))
        x, layer = numbers(lib), Layer()
        return [
            lib.grad(lambda x: Layer.f(layer, x))(x),
            lib.grad(lambda x: Layer.f(layer, y=x * 5, x=x))(x),
            lib.grad(lambda x: g(x))(x),
            lib.grad(lambda x: g(y=x, x=x))(x),
        ]

    same(under(OURS), under(jax))
    same(grad(lambda x: _Layer().f(x))(mx.array(2.0)), mx.array(20.0))


class _Layer:
    @functools.partial(mlxshim.custom_vjp, nondiff_argnums=(0,))
    def f(self, x, y=2.0):
        return x * y


_Layer.f.defvjp(lambda self, x, y: (x * y, y), lambda self, y, ct: (10 * ct * y, None))


def test_complex_cotangents_are_those_of_jax(jax):
    from mlxshim.core.versions import MLX

    if MLX < (0, 32, 0):
        pytest.skip("reverse mode of complex arguments is refused")

    def under(lib):
        f = lib.custom_vjp(lambda z: z * z)
        f.defvjp(lambda z: (z * z, z), lambda z, ct: (3 * z * ct,))
        z = lib.np.array(np.complex64(1 + 2j))
        return lib.vjp(lambda z: f(z) * (1 - 1j), z)[1](z)

    same(under(OURS), under(jax))


def test_under_mlx_s_own_transforms():
    f, g = with_vjp(OURS), with_jvp(OURS)
    xs = numbers(OURS, 4)
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
    xs = numbers(OURS, 4)
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


# Mistakes: an error in JAX too -------------------------------------------------------------------


def rules(lib, fun, fwd, bwd, **options):
    f = lib.custom_vjp(fun, **options)
    f.defvjp(fwd, bwd)
    return f


def jvp_rule(lib, fun, rule):
    f = lib.custom_jvp(fun)
    f.defjvp(rule)
    return f


def vmap_rule(lib, fun, rule):
    f = lib.custom_vmap(fun)
    f.def_vmap(rule)
    return f


SQUARE = {"fun": lambda x: x * x, "fwd": lambda x: (x * x, x)}
MISTAKES = {
    "no vjp": (lambda lib, x: lib.custom_vjp(lambda x: x)(x), AttributeError, "defvjp"),
    "no jvp": (lambda lib, x: lib.custom_jvp(lambda x: x)(x), AttributeError, "defjvp"),
    "no vmap": (lambda lib, x: lib.custom_vmap(lambda x: x)(x), AttributeError, "def_vmap"),
    "forward": (
        lambda lib, x: lib.jvp(rules(lib, **SQUARE, bwd=lambda r, ct: (r,)), (x,), (x,)),
        TypeError,
        "no forward mode",
    ),
    "jacfwd": (
        lambda lib, x: lib.jacfwd(rules(lib, **SQUARE, bwd=lambda r, ct: (r,)))(x),
        TypeError,
        "no forward mode",
    ),
    "fwd": (
        lambda lib, x: lib.grad(rules(lib, lambda x: x, lambda x: x, lambda r, ct: (r,)))(x),
        TypeError,
        r"fwd of .* must return a pair .* found float32\[\]",
    ),
    "bwd": (
        lambda lib, x: lib.grad(rules(lib, **SQUARE, bwd=lambda r, ct: r))(x),
        TypeError,
        "a tuple with a cotangent for each of its 1 arguments",
    ),
    "bwd length": (
        lambda lib, x: lib.grad(rules(lib, **SQUARE, bwd=lambda r, ct: (r, r)))(x),
        TypeError,
        "found a tuple of 2",
    ),
    "bwd shape": (
        lambda lib, x: lib.grad(rules(lib, **SQUARE, bwd=lambda r, ct: (lib.np.ones(3) * r,)))(x),
        ValueError,
        r"number 0 is float32\[3\], the argument float32\[\]",
    ),
    "bwd tree": (
        lambda lib, x: lib.grad(
            rules(lib, lambda t: t["a"], lambda t: (t["a"], t), lambda r, ct: ({"b": ct},))
        )({"a": x}),
        TypeError,
        r"keys \['b'\], the argument a dict with keys \['a'\]",
    ),
    "no array": (
        lambda lib, x: rules(lib, lambda x, s: x, lambda x, s: (x, x), lambda r, ct: (r, None))(
            x, "s"
        ),
        TypeError,
        "nondiff_argnums",
    ),
    "keyword": (
        lambda lib, x: rules(lib, **SQUARE, bwd=lambda r, ct: (r,))(x, z=x),
        TypeError,
        "do not fit",
    ),
    "keyword only": (
        lambda lib, x: lib.grad(
            rules(lib, lambda x, *, k=1: x, lambda x, k: (x, x), lambda r, ct: (r,))
        )(x),
        TypeError,
        "keyword only",
    ),
    "jvp pair": (
        lambda lib, x: lib.grad(jvp_rule(lib, lambda x: x, lambda p, t: t[0]))(x),
        TypeError,
        "must return a pair",
    ),
    "jvp shape": (
        lambda lib, x: lib.grad(
            jvp_rule(lib, lambda x: x, lambda p, t: (p[0], t[0] * lib.np.ones(3)))
        )(x),
        TypeError,
        r"float32\[3\] in place of float32\[\]",
    ),
    "jvp dtype": (
        lambda lib, x: lib.jvp(
            jvp_rule(lib, lambda x: x, lambda p, t: (p[0], t[0].astype(lib.np.float16))), (x,), (x,)
        ),
        TypeError,
        r"float16\[\] in place of float32\[\]",
    ),
    "jvp none": (
        lambda lib, x: lib.jvp(jvp_rule(lib, lambda x: x, lambda p, t: (p[0], None)), (x,), (x,)),
        TypeError,
        r"None in place of float32\[\]",
    ),
    "jvps of nondiff": (
        lambda lib, x: lib.custom_jvp(lambda f, x: x, nondiff_argnums=(0,)).defjvps(None),
        TypeError,
        "use defjvp",
    ),
    "captured": (
        lambda lib, x: lib.grad(
            lambda w: rules(lib, lambda x: x * w, lambda x: (x * w, x), lambda r, ct: (r,))(x)
        )(x),
        TypeError,
        "pass the array as an argument",
    ),
    "nondiff": (
        lambda lib, x: lib.grad(
            rules(
                lib,
                lambda x, y: x * y,
                lambda x, y: (x * y, x),
                lambda y, r, ct: (r,),
                nondiff_argnums=(1,),
            ),
            argnums=1,
        )(x, x),
        TypeError,
        "nondiff_argnums",
    ),
    "vmap pair": (
        lambda lib, x: lib.vmap(vmap_rule(lib, lambda x: x, lambda n, b, x: x))(lib.np.ones(3)),
        ValueError,
        r"a pair \(output, out_batched\)",
    ),
    "vmap tree": (
        lambda lib, x: lib.vmap(
            vmap_rule(lib, lambda x: x, lambda n, b, x: ((x, x), (True, True)))
        )(lib.np.ones(3)),
        ValueError,
        "out_batched of bools",
    ),
    "vmap size": (
        lambda lib, x: lib.vmap(vmap_rule(lib, lambda x: x, lambda n, b, x: (x[0], True)))(
            lib.np.ones(3)
        ),
        ValueError,
        "size 3",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_named(jax, name):
    call, error, match = MISTAKES[name]
    with pytest.raises(Exception):  # noqa: B017
        call(jax, jax.np.array(2.0))
    with pytest.raises(error, match=match):
        call(OURS, mx.array(2.0))


def test_what_is_not_built_says_so():
    with pytest.raises(NotImplementedError, match="policy"):
        mlxshim.checkpoint(mx.sin, policy=lambda *_: True)
    with pytest.raises(NotImplementedError, match="symbolic_zeros"):
        mlxshim.custom_vjp(mx.sin).defvjp(mx.sin, mx.sin, symbolic_zeros=True)
    with pytest.raises(NotImplementedError, match="symbolic_zeros"):
        mlxshim.custom_jvp(mx.sin).defjvp(mx.sin, symbolic_zeros=True)
    for made in (mlxshim.custom_vjp, mlxshim.custom_jvp, mlxshim.custom_vmap, mlxshim.checkpoint):
        with pytest.raises(TypeError, match="must be a function"):
            made(3)
