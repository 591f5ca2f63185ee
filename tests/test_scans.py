"""scan, map and associative_scan against JAX's, and the dtypes of numbers in loops."""

from __future__ import annotations

import pytest
from libraries import OURS, normal, same


def test_scan_against_jax(jax):
    def under(lib):
        f = lambda c, x: (c + x, {"y": c * x})  # noqa: E731
        xs = normal(lib, 4, 3)
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

        elems = normal(lib, 2, size), normal(lib, 2, size, seed=1)

        def f(*elems):
            axis = elems[0].ndim - 1 if reverse else -1  # JAX takes no negative one reversed
            return lib.lax.associative_scan(affine, elems, reverse=reverse, axis=axis)

        return f(*elems), lib.vmap(f)(*elems), lib.grad(lambda a, b: f(a, b)[1].sum())(*elems)

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
    same(NUMBERS[name](OURS, normal(OURS, 3)), NUMBERS[name](jax, normal(jax, 3)), 1e-3)
