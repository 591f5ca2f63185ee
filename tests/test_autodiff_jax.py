"""grad, vjp, jvp, linearize, linear_transpose, with JAX as the oracle on the same inputs."""

from __future__ import annotations

from collections import namedtuple

import numpy as np
import pytest
from jax_oracle import (
    JAX,
    OURS,
    both_refuse,
    compare,
    jax,
    reverse_of_complex,
    same,
    to_numpy,
)

Pair = namedtuple("Pair", "first second")
RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(2, 3)).astype("f"), RNG.normal(size=(3,)).astype("f")
Z = (RNG.normal(size=3) + 1j * RNG.normal(size=3)).astype("F")
I32 = np.array([1, 2, 0], "i")


def inputs(lib):
    return lib.array(X), lib.array(Y)


def params(lib):
    x, y = inputs(lib)
    return {"w": x, "b": [y, (y * 2, None)], "p": Pair(y, x)}


def apply(np_, p, x):
    h = np_.tanh(p["w"] @ x + p["p"].second @ p["b"][0])
    return (h * h).sum() + (p["b"][1][0] * p["p"].first).sum()


GRADS = {
    "grad": lambda lib, f, *a, **k: lib.transforms.grad(f, **k)(*a),
    "value_and_grad": lambda lib, f, *a, **k: lib.transforms.value_and_grad(f, **k)(*a),
}


@pytest.mark.parametrize("kind", GRADS)
class TestGrad:
    @pytest.mark.parametrize("argnums", [0, 1, (0,), (1, 0), (0, 1), -1, (-1, 0)])
    def test_argnums(self, kind, argnums):
        def f(x, y):
            return (x @ y).sum() ** 2

        same(lambda lib: GRADS[kind](lib, f, *inputs(lib), argnums=argnums))

    @pytest.mark.parametrize("argnums", [0, (0,), (1, 0)])
    def test_trees(self, kind, argnums):
        same(
            lambda lib: GRADS[kind](
                lib, lambda p, x: apply(lib.np, p, x), params(lib), lib.array(Y), argnums=argnums
            )
        )

    @pytest.mark.parametrize("argnums", [0, (1, 0)])
    def test_has_aux(self, kind, argnums):
        def f(x, y):
            return (x @ y).sum(), {"aux": [x * 2, y], "n": None}

        same(lambda lib: GRADS[kind](lib, f, *inputs(lib), argnums=argnums, has_aux=True))

    def test_python_and_numpy_numbers(self, kind):
        same(lambda lib: GRADS[kind](lib, lambda x: x * x * x, 2.0))
        same(lambda lib: GRADS[kind](lib, lambda x: (x * x).sum(), X))
        same(
            lambda lib: GRADS[kind](lib, lambda t: t["a"] * t["b"], {"a": 2.0, "b": np.float32(3)})
        )
        same(lambda lib: GRADS[kind](lib, lambda x: 3.0, lib.array(Y)))

    @reverse_of_complex
    def test_holomorphic(self, kind):
        same(
            lambda lib: GRADS[kind](
                lib, lambda z: (z * z * lib.np.exp(z)).sum(), lib.array(Z), holomorphic=True
            )
        )

    def test_keyword_arguments_go_along(self, kind):
        def program(lib):
            call = getattr(lib.transforms, kind)(lambda x, *, scale: (x * x * scale).sum())
            return call(lib.array(Y), scale=lib.array(Y))

        same(program)

    def test_allow_int(self, kind):
        def f(x, i):
            return x[i].sum() ** 2

        same(
            lambda lib: GRADS[kind](
                lib, f, lib.array(Y), lib.array(I32), argnums=(0, 1), allow_int=True
            )
        )

    @pytest.mark.parametrize(
        "fun, arg, keywords, words",
        [
            (lambda x: x, Y, {}, ["scalar", "(3,)"]),
            (lambda x: x.sum()[None], Y, {}, ["scalar", "(1,)"]),
            (lambda x: None, Y, {}, ["scalar", "None"]),
            (lambda x: {"loss": x.sum()}, Y, {}, ["scalar", "dict"]),
            (lambda x: (x > 0).sum(), Y, {}, ["int32"]),
            (lambda x: x.sum(), I32, {}, ["Argument x", "int32", "allow_int"]),
            (lambda x: x * 2, 3, {}, ["Argument x", "int32"]),
            (lambda x: x["a"].sum(), {"a": Y, "b": I32}, {}, ["x['b']", "int32"]),
            (lambda x: x.sum(), "text", {}, ["Argument x", "'text'"]),
            (lambda x: x.sum(), Y, {"argnums": 1}, ["argnums 1", "1 positional"]),
            (lambda x: x.sum(), Y, {"argnums": (0, 1)}, ["argnums"]),
            (lambda x: x.sum(), Y, {"argnums": -2}, ["argnums -2"]),
            (lambda x: x.sum(), Y, {"argnums": "x"}, ["argnums", "'x'"]),
            (lambda x: x.sum(), Y, {"argnums": 0.5}, ["argnums", "0.5"]),
            (lambda x: x.sum(), Y, {"has_aux": True}, ["has_aux", "pair"]),
            (lambda x: (x.sum(), x, x), Y, {"has_aux": True}, ["pair", "tuple of 3"]),
            (lambda x: x.sum(), Y, {"holomorphic": True}, ["Argument x", "complex"]),
            (lambda z: (z * z).sum(), Z, {}, ["complex64"]),
        ],
    )
    def test_errors(self, kind, fun, arg, keywords, words):
        def program(lib):
            x = lib.array(arg) if isinstance(arg, np.ndarray) else arg
            return GRADS[kind](lib, fun, x, **keywords)

        both_refuse(program, *words)


