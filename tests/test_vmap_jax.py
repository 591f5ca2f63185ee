"""vmap and its collectives, with JAX as the oracle on the same inputs."""

from __future__ import annotations

from collections import namedtuple

import mlx.core as mx
import numpy as np
import pytest
from jax_oracle import JAX, OURS, both_refuse, jax, reverse_of_complex, same

import mlxshim

Pair = namedtuple("Pair", "first second")
RNG = np.random.default_rng(0)
X, Y, W = (RNG.normal(size=s).astype("f") for s in ((4, 3), (4, 3), (4, 5, 3)))
Z = (X + 1j * Y).astype("F")
N = len(X)


def lax(lib):
    """Where the collectives are."""
    return jax.lax if lib is JAX else lib.transforms


# Axes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "in_axes, out_axes",
    [(0, 0), (1, -1), (-1, 1), ((1, None), -2), ((None, -2), 2), ([2, 2], 0), ((-3, 0), 1)],
)
def test_axes(in_axes, out_axes):
    def program(lib):
        def f(x, y):
            return lib.np.sin(x) + y.sum()

        return lib.transforms.vmap(f, in_axes, out_axes)(lib.array(W), lib.array(W))

    same(program)


@pytest.mark.parametrize(
    "in_axes",
    [0, ({"w": 0, "b": [0, 0]}, 0), ({"w": 0, "b": None}, None), (0, None), ({"w": 0, "b": 0}, 0)],
)
def test_trees_of_in_axes(in_axes):
    def program(lib):
        def f(p, x):
            return {"out": p["w"] * x.sum() + p["b"][0].sum(), "none": None, "t": (p["b"][1], x)}

        p = {"w": lib.array(X), "b": [lib.array(Y), lib.array(X)]}
        return lib.transforms.vmap(f, in_axes=in_axes)(p, lib.array(Y))

    same(program)


@pytest.mark.parametrize("out_axes", [0, (0, 0, -1, 0, -1)])
@pytest.mark.parametrize("value", [2.5, 3, True, np.float32(4)])
def test_a_number_is_the_output_of_every_sample(value, out_axes):
    def program(lib):
        def f(x):
            return x.sum(), value, value, None, np.ones((2,), "f")

        return lib.transforms.vmap(f, out_axes=out_axes)(lib.array(X))

    same(program)
    same(lambda lib: lib.transforms.vmap(lambda x: value)(lib.array(X)))


def test_a_number_is_an_output_in_chunks_and_in_a_loop():
    def f(x):
        return x, 2.0

    def reads(x):
        return x, 2.0 if x.sum().item() < 100 else 3.0

    vmap, xs = mlxshim.vmap, mx.array(X)
    for got in (vmap(f)(xs), vmap(f, chunk_size=3)(xs)):
        assert got[1].tolist() == [2.0] * N
    with pytest.warns(mlxshim.PerformanceWarning):
        assert vmap(reads)(xs)[1].tolist() == [2.0] * N
    assert vmap(vmap(f))(xs)[1].tolist() == [[2.0] * 3] * N


@pytest.mark.parametrize(
    "out_axes",
    [0, {"a": 1, "b": 0}, {"a": -1, "b": (0, 1)}, {"a": 0, "b": (1, 0)}, {"a": None, "b": 0}],
)
def test_trees_of_out_axes(out_axes):
    def program(lib):
        shared = lib.array(Y)

        def f(x):
            return {"a": shared * 2, "b": (x, x * 2)}

        return lib.transforms.vmap(f, out_axes=out_axes)(lib.array(X))

    same(program)


def test_named_tuples_and_keywords():
    def program(lib):
        def f(pair, *, scale):
            return Pair(pair.first * scale, [pair.second])

        pair = Pair(lib.array(X), lib.array(Y))
        return lib.transforms.vmap(f)(pair, scale=lib.array(X[:, 0]))

    same(program)


def test_numpy_arrays_and_other_dtypes():
    same(lambda lib: lib.transforms.vmap(lambda x: x * 2)(X))
    same(lambda lib: lib.transforms.vmap(lambda x: x.astype(lib.np.float16))(lib.array(X)))
    same(lambda lib: lib.transforms.vmap(lambda x: x > 0)(lib.array(X)))
    same(lambda lib: lib.transforms.vmap(lambda z: lib.np.conj(z) * z)(lib.array(Z)))


