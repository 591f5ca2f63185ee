"""Mistakes with rules of one's own, which are an error in JAX too."""

from __future__ import annotations

import mlx.core as mx
import pytest
from custom_programs import jvp_rule, rules, vmap_rule
from libraries import OURS

import mlxshim

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
    for transform in (mlxshim.grad, mlxshim.value_and_grad, mlxshim.vjp):
        transform(mx.sin, *[mx.array(1.0)] * (transform is mlxshim.vjp), reduce_axes=())
        with pytest.raises(NotImplementedError, match=r"reduce_axes .* psum\(gradients, 'batch'\)"):
            transform(mx.sin, reduce_axes=("batch",))
    with pytest.raises(NotImplementedError, match="policy"):
        mlxshim.checkpoint(mx.sin, policy=lambda *_: True)
    with pytest.raises(NotImplementedError, match="symbolic_zeros"):
        mlxshim.custom_vjp(mx.sin).defvjp(mx.sin, mx.sin, symbolic_zeros=True)
    with pytest.raises(NotImplementedError, match="symbolic_zeros"):
        mlxshim.custom_jvp(mx.sin).defjvp(mx.sin, symbolic_zeros=True)
    for made in (mlxshim.custom_vjp, mlxshim.custom_jvp, mlxshim.custom_vmap, mlxshim.checkpoint):
        with pytest.raises(TypeError, match="must be a function"):
            made(3)