@reverse_of_complex
def test_a_real_function_of_a_complex_argument():
    def program(lib, **convention):
        def f(z):
            return (lib.np.abs(z) ** 2).sum() + lib.np.real(z * z * (1 + 2j)).sum()

        return lib.transforms.grad(f, **convention)(lib.array(Z))

    want = to_numpy(program(JAX))
    compare(to_numpy(program(OURS, conjugate=False)), want)
    compare(to_numpy(program(OURS, conjugate=True)), want.conj())
    with pytest.raises(ValueError, match="conjugate=True"):
        program(OURS)


def test_what_comes_with_the_value_has_its_own_derivative():
    def program(lib, name):
        def f(x):
            return (x**2).sum(), x**3

        def outer(x):
            out = getattr(lib.transforms, name)(f, has_aux=True)(x)
            (value, aux), g = out if name == "value_and_grad" else ((0.0, out[1]), out[0])
            return value + (aux * g).sum()

        return lib.transforms.grad(outer)(lib.array(Y))

    same(lambda lib: program(lib, "value_and_grad"))
    same(lambda lib: program(lib, "grad"))


# vjp -------------------------------------------------------------------------------------------

FUNCTIONS = {
    "array": lambda np_, x, y: np_.sin(x @ y),
    "dict": lambda np_, x, y: {"a": x * y, "b": [np_.exp(y), None], "c": (x.sum(),)},
    "tuple": lambda np_, x, y: (x @ y, y),
    "an input": lambda np_, x, y: (x, y, x),
    "constant": lambda np_, x, y: (x * 0 + 1, 2.0),
    "named tuple": lambda np_, x, y: Pair(x.sum(), y * 3),
}


def ones_like(lib, tree):
    """A tree of cotangents: 1, 2, 3, …"""
    count = iter(range(1, 100))
    return lib_map(lambda x: x * 0 + next(count), tree)


def lib_map(fun, tree):
    if isinstance(tree, dict):
        return {key: lib_map(fun, tree[key]) for key in sorted(tree)}
    if isinstance(tree, (list, tuple)):
        several = [lib_map(fun, x) for x in tree]
        return type(tree)(*several) if hasattr(tree, "_fields") else type(tree)(several)
    return None if tree is None else fun(tree)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_vjp(name):
    def program(lib):
        out, pullback = lib.transforms.vjp(lambda x, y: FUNCTIONS[name](lib.np, x, y), *inputs(lib))
        return out, pullback(ones_like(lib, out)), pullback(ones_like(lib, out))

    same(program)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("how", ["jvp", "linearize"])