@pytest.mark.parametrize("given", [{"axis_size": N}, {"axis_size": N, "axis_name": "i"}])
def test_axis_size(given):
    def program(lib):
        y = lib.array(Y[0])
        several = [
            lib.transforms.vmap(lambda: y * 2, **given)(),
            lib.transforms.vmap(lambda x: x, in_axes=None, **given)(y),
            lib.transforms.vmap(lambda x: x, in_axes=None, out_axes=1, **given)(y),
            lib.transforms.vmap(lambda x: x, **given)(lib.array(X)),
        ]
        if "axis_name" in given:
            several.append(lib.transforms.vmap(lambda: lax(lib).axis_index("i"), **given)())
        return several

    same(program)
    both_refuse(lambda lib: lib.transforms.vmap(lambda x: x, axis_size=3)(lib.array(X)), "size 4")


@pytest.mark.parametrize(
    "transform, words",
    [
        (lambda t, x: t.vmap(lambda x: x, in_axes=None)(x), ["axis_size"]),
        (lambda t, x: t.vmap(lambda x: x, in_axes=(0, 0))(x), []),
        (lambda t, x: t.vmap(lambda x, y: x, in_axes=(0,))(x, x), ["2 positional"]),
        (lambda t, x: t.vmap(lambda x: x, in_axes=2)(x), ["x", "(4, 3)"]),
        (lambda t, x: t.vmap(lambda x: x, in_axes=-3)(x), ["x", "(4, 3)"]),
        (lambda t, x: t.vmap(lambda x, y: x)(x, x[:2]), ["size 4", "size 2"]),
        (lambda t, x: t.vmap(lambda x: x, out_axes=2)(x), ["out_axes"]),
        (lambda t, x: t.vmap(lambda x: x, out_axes=-3)(x), ["out_axes"]),
        (lambda t, x: t.vmap(lambda x: x, out_axes=None)(x), ["out_axes"]),
        (lambda t, x: t.vmap(lambda x: (x, x), out_axes=(0,))(x), ["out_axes"]),
        (lambda t, x: t.vmap(lambda x: "text")(x), ["'text'"]),
        (lambda t, x: t.vmap(lambda x: x, in_axes=("a",))(x), ["'a'"]),
        (lambda t, x: t.vmap(lambda x, y: x)(x), []),
    ],
)
def test_refusals(transform, words):
    both_refuse(lambda lib: transform(lib.transforms, lib.array(X)), *words)


# Composition ----------------------------------------------------------------------------------


def test_nested():
    def program(lib):
        t = lib.transforms

        def f(x, y):
            return lib.np.tanh(x @ y) * y

        x, y, w = lib.array(X), lib.array(Y), lib.array(W)
        return [
            t.vmap(t.vmap(f, (None, 0)), (0, None))(x, y),
            t.vmap(t.vmap(f, (0, None), out_axes=1), (None, 0), out_axes=-1)(x, y),
            t.vmap(t.vmap(t.vmap(f, (0, None)), (1, 0)), (0, None), out_axes=2)(w[:, None], w[0]),
            t.vmap(lambda x: t.vmap(lambda y: f(x, y))(y), out_axes=1)(x),
        ]

    same(program)


@pytest.mark.parametrize("outer", ["grad", "jvp", "vjp", "jacfwd"])
def test_derivatives_of_a_vmap(outer):
    def program(lib):
        t = lib.transforms
        mapped = t.vmap(lambda x, y: lib.np.sin(x * y).sum() * y, in_axes=(0, None), out_axes=1)
        x, y = lib.array(X), lib.array(Y[0])

        def f(x):
            return mapped(x, y)

        if outer == "grad":
            return t.grad(lambda x: (f(x) ** 2).sum())(x)
        if outer == "jvp":
            return t.jvp(f, (x,), (lib.array(Y),))
        if outer == "vjp":
            out, pullback = t.vjp(f, x)
            return out, pullback(out)
        return t.jacfwd(f)(x)

    same(program, 1e-3)


@pytest.mark.parametrize("inner", ["grad", "value_and_grad", "jacrev"])
def test_vmap_of_derivatives(inner):
    def program(lib):
        t = lib.transforms

        def f(w, x, y):
            return (lib.np.tanh(w * x).sum() - y[0]) ** 2

        derivative = getattr(t, inner)(f, argnums=(0, 1))
        w, x, y = lib.array(Y[0]), lib.array(X), lib.array(Y)
        return t.vmap(derivative, in_axes=(None, 0, 0), out_axes=0)(w, x, y)

    same(program, 1e-3)


@reverse_of_complex
def test_complex():
    def program(lib):
        t = lib.transforms

        def f(z):
            return (z * lib.np.exp(z)).sum()

        z = lib.array(Z)
        return [
            t.vmap(t.grad(f, holomorphic=True))(z),
            t.grad(lambda z: t.vmap(f)(z).sum(), holomorphic=True)(z),
            t.vmap(lambda z: t.jvp(f, (z,), (z * 2j,)))(z),
            t.vmap(lambda z: t.vjp(f, z)[1](z[0]))(z),
        ]

    same(program, 1e-3)


