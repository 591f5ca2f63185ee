"""Control flow against JAX on the same inputs, and against a loop over the samples."""

from __future__ import annotations

import types

import mlx.core as mx
import numpy as np
import pytest

import mlxshim
from mlxshim import NoBatchingRule, PerformanceWarning, cond, fori_loop, grad, jvp, vmap, while_loop

OURS = types.SimpleNamespace(
    np=mx,
    vmap=vmap,
    grad=grad,
    jvp=lambda f, x, t: jvp(f, [x], [t])[1][0],
    lax=mlxshim,
)


@pytest.fixture(scope="module")
def jax():
    jax = pytest.importorskip("jax")
    jnp = pytest.importorskip("jax.numpy")
    return types.SimpleNamespace(
        np=jnp,
        vmap=jax.vmap,
        grad=jax.grad,
        jvp=lambda f, x, t: jax.jvp(f, (x,), (t,))[1],
        lax=jax.lax,
    )


def same(got, want, tol=2e-5):
    """Trees of arrays of both libraries."""
    if isinstance(want, (list, tuple)):
        assert len(got) == len(want)
        for a, b in zip(got, want):
            same(a, b, tol)
    elif isinstance(want, dict):
        assert set(got) == set(want)
        for key in want:
            same(got[key], want[key], tol)
    elif want is None:
        assert got is None
    else:
        got, want = np.array(got), np.array(want)
        assert got.dtype == want.dtype, (got.dtype, want.dtype)
        np.testing.assert_allclose(got, want, rtol=tol, atol=tol)


def values(lib, *shape, seed=0, positive=False):
    x = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    return lib.np.array(np.abs(x) + 0.1 if positive else x)


# Programs: each is run by both libraries ---------------------------------------------------------


def steps(lib, x):
    return lib.lax.cond(x > 0, lambda x: x * x, lambda x: -3 * x, x)


def closures(lib, x):
    return lib.lax.cond(x > 0, lambda: x * x, lambda: -3 * x)


def trees(lib, x):
    def yes(t):
        return {"a": t["x"] * 2, "b": [lib.np.sin(t["y"]), None]}

    def no(t):
        return {"a": t["x"] + t["y"], "b": [t["y"], None]}

    out = lib.lax.cond(x > 0, yes, no, {"x": x, "y": x + 1})
    return out["a"] * out["b"][0]


def nested_cond(lib, x):
    return lib.lax.cond(
        x > 0,
        lambda x: lib.lax.cond(x > 1, lambda x: x**3, lambda x: x, x),
        lambda x: lib.lax.cond(x < -1, lambda x: x * 5, lambda x: 2 - x, x),
        x,
    )


def switched(lib, x):
    index = (x * 2 + 1).astype(lib.np.int32)
    branches = [lambda x: x * x, lambda x: -x, lib.np.sin, lambda x: x * 0 + 1]
    return lib.lax.switch(index, branches, x)


def newton(lib, x):
    a = lib.np.abs(x) + 0.5
    return lib.lax.while_loop(
        lambda s: lib.np.abs(s * s - a) > 1e-3, lambda s: 0.5 * (s + a / s), a * 0 + 3.0
    )


