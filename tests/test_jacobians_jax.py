"""Jacobians and Hessians, with JAX as the oracle on the same inputs."""

from __future__ import annotations

from collections import namedtuple

import numpy as np
import pytest
from jax_oracle import both_refuse, reverse_of_complex, same

from mlxshim.core.versions import MLX

Pair = namedtuple("Pair", "first second")
RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(2, 3)).astype("f"), RNG.normal(size=(3,)).astype("f")
Z = (RNG.normal(size=3) + 1j * RNG.normal(size=3)).astype("F")
I32 = np.array([1, 2, 0], "i")

FUNCTIONS = {
    "array": lambda np_, x, y: np_.sin(x @ y),
    "tree": lambda np_, x, y: {"a": x * y, "b": [np_.exp(y), None], "c": Pair(x.sum(), y[1] ** 2)},
    "constant": lambda np_, x, y: (x * 0 + 1, y),
    "scalar": lambda np_, x, y: (x @ y).sum() ** 3,
}
MODES = ["jacrev", "jacfwd", "jacobian", "hessian"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("argnums", [0, 1, (0,), (1, 0), -1])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_argnums(mode, name, argnums):
    if name == "tree" and mode == "hessian" and MLX < (0, 32, 0):
        pytest.skip("MLX 0.31 crashes in the second derivative of an index")

    def program(lib):
        f = getattr(lib.transforms, mode)(
            lambda x, y: FUNCTIONS[name](lib.np, x, y), argnums=argnums
        )
        return f(lib.array(X), lib.array(Y))

    same(program, 1e-3)


@pytest.mark.parametrize("mode", MODES)
def test_trees_and_aux(mode):
    def program(lib):
        def f(p, x, *, scale):
            out = {"out": lib.np.tanh(p["w"] @ x) * p["b"].first, "n": None}
            return out, {"aux": (x * 2, scale)}

        p = {"w": lib.array(X), "b": Pair(lib.array(2.0), [lib.array(Y)])}
        transform = getattr(lib.transforms, mode)(f, argnums=(0, 1), has_aux=True)
        return transform(p, lib.array(Y), scale=lib.array(Y))

    same(program, 1e-3)


@pytest.mark.parametrize("mode", MODES)
def test_python_numbers(mode):
    same(lambda lib: getattr(lib.transforms, mode)(lambda x: x * x * x)(2.0))


@reverse_of_complex
@pytest.mark.parametrize("mode", MODES)
def test_complex(mode):
    def holomorphic(lib):
        f = getattr(lib.transforms, mode)(lambda z: z * z * lib.np.exp(z), holomorphic=True)
        return f(lib.array(Z))

    def of_real(lib):
        f = getattr(lib.transforms, mode)(lambda x: lib.np.exp(x * (1 + 2j)))
        return f(lib.array(Y))

    same(holomorphic, 1e-3)
    if mode == "jacfwd":
        same(of_real)
    else:
        both_refuse(of_real, "complex64", "holomorphic")
    if mode in ("jacrev", "jacobian"):
        same(lambda lib: lib.transforms.jacrev(lambda z: lib.np.abs(z) ** 2)(lib.array(Z)))
    else:
        both_refuse(lambda lib: getattr(lib.transforms, mode)(lib.np.abs)(lib.array(Z)), "Argument")


def test_integers():
    def f(x, i):
        return x[i] * 2, i + 1

    def program(lib):
        return lib.transforms.jacfwd(f)(lib.array(Y), lib.array(I32))

    same(lambda lib: program(lib)[0])
    both_refuse(lambda lib: lib.transforms.jacrev(f)(lib.array(Y), lib.array(I32)), "int32", "[1]")
    both_refuse(
        lambda lib: lib.transforms.jacfwd(f, argnums=1)(lib.array(Y), lib.array(I32)),
        "Argument i",
        "int32",
    )
    both_refuse(
        lambda lib: lib.transforms.jacrev(f, argnums=1)(lib.array(Y), lib.array(I32)),
        "Argument i",
        "int32",
    )

    def only_float(x, i):
        return x[i] * 2

    same(
        lambda lib: lib.transforms.jacrev(only_float, argnums=(0, 1), allow_int=True)(
            lib.array(Y), lib.array(I32)
        )[0]
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "keywords, words",
    [
        ({"argnums": 2}, ["argnums 2", "2 positional"]),
        ({"argnums": (0, 2)}, ["argnums"]),
        ({"argnums": "x"}, ["argnums", "'x'"]),
        ({"has_aux": True}, ["has_aux", "pair"]),
        ({"holomorphic": True}, ["complex"]),
    ],
)
def test_errors(mode, keywords, words):
    def program(lib):
        def f(x, y):
            return lib.np.concatenate([x @ y, y])

        return getattr(lib.transforms, mode)(f, **keywords)(lib.array(X), lib.array(Y))

    both_refuse(program, *words)


@pytest.mark.parametrize("mode", MODES)
def test_inside_and_around_other_transforms(mode):
    def program(lib):
        t = lib.transforms
        jac = getattr(t, mode)

        def f(x, y):
            return lib.np.sin(x * y) * x.sum()

        def total(x, y):
            return sum(
                d.sum() for d in jac(f, argnums=(0, 1))(x, y)[:1] if not isinstance(d, tuple)
            )

        xs, y = lib.array(X), lib.array(Y)
        return [
            t.vmap(jac(f), in_axes=(0, None))(xs, y),
            t.vmap(t.vmap(jac(f), in_axes=(None, 0)), in_axes=(0, None))(xs, xs),
            t.grad(lambda x: jac(f)(x, y).sum())(xs[0]),
            t.jvp(lambda x: jac(f)(x, y), (xs[0],), (xs[1],)),
            jac(t.vmap(f, in_axes=(0, None)))(xs, y),
            t.vmap(t.grad(lambda x, y: (jac(f, argnums=1)(x, y) ** 2).sum()), in_axes=(0, None))(
                xs, y
            ),
        ]

    same(program, 2e-3)