# Collectives ----------------------------------------------------------------------------------

PERM = [(0, 2), (2, 3), (3, 1), (1, 0)]  # under vmap JAX wants all of them

#: name -> a collective of (lax, x of shape (3,), what makes an array)
COLLECTIVES = {
    "psum": lambda c, x, a: c.psum(x, "i"),
    "psum of a tree": lambda c, x, a: c.psum({"a": x, "b": [x * 2]}, "i"),
    "psum of a number": lambda c, x, a: x * c.psum(1, "i"),
    "pmean": lambda c, x, a: c.pmean(x, "i"),
    "pmax": lambda c, x, a: c.pmax(x, "i"),
    "pmin": lambda c, x, a: c.pmin(x, "i"),
    "all_gather": lambda c, x, a: c.all_gather(x, "i"),
    "all_gather, axis=1": lambda c, x, a: c.all_gather(x, "i", axis=1),
    "all_gather, tiled": lambda c, x, a: c.all_gather(x, "i", tiled=True),
    "ppermute": lambda c, x, a: c.ppermute(x, "i", PERM),
    "pshuffle": lambda c, x, a: c.pshuffle(x, "i", [1, 3, 0, 2]),
    "psum_scatter": lambda c, x, a: c.psum_scatter(x[None] * a(np.ones((4, 1), "f")), "i"),
    "psum_scatter of axis 1": lambda c, x, a: c.psum_scatter(
        x[:, None] * a(np.ones((1, 4), "f")), "i", scatter_dimension=1
    ),
    "psum_scatter, tiled": lambda c, x, a: c.psum_scatter(
        x[:, None] * a(np.ones((1, 8), "f")), "i", scatter_dimension=1, tiled=True
    ),
    "all_to_all": lambda c, x, a: c.all_to_all(x[:, None] * a(np.arange(4, dtype="f")), "i", 1, 0),
    "all_to_all, tiled": lambda c, x, a: c.all_to_all(
        x[:, None] * a(np.arange(8, dtype="f")), "i", 1, 0, tiled=True
    ),
    "pswapaxes": lambda c, x, a: c.pswapaxes(x[:, None] * a(np.arange(4, dtype="f")), "i", 1),
    "axis_index": lambda c, x, a: x * c.axis_index("i"),
    "axis_size": lambda c, x, a: x * c.axis_size("i"),
    "softmax": lambda c, x, a: (x - c.pmax(x, "i")) / c.psum(x * x, "i"),
}

#: What JAX does not differentiate: an extremum over a named axis; parts that change their axis.
FORWARD_ONLY = ("pmax", "pmin", "softmax", "all_to_all")


def bound(lib, name):
    return lambda x: COLLECTIVES[name](lax(lib), x, lib.array)


@pytest.mark.parametrize("name", COLLECTIVES)
def test_collective(name):
    same(lambda lib: lib.transforms.vmap(bound(lib, name), axis_name="i")(lib.array(X)))
    same(
        lambda lib: lib.transforms.vmap(bound(lib, name), in_axes=1, out_axes=1, axis_name="i")(
            lib.array(X.T)
        )
    )


GROUPED = {
    "psum": lambda c, x, **groups: c.psum(x, "i", **groups),
    "pmean": lambda c, x, **groups: c.pmean(x, "i", **groups),
    "pmax": lambda c, x, **groups: c.pmax(x, "i", **groups),
    "pmin": lambda c, x, **groups: c.pmin(x, "i", **groups),
    "all_gather": lambda c, x, **groups: c.all_gather(x, "i", **groups),
    "psum_scatter": lambda c, x, **groups: c.psum_scatter(x[:2], "i", **groups),
    "all_to_all": lambda c, x, **groups: c.all_to_all(x[:2], "i", 0, 0, **groups),
    "pswapaxes": lambda c, x, **groups: c.pswapaxes(x[:2], "i", 0, **groups),
}


@pytest.mark.parametrize("name", GROUPED)
def test_groups_are_an_axis_of_their_own(name):
    """JAX's vmap has no axis_index_groups; what the refusal says to do is what they would be."""

    def refused(lib):
        groups = [[0, 1], [2, 3]]
        with pytest.raises(NotImplementedError) as raised:
            lib.transforms.vmap(
                lambda x: GROUPED[name](lax(lib), x, axis_index_groups=groups), axis_name="i"
            )(lib.array(X))
        return str(raised.value)

    assert refused(JAX)
    said = refused(OURS)
    assert name in said and "(groups, members)" in said

    def program(lib):
        one = lib.transforms.vmap(lambda x: GROUPED[name](lax(lib), x), axis_name="i")
        return lib.transforms.vmap(one)(lib.array(X.reshape(2, 2, 3)))

    same(program)