def collatz(lib, x):
    """An integer beside a float in the value of the loop."""

    def body(state):
        n, y = state
        half = lib.lax.cond(n % 2 == 0, lambda n: n // 2, lambda n: 3 * n + 1, n)
        return half, y * 1.1

    n = lib.np.abs(x * 10).astype(lib.np.int32) + 1
    return lib.lax.while_loop(lambda state: state[0] != 1, body, (n, x))[1]


def nested_loops(lib, x):
    def outer(s):
        return lib.lax.while_loop(lambda t: t < 2 * s, lambda t: t + 0.3 * t, s)

    return lib.lax.while_loop(lambda s: s < 20.0, outer, lib.np.abs(x) + 0.2)


def bounds(lib, x):
    n = lib.np.abs(x * 4).astype(lib.np.int32)
    return lib.lax.fori_loop(0, n, lambda i, y: y * 1.2 + i, x)


def fixed(lib, x):
    return lib.lax.fori_loop(1, 4, lambda i, y: y * x + i, x)


def scanned(lib, x):
    xs = {"a": lib.np.arange(4).astype(lib.np.float32), "b": lib.np.ones((4, 2)) * x}

    def f(carry, x):
        carry = carry * 0.9 + x["a"] * x["b"].sum()
        return carry, (carry * x["a"], None)

    carry, (ys, _) = lib.lax.scan(f, x, xs)
    back, _ = lib.lax.scan(lambda c, y: (c * y * 0.1 + 1, c), carry, ys, reverse=True)
    return back


def scan_of_while(lib, x):
    def f(c, y):
        return lib.lax.while_loop(lambda s: s < y, lambda s: s * 2 + 0.1, c), c

    carry, ys = lib.lax.scan(f, lib.np.abs(x), lib.np.array([1.0, 3.0, 9.0]) + x)
    return carry + ys.sum()


def while_in_cond(lib, x):
    return lib.lax.cond(
        x > 0,
        lambda x: lib.lax.while_loop(lambda s: lib.np.abs(s) < 5, lambda s: s * 1.5 + 0.1, x),
        lambda x: lib.lax.while_loop(lambda s: lib.np.abs(s) < 5, lambda s: s * 2 - 0.1, x),
        x,
    )


PROGRAMS = [
    steps,
    closures,
    trees,
    nested_cond,
    switched,
    newton,
    collatz,
    nested_loops,
    bounds,
    fixed,
    scanned,
    scan_of_while,
    while_in_cond,
]


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda p: p.__name__)
def test_programs_against_jax(jax, program):
    def under(lib):
        def f(x):
            return program(lib, x)

        xs, ts = values(lib, 5), values(lib, 5, seed=1)
        return {
            "one": f(xs[0]),
            "vmap": lib.vmap(f)(xs),
            "vmap(vmap)": lib.vmap(lib.vmap(f))(values(lib, 2, 3, seed=2)),
            "jvp(vmap)": lib.jvp(lib.vmap(f), xs, ts),
            "vmap(jvp)": lib.vmap(lambda x, t: lib.jvp(f, x, t))(xs, ts),
        }

    same(under(OURS), under(jax))
    # JAX has no reverse mode of a while_loop: our gradient is compared with its tangent.
    xs, ones = values(jax, 5), jax.np.ones(5)
    slope = jax.jvp(jax.vmap(lambda x: program(jax, x)), xs, ones)
    same(vmap(grad(lambda x: program(OURS, x)))(values(OURS, 5)), slope)


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda p: p.__name__)
def test_programs_against_the_loop(program):
    def f(x):
        return program(OURS, x)

    xs = values(OURS, 5)
    same(vmap(f)(xs), mx.array([f(x).item() for x in xs]))
    slope = mx.array([grad(f)(x).item() for x in xs])
    same(vmap(grad(f))(xs), slope)
    same(vmap(lambda x: jvp(f, [x], [mx.array(1.0)])[1][0])(xs), slope)
    same(grad(lambda xs: vmap(f)(xs).sum())(xs), slope)
    same(vmap(lambda x, t: jvp(grad(f), [x], [t])[1][0])(xs, mx.ones(5)), second(f, xs))


def second(f, xs):
    return mx.array([jvp(grad(f), [x], [mx.array(1.0)])[1][0].item() for x in xs])


def test_scan_against_jax(jax):
    def under(lib):
        f = lambda c, x: (c + x, {"y": c * x})  # noqa: E731
        xs = values(lib, 4, 3)
        return [
            lib.lax.scan(f, lib.np.zeros(3), xs),
            lib.lax.scan(f, lib.np.zeros(3), xs, reverse=True),
            lib.lax.scan(f, lib.np.zeros(3), xs[:0]),
            lib.lax.scan(lambda c, _: (c * 2, c), lib.np.array(1.0), None, length=3),
            lib.lax.map(lambda x: (x * 2, x.sum()), xs),
            lib.lax.map(lambda x: (x * 2, x.sum()), xs, batch_size=3),
            lib.grad(lambda xs: lib.lax.scan(f, xs[0], xs)[1]["y"].sum())(xs),
        ]

    same(under(OURS), under(jax))


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8])
@pytest.mark.parametrize("reverse", [False, True])
def test_associative_scan_against_jax(jax, size, reverse):
    def under(lib):
        def affine(a, b):
            return a[0] * b[0], b[0] * a[1] + b[1]

        elems = values(lib, 2, size), values(lib, 2, size, seed=1)

        def f(*elems):
            axis = elems[0].ndim - 1 if reverse else -1  # JAX takes no negative one reversed
            return lib.lax.associative_scan(affine, elems, reverse=reverse, axis=axis)

        return f(*elems), lib.vmap(f)(*elems), lib.grad(lambda a, b: f(a, b)[1].sum())(*elems)

    same(under(OURS), under(jax))


