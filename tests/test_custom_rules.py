"""What a rule may be, return and use: custom_vjp, custom_jvp and their like against JAX's."""

from __future__ import annotations

import functools
import gc
import warnings
import weakref

import mlx.core as mx
import numpy as np
import pytest
from custom_programs import jvp_rule, rules, vmap_rule
from libraries import OURS, normal, same

import mlxshim
from mlxshim import PerformanceWarning, grad, vmap
from mlxshim.core.versions import MLX

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
    same(RULES[name](OURS, normal(OURS, 4)), RULES[name](jax, normal(jax, 4)))


def test_nothing_is_kept_alive():
    class Kept:
        pass

    def run(make):
        kept = Kept()
        f = make(lambda x: mx.sin(x) if kept else x)
        h = lambda x: f(x) * f(2 * x)  # noqa: E731
        xs = normal(OURS, 4)
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
    x, ws = mx.array(0.3), normal(OURS, 4)

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
    xs = normal(OURS, 4)
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
        x, layer = normal(lib), Layer()
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


@pytest.mark.skipif(MLX < (0, 32, 0), reason="refused on MLX 0.31")
def test_complex_cotangents_are_those_of_jax(jax):
    def under(lib):
        f = lib.custom_vjp(lambda z: z * z)
        f.defvjp(lambda z: (z * z, z), lambda z, ct: (3 * z * ct,))
        z = lib.np.array(np.complex64(1 + 2j))
        return lib.vjp(lambda z: f(z) * (1 - 1j), z)[1](z)

    same(under(OURS), under(jax))
