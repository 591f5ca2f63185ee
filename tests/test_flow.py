"""Control flow against JAX on the same inputs, and against a loop over the samples."""

from __future__ import annotations

import mlx.core as mx
import pytest
from libraries import OURS, normal, same

import mlxshim
from mlxshim import cond, fori_loop, grad, jvp, scan, switch, vmap, while_loop

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

        xs, ts = normal(lib, 5), normal(lib, 5, seed=1)
        return {
            "one": f(xs[0]),
            "vmap": lib.vmap(f)(xs),
            "vmap(vmap)": lib.vmap(lib.vmap(f))(normal(lib, 2, 3, seed=2)),
            "jvp(vmap)": lib.jvp(lib.vmap(f), (xs,), (ts,)),
            "vmap(jvp)": lib.vmap(lambda x, t: lib.jvp(f, (x,), (t,)))(xs, ts),
        }

    same(under(OURS), under(jax))
    # JAX has no reverse mode of a while_loop: our gradient is compared with its tangent.
    xs, ones = normal(jax, 5), jax.np.ones(5)
    slope = jax.jvp(jax.vmap(lambda x: program(jax, x)), (xs,), (ones,))[1]
    same(vmap(grad(lambda x: program(OURS, x)))(normal(OURS, 5)), slope)


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda p: p.__name__)
def test_programs_against_the_loop(program):
    def f(x):
        return program(OURS, x)

    xs = normal(OURS, 5)
    same(vmap(f)(xs), mx.array([f(x).item() for x in xs]))
    slope = mx.array([grad(f)(x).item() for x in xs])
    same(vmap(grad(f))(xs), slope)
    same(vmap(lambda x: jvp(f, [x], [mx.array(1.0)])[1][0])(xs), slope)
    same(grad(lambda xs: vmap(f)(xs).sum())(xs), slope)
    same(vmap(lambda x, t: jvp(grad(f), [x], [t])[1][0])(xs, mx.ones(5)), second(f, xs))


def second(f, xs):
    return mx.array([jvp(grad(f), [x], [mx.array(1.0)])[1][0].item() for x in xs])


def test_mapped_pairs_of_axes_against_jax(jax):
    def under(lib):
        def f(x, n):
            return lib.lax.while_loop(lambda s: s.sum() < n, lambda s: s * 1.5 + x, x)

        x, n = lib.np.abs(normal(lib, 3, 4)) + 0.1, lib.np.array([2.0, 30.0])
        return [
            lib.vmap(f, in_axes=(0, None))(x, n[1]),
            lib.vmap(f, in_axes=(None, 0))(x[0], n),
            lib.vmap(f, in_axes=(1, None), out_axes=-1)(x, n[1]),
            lib.vmap(lib.vmap(f, in_axes=(None, 0)), in_axes=(0, None))(x, n),
            lib.vmap(lib.vmap(f, in_axes=(0, None)), in_axes=(None, 0))(x, n),
        ]

    same(under(OURS), under(jax))


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


@pytest.mark.parametrize("name", ["uint8", "int16", "int32", "int64", "uint32", "uint64"])
def test_the_index_of_mapped_bounds_does_not_wrap(name):
    """In the loop over samples the bounds are integers of Python's."""

    def total(lower, upper):
        return fori_loop(lower, upper, lambda i, s: s + (i - 1) * 200, mx.array(0.0))

    lower, upper = (mx.array(x, getattr(mx, name)) for x in ([0, 1, 5], [4, 3, 2]))
    same(vmap(total)(lower, upper), mx.array([400.0, 200.0, 0.0]))


def test_a_mapped_bound_leaves_the_function_what_it_captured():
    """Under a derivative too, and without the loop over samples, whose warning is an error."""

    def powers(x, n):
        slope = mx.sin(x)
        return fori_loop(0, n, lambda i, y: y * slope + i, x).sum()

    xs, counts = normal(OURS, 4, 3), mx.array([2, 0, 3, 1])
    for transform in (lambda f: f, grad):
        got = vmap(transform(powers))(xs, counts)
        same(got, mx.stack([transform(powers)(x, int(n)) for x, n in zip(xs, counts.tolist())]))


def doubled(x):
    x *= 2
    return x


ALIKE = {
    "cond": lambda n, x: cond(n == 0, lambda x: x, mx.sin, x),
    "cond, captured": lambda n, x: cond(n == 0, lambda: x, lambda: mx.sin(x)),
    "cond, written to": lambda n, x: cond(n == 0, doubled, mx.sin, x),
    "switch": lambda n, x: switch(n, [lambda x: x, mx.sin], x),
    "switch, written to": lambda n, x: switch(n, [doubled, mx.sin], x),
    "while": lambda n, x: while_loop(lambda s: s.sum() < 4 * n, lambda s: s * 2, x),
    "fori": lambda n, x: fori_loop(0, n, lambda i, s: s * 2, x),
    "fori, written to": lambda n, x: fori_loop(0, n + 2, lambda i, s: doubled(s), x),
    "scan": lambda n, x: scan(lambda c, y: (c, y), x, n * mx.ones((2,)))[0],
    "scan, written to": lambda n, x: scan(lambda c, _: (doubled(c), c), x, length=3)[1] + n,
}


@pytest.mark.parametrize("name", ALIKE)
def test_what_is_handed_through_is_an_array_of_its_own(name):
    """A selection makes a new array: what is taken as it is must be one, mapped or not."""

    def f(n, x):
        y = ALIKE[name](n, x)
        before, y[0], x[1] = y * 1, 7.0, 9.0
        return before, y, x

    x = mx.array([1.0, 2.0])
    same(f(mx.array(0), mx.array(x))[2], mx.array([1.0, 9.0]))
    rows = [f(mx.array(n), mx.array(x)) for n in (0, 0, 1)]
    same(vmap(f, (0, None))(mx.array([0, 0, 1]), x), tuple(mx.stack(ys) for ys in zip(*rows)))


def test_the_ys_of_a_scan_are_those_of_their_step():
    ys = scan(lambda c, _: (doubled(c), c), mx.array(1.0), length=3)[1]
    same(ys, mx.array([2.0, 4.0, 8.0]))