def test_mapped_pairs_of_axes_against_jax(jax):
    def under(lib):
        def f(x, n):
            return lib.lax.while_loop(lambda s: s.sum() < n, lambda s: s * 1.5 + x, x)

        x, n = values(lib, 3, 4, positive=True), lib.np.array([2.0, 30.0])
        return [
            lib.vmap(f, in_axes=(0, None))(x, n[1]),
            lib.vmap(f, in_axes=(None, 0))(x[0], n),
            lib.vmap(f, in_axes=(1, None), out_axes=-1)(x, n[1]),
            lib.vmap(lib.vmap(f, in_axes=(None, 0)), in_axes=(0, None))(x, n),
            lib.vmap(lib.vmap(f, in_axes=(0, None)), in_axes=(None, 0))(x, n),
        ]

    same(under(OURS), under(jax))


NUMBERS = {
    "scan, int": lambda lib, x: lib.lax.scan(lambda c, x: (c + x, c), 0, x),
    "scan, half": lambda lib, x: lib.lax.scan(
        lambda c, x: (c + x, c), 0.0, x.astype(lib.np.float16)
    ),
    "scan, tree": lambda lib, x: lib.lax.scan(
        lambda c, x: ({"a": c["a"] * x, "b": (c["b"][0] + 1,)}, 1), {"a": 2, "b": (3,)}, x
    ),
    "scan, list": lambda lib, x: tuple(lib.lax.scan(lambda c, x: (c, x), x[0], x)),
    "scan, bool": lambda lib, x: lib.lax.scan(lambda c, x: (c, x > 0), True, x),
    "while": lambda lib, x: lib.lax.while_loop(lambda c: c < 3, lambda c: c + 0.5, 0),
    "while, array": lambda lib, x: lib.lax.while_loop(lambda c: c < 3, lambda c: c + x[0] ** 2, 0),
    "fori": lambda lib, x: lib.lax.fori_loop(0, 3, lambda i, c: c + 0.5, 0),
    "fori, unrolled": lambda lib, x: lib.lax.fori_loop(0, 3, lambda i, c: c + i, 0, unroll=True),
    "fori, mapped": lambda lib, x: lib.vmap(
        lambda x: lib.lax.fori_loop(0, 3, lambda i, c: c + x, 0)
    )(x),
    "cond, no operand": lambda lib, x: lib.lax.cond(True, lambda _: x, lambda _: -x, operand=None),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_take_the_dtype_of_what_they_meet(jax, name):
    same(NUMBERS[name](OURS, values(OURS, 3)), NUMBERS[name](jax, values(jax, 3)), 1e-3)


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

    for f in (mapped, changed, counted, listed, shared):
        with pytest.warns(PerformanceWarning, match="captured|loop"):
            got = vmap(f)(xs)
        same(got, mx.array([f(x).item() for x in xs]))
        with pytest.raises(NoBatchingRule):
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


def test_collectives_and_draws_inside_a_loop(jax):
    def under(lib):
        def f(x):
            return lib.lax.while_loop(
                lambda s: lib.lax.psum(s, "i") < 50, lambda s: s + lib.lax.pmax(x, "i"), x
            )

        return lib.vmap(f, axis_name="i")(lib.np.array([1.0, 2.0, 4.0]))

    same(under(OURS), under(jax))
    walk = vmap(lambda x: while_loop(lambda s: s < 3, lambda s: s + mx.random.uniform(), x))
    ends = walk(mx.zeros(8))
    assert len(set(ends.tolist())) == 8


# mx.compile -------------------------------------------------------------------------------------


def test_compile():
    def f(x):
        return cond(x.sum() > 0, lambda x: x * 2, lambda x: -x, x)

    xs = mx.array([[1.0, 2.0], [-1.0, 0.5]])
    want = mx.stack([f(x) for x in xs])
    same(mx.stack([mx.compile(f)(x) for x in xs]), want)
    same(mx.compile(vmap(f))(xs), want)
    same(vmap(mx.compile(f))(xs), want)
    same(mx.compile(grad(lambda x: f(x).sum()))(xs[1]), -mx.ones(2))
    doubling = lambda x: while_loop(lambda s: s < 9, lambda s: s * 2, x)  # noqa: E731
    same(vmap(mx.compile(doubling))(mx.array([1.0, 5.0])), mx.array([16.0, 10.0]))
    step = mx.compile(lambda s: s * 2)
    compiled_body = vmap(lambda x: while_loop(lambda s: s < 9, step, x))
    same(compiled_body(mx.array([1.0, 5.0])), mx.array([16.0, 10.0]))
    for broken in (
        mx.compile(lambda x: doubling(x[0])),
        mx.vmap(doubling),
        mx.compile(vmap(doubling)),
    ):
        with pytest.raises(mlxshim.ConcretizationError, match=r"mx\.compile"):
            broken(mx.array([1.0, 5.0]))
    same(mx.compile(lambda x: fori_loop(0, 3, lambda i, s: s * 2, x))(xs), xs * 8)


# Errors -----------------------------------------------------------------------------------------

x = mx.array([1.0, -1.0])
MISTAKES = {
    "pred shape": (lambda: cond(x > 0, mx.sin, mx.cos, x), TypeError, "pred must be a scalar"),
    "pred type": (lambda: cond("yes", mx.sin, mx.cos, x), TypeError, "pred must be a bool"),
    "no function": (lambda: cond(True, mx.sin, 3, x), TypeError, "false_fun must be a function"),
    "branch shapes": (
        lambda: vmap(lambda y: cond(y > 0, lambda: x, lambda: y))(x),
        TypeError,
        r"false_fun and true_fun.*float32\[\] in place of float32\[2\]",
    ),
    "branch dtypes": (
        lambda: vmap(lambda y: cond(y > 0, lambda: y, lambda: y.astype(mx.int32)))(x),
        TypeError,
        r"int32\[\] in place of float32\[\]",
    ),
    "branch trees": (
        lambda: vmap(lambda y: cond(y > 0, lambda: {"a": y}, lambda: [y]))(x),
        TypeError,
        "a list of 1 in place of a dict",
    ),
    "branch number": (
        lambda: vmap(lambda y: cond(y > 0, lambda: 1, lambda: 2.5))(x),
        TypeError,
        r"float32\[\] in place of int32\[\]",
    ),
    "branch bool": (
        lambda: vmap(lambda y: cond(y > 0, lambda: True, lambda: 1))(x),
        TypeError,
        r"int32\[\] in place of bool\[\]",
    ),
    "while number": (
        lambda: while_loop(lambda s: s < 3, lambda s: 2.5, mx.array(0)),
        TypeError,
        r"float32\[\] in place of int32\[\]",
    ),
    "while int": (
        lambda: while_loop(lambda s: 3 - s, lambda s: s + 1, mx.array(0)),
        TypeError,
        r"a bool scalar, found int32\[\]",
    ),
    "switch index": (lambda: mlxshim.switch(x[0], [mx.sin], x), TypeError, "an integer"),
    "no branches": (lambda: mlxshim.switch(0, [], x), ValueError, "branches is empty"),
    "while form": (
        lambda: while_loop(lambda s: s.sum() < 9, lambda s: s[:1], x),
        TypeError,
        r"body_fun.*float32\[1\] in place of float32\[2\]",
    ),
    "while dtype": (
        lambda: while_loop(lambda s: s < 9, lambda s: s + 0.5, mx.array(1)),
        TypeError,
        r"float32\[\] in place of int32\[\]",
    ),
    "while pred": (
        lambda: while_loop(lambda s: s < 9, lambda s: s + 1, x),
        TypeError,
        "cond_fun must return a bool scalar",
    ),
    "fori bound": (lambda: fori_loop(0, 2.5, lambda i, s: s, x), TypeError, "upper must be"),
    "scan pair": (lambda: mlxshim.scan(lambda c, x: c, x, x), TypeError, r"pair \(carry, y\)"),
    "scan carry": (
        lambda: mlxshim.scan(lambda c, y: ([c], y), x, x),
        TypeError,
        r"a list of 1 in place of float32\[2\]",
    ),
    "scan sizes": (
        lambda: mlxshim.scan(lambda c, y: (c, None), x, [x, mx.ones(3)]),
        ValueError,
        "different leading axis sizes: 2, 3",
    ),
    "scan length": (
        lambda: mlxshim.scan(lambda c, y: (c, None), x, x, length=3),
        ValueError,
        "length is 3, but .* size 2",
    ),
    "scan nothing": (lambda: mlxshim.scan(lambda c, y: (c, y), x), ValueError, "length given"),
    "scan scalar": (
        lambda: mlxshim.scan(lambda c, y: (c, y), x, mx.array(1.0)),
        ValueError,
        "no leading axis",
    ),
    "map batch": (lambda: mlxshim.map(mx.sin, x, batch_size=0), ValueError, "batch_size"),
    "associative": (
        lambda: mlxshim.associative_scan(mx.add, x, axis=1),
        ValueError,
        "axis 1 is out of range",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_named(name):
    call, error, match = MISTAKES[name]
    with pytest.raises(error, match=match):
        call()