def test_jvp_and_linearize(name, how):
    def program(lib):
        primals = inputs(lib)
        tangents = tuple(ones_like(lib, list(primals)))

        def f(x, y):
            return FUNCTIONS[name](lib.np, x, y)

        if how == "jvp":
            return lib.transforms.jvp(f, primals, tangents)
        out, tangent_map = lib.transforms.linearize(f, *primals)
        return out, tangent_map(*tangents), tangent_map(*primals)

    same(program)


def test_trees_of_primals():
    def program(lib):
        def f(p, x):
            return apply(lib.np, p, x)

        p, x = params(lib), lib.array(Y)
        out, pullback = lib.transforms.vjp(f, p, x)
        also, tangent = lib.transforms.jvp(f, (p, x), (p, x))
        return out, pullback(out * 0 + 2), also, tangent

    same(program)


def test_has_aux():
    def program(lib):
        def f(x, y):
            return x @ y, {"aux": x * 2}

        t, primals = lib.transforms, inputs(lib)
        out, pullback, aux = t.vjp(f, *primals, has_aux=True)
        outputs = [out, aux, pullback(out), t.jvp(f, primals, primals, has_aux=True)]
        out, tangent_map, aux = t.linearize(f, *primals, has_aux=True)
        return [*outputs, out, aux, tangent_map(*primals)]

    same(program)


def test_integers():
    def program(lib):
        def f(x, i):
            return x[i] * 2, i + 1

        x, i = lib.array(Y), lib.array(I32)
        out, pullback = lib.transforms.vjp(f, x, i)
        zero = np.zeros(3, jax.dtypes.float0) if lib is JAX else None
        pulled = pullback((out[0], zero))
        pushed = lib.transforms.jvp(f, (x, i), (x, zero))
        return out, pulled, pushed

    same(program)


@reverse_of_complex
def test_complex_numbers():
    def program(lib, name):
        def f(z, x):
            return lib.np.exp(z * x) * lib.np.conj(z), lib.np.abs(z), lib.np.imag(z * z) * x

        primals = lib.array(Z), lib.array(Y)
        if name == "jvp":
            return lib.transforms.jvp(f, primals, (lib.array(Z * 2j), lib.array(Y)))
        if name == "linearize":
            return lib.transforms.linearize(f, *primals)[1](lib.array(Z * 2j), lib.array(Y))
        out, pullback = lib.transforms.vjp(f, *primals)
        return out, pullback(ones_like(lib, (out[0] * 1j, out[1], out[2])))

    for name in ("vjp", "jvp", "linearize"):
        same(lambda lib, name=name: program(lib, name))


def test_second_derivatives_through_every_form():
    def program(lib, way):
        t = lib.transforms

        def f(x):
            return lib.np.sin(x) * x

        def g(x):
            if way == "vjp":
                out, pullback = t.vjp(f, x)
                return (out * pullback(out)[0]).sum()
            if way == "jvp":
                out, tangent = t.jvp(f, (x,), (x,))
                return (out * tangent).sum()
            out, tangent_map = t.linearize(f, x)
            return (out * tangent_map(x)).sum()

        x = lib.array(Y)
        return [
            t.grad(g)(x),
            t.jvp(g, (x,), (x,)),
            t.vmap(t.grad(g))(lib.array(X)),
            t.grad(lambda x: t.vmap(g)(x).sum())(lib.array(X)),
            t.vmap(lambda c: t.vjp(f, x)[1](c))(lib.array(X)),
            t.vmap(lambda x, c: t.linearize(f, x)[1](c))(lib.array(X), lib.array(X)),
        ]

    for way in ("vjp", "jvp", "linearize"):
        same(lambda lib, way=way: program(lib, way), 1e-3)