@pytest.mark.parametrize("name", COLLECTIVES)
def test_collective_with_a_vmap_around_and_inside(name):
    def program(lib):
        t, f, w = lib.transforms, bound(lib, name), lib.array(W)
        inside = t.vmap(t.vmap(f), axis_name="i")(w)
        return inside, t.vmap(t.vmap(f, axis_name="i"), in_axes=1, out_axes=-1)(w)

    same(program)


@pytest.mark.parametrize("name", [name for name in COLLECTIVES if name not in FORWARD_ONLY])
def test_derivatives_of_a_collective(name):
    def first(tree):
        return tree["a"] if isinstance(tree, dict) else tree

    def program(lib):
        t, x, y = lib.transforms, lib.array(X), lib.array(Y)

        def f(x):
            return first(bound(lib, name)(x))

        def loss(x):
            return (first(t.vmap(f, axis_name="i")(x)) ** 2).sum()

        return [
            t.grad(loss)(x),
            t.jvp(t.vmap(f, axis_name="i"), (x,), (y,)),
            t.vmap(lambda x, y: t.jvp(f, (x,), (y,)), axis_name="i")(x, y),
            t.vmap(t.grad(lambda x: (f(x) ** 2).sum()), axis_name="i")(x),
        ]

    same(program, 1e-3)


def test_names_nested():
    def program(lib):
        t, c, w = lib.transforms, lax(lib), lib.array(W)

        def both(f):
            return t.vmap(t.vmap(f, axis_name="j"), axis_name="i")(w)

        return [
            both(lambda x: c.psum(x, "i")),
            both(lambda x: c.psum(x, "j")),
            both(lambda x: c.psum(x, ("i", "j"))),
            both(lambda x: c.pmean(x, ("j", "i"))),
            both(lambda x: c.pmax(c.psum(x, "i") * c.axis_index("j"), "j")),
            both(lambda x: x * c.axis_index(("i", "j"))),
            both(lambda x: x * c.axis_size(("i", "j"))),
            both(lambda x: c.all_gather(c.all_gather(x, "i"), "j")),
            both(lambda x: c.ppermute(c.psum(x, "j"), "i", PERM)),
            t.vmap(t.vmap(lambda x: c.psum(x, "i"), axis_name="i"), axis_name="i")(w),
        ]

    same(program)


def test_outputs_that_are_the_same_for_all():
    def program(lib):
        t, c, x = lib.transforms, lax(lib), lib.array(X)

        def mapped(f, out_axes=None):
            return t.vmap(f, out_axes=out_axes, axis_name="i")

        def stats(x):
            mean = c.pmean(x, "i")
            return x - mean, mean, c.pmax(x, "i")

        def loss(x):
            return mapped(lambda x: c.pmean((x**2).sum(), "i"))(x)

        return [
            mapped(lambda x: c.psum(x, "i"))(x),
            mapped(stats, (0, None, None))(x),
            mapped(lambda x: c.all_gather(x, "i"))(x),
            mapped(lambda x: c.psum(x, "i") * c.axis_size("i") + 1)(x),
            t.grad(loss)(x),
            t.jvp(loss, (x,), (x,)),
        ]

    same(program)
    for f in (lambda c, x: x + c.psum(x, "i"), lambda c, x: c.ppermute(x, "i", PERM)):
        both_refuse(
            lambda lib, f=f: lib.transforms.vmap(
                lambda x: f(lax(lib), x), out_axes=None, axis_name="i"
            )(lib.array(X)),
            "out_axes",
        )


def test_unmapped_operands():
    def program(lib):
        t, c, x, y = lib.transforms, lax(lib), lib.array(X), lib.array(Y[0])

        def mapped(f):
            return t.vmap(f, in_axes=(0, None), axis_name="i")(x, y)

        return [
            mapped(lambda x, y: c.psum(y, "i") + x),
            mapped(lambda x, y: c.pmean(y, "i") * x),
            mapped(lambda x, y: c.all_gather(y, "i") + x),
            mapped(lambda x, y: c.pmax(y, "i") + x),
            t.grad(lambda y: mapped(lambda x, y: c.psum(y, "i") * x).sum())(y),
        ]

    same(program)


@pytest.mark.parametrize("lib", [JAX, OURS], ids=["jax", "mlxshim"])
@pytest.mark.parametrize("name", ["psum", "pmean", "pmax", "all_gather", "axis_index"])
def test_a_name_that_is_not_there(lib, name):
    def f(x):
        collective = getattr(lax(lib), name)
        return collective("j") if name == "axis_index" else collective(x, "j")

    with pytest.raises(NameError):
        lib.transforms.vmap(f, axis_name="i")(lib.array(X))