@pytest.mark.parametrize(
    "program, words",
    [
        (lambda lib, f, x, y: lib.transforms.vjp(f, x, y)[1](x), ["(2,)", "(2, 3)"]),
        (
            lambda lib, f, x, y: lib.transforms.vjp(f, x, y)[1]((x @ y,)),
            ["cotangent", "tuple of 1"],
        ),
        (lambda lib, f, x, y: lib.transforms.vjp(f, x, y)[1](None), ["cotangent", "None"]),
        (lambda lib, f, x, y: lib.transforms.vjp(f, x), ["y"]),
        (
            lambda lib, f, x, y: lib.transforms.vjp(f, x, y)[1]((x @ y).astype(lib.np.float16)),
            ["float32", "float16"],
        ),
        (
            lambda lib, f, x, y: lib.transforms.vjp(lambda x: {"a": x}, x)[1]({"b": x}),
            ["keys", "'a'", "'b'"],
        ),
        (lambda lib, f, x, y: lib.transforms.vjp(lambda x: "text", x), ["output", "'text'"]),
        (lambda lib, f, x, y: lib.transforms.vjp(f, x, y, has_aux=True), ["pair"]),
        (lambda lib, f, x, y: lib.transforms.jvp(f, x, y), ["primals", "tuple", "(primal,)"]),
        (lambda lib, f, x, y: lib.transforms.jvp(f, (x, y), (x,)), ["tangent", "tuple of 2"]),
        (lambda lib, f, x, y: lib.transforms.jvp(f, (x, y), (x, x)), ["y", "(3,)", "(2, 3)"]),
        (
            lambda lib, f, x, y: lib.transforms.jvp(f, (x, y), (x, y.astype(lib.np.float16))),
            ["y", "float16"],
        ),
        (lambda lib, f, x, y: lib.transforms.linearize(f, x, y)[1](x), ["tangent"]),
        (lambda lib, f, x, y: lib.transforms.linearize(f, x, y)[1](x, x), ["y", "(3,)"]),
        (
            lambda lib, f, x, y: lib.transforms.linear_transpose(lambda x: x * x, x)(x),
            ["not linear"],
        ),
        (
            lambda lib, f, x, y: lib.transforms.linear_transpose(lib.np.sin, x)(x),
            ["not linear"],
        ),
        (
            lambda lib, f, x, y: lib.transforms.linear_transpose(lambda x: x * 2, x)(y),
            ["cotangent", "(2, 3)"],
        ),
        (
            lambda lib, f, x, y: lib.transforms.linear_transpose(lambda i: i * 1.0, lib.array(I32)),
            ["int32"],
        ),
    ],
)
def test_errors(program, words):
    both_refuse(lambda lib: program(lib, lambda x, y: x @ y, *inputs(lib)), *words)


LINEAR = {
    "matmul": lambda np_, x: np_.array(X) @ x,
    "scaled": lambda np_, x: {"a": x * 2.0, "b": (-x / 3.0, x[::2])},
    "sums": lambda np_, x: (x.sum(), np_.mean(x), np_.cumsum(x, axis=0)),
    "indexing": lambda np_, x: x[np_.array(I32)],
    "reshaped": lambda np_, x: np_.broadcast_to(x[None], (2, 3)).T.reshape(-1),
    "concatenated": lambda np_, x: np_.concatenate([x, x * 0.5, np_.array(Y)]),
    "selected": lambda np_, x: np_.where(np_.array([True, False, True]), x, 0.0),
    "padded": lambda np_, x: np_.pad(x, ((1, 2),)),
    "affine": lambda np_, x: x + 1.0,
    "cast": lambda np_, x: x.astype(np_.float16),
    "fft": lambda np_, x: np_.real(np_.fft.fft(x)) + np_.imag(np_.fft.fft(x)),
    "sorted": lambda np_, x: np_.roll(x, 1),
}


@pytest.mark.parametrize("name", LINEAR)
def test_linear_transpose(name):
    def program(lib):
        f = lib.transforms.linear_transpose(lambda x: LINEAR[name](lib.np, x), lib.array(Y))
        out = LINEAR[name](lib.np, lib.array(Y))
        return f(ones_like(lib, out))

    same(program)
