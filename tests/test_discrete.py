"""Integers and truths that were computed from what is differentiated: constants, as in JAX.

Every program takes x, and c that its indices and truths are made of. With c the same tracer as x,
its derivatives have to be those with c a constant.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlxshim import grad, jvp, vmap

X = mx.array([0.3, 1.6, 2.2, 0.9])
COLUMN = mx.array([[0.5], [-1.0]])


def assigned(x, key, value):
    y = x * 2
    y[key] = value
    return y


def gathered(x, c):
    order = mx.argsort(c[:2])
    return mx.gather_mm(mx.ones((2, 1, 4)) * x, W[:, :, :1], rhs_indices=order)


def gathered_quantized(x, c):
    order = mx.argsort(c[:2])
    return mx.gather_qmm(mx.tile(x, 16) * mx.ones((2, 1, 64)), *Q, rhs_indices=order)


W = mx.random.normal((2, 4, 3))
Q = mx.quantize(mx.random.normal((2, 8, 64)))

READING: dict[str, Callable[[mx.array, mx.array], mx.array]] = {
    "argmax": lambda x, c: x[mx.argmax(c)],
    "argsort": lambda x, c: x[mx.argsort(c)] * x,
    "argpartition": lambda x, c: x[mx.argpartition(c, 1)] * x,
    "cast": lambda x, c: x[c.astype(mx.int32)],
    "floor": lambda x, c: x[mx.floor(c).astype(mx.uint32)] * x,
    "count": lambda x, c: x[(c > 1).sum()],
    "in a tuple": lambda x, c: (x * COLUMN)[:, mx.argmin(c)],
    "two": lambda x, c: (x * COLUMN)[mx.argmax(c[:2]), mx.argsort(c)],
    "take": lambda x, c: mx.take(x * COLUMN, mx.argsort(c), axis=1),
    "take_along_axis": lambda x, c: mx.take_along_axis(x, mx.argsort(c), 0) * x,
    "slice": lambda x, c: mx.slice(x, mx.argmin(c[:3])[None], (0,), (2,)),
    "cross_entropy": lambda x, c: nn.losses.cross_entropy(x[None], mx.argmax(c)[None]),
}
WRITING: dict[str, Callable[[mx.array, mx.array], mx.array]] = {
    "assigned": lambda x, c: assigned(x, mx.argmax(c), x[0]),
    "assigned in a tuple": lambda x, c: assigned(x * COLUMN, (0, mx.argsort(c)), x),
    "at": lambda x, c: x.at[mx.argsort(c)].add(x * x),
    "put_along_axis": lambda x, c: mx.put_along_axis(x, mx.argsort(c), x * x, 0),
    "slice_update": lambda x, c: mx.slice_update(x, x[:2] ** 2, mx.argmin(c[:3])[None], (0,)),
}
TRUTHS: dict[str, Callable[[mx.array, mx.array], mx.array]] = {
    "where of a cast": lambda x, c: mx.where((c - 0.3).astype(mx.bool_), x, COLUMN),
    "where of numbers": lambda x, c: mx.where(c - 0.3, x, COLUMN),
    "where of integers": lambda x, c: mx.where(c.astype(mx.int32), x, COLUMN),
    "not": lambda x, c: mx.where(mx.logical_not(c.astype(mx.bool_)), x, COLUMN) + x,
    "and": lambda x, c: mx.where(mx.logical_and(c - 0.3, COLUMN > 0), x, COLUMN),
    "or": lambda x, c: mx.where(mx.logical_or(c - 0.3, COLUMN > 0), x, COLUMN),
    "sum of a cast": lambda x, c: (c - 0.3).astype(mx.bool_).sum() * x,
    "bits": lambda x, c: (c.view(mx.int32) % 7) * x + mx.view(c, mx.uint8)[::4] * x,
    "mask": lambda x, c: assigned(x, c > 1, x[0]),
}
if hasattr(mx, "searchsorted"):
    READING["searchsorted"] = lambda x, c: x[mx.searchsorted(mx.sort(c), c * 0.9)] * x
if hasattr(mx, "logical_xor"):
    TRUTHS["xor"] = lambda x, c: mx.where(mx.logical_xor(c - 0.3, COLUMN > 0), x, COLUMN)
EXPERTS = {"gather_mm": gathered, "gather_qmm": gathered_quantized}

PROGRAMS = {**READING, **WRITING, **TRUTHS, **EXPERTS}
#: MLX 0.31 has no forward mode of these, whatever the indices are made of.
MODES: dict[str, Callable[[Any], Any]] = {
    "grad": lambda f: grad(lambda x: (f(x) ** 2).sum())(X),
    "jvp": lambda f: jvp(f, (X,), (mx.cos(X),))[1],
    "vmap(grad)": lambda f: vmap(grad(lambda x: (f(x) ** 2).sum()))(batch()),
    "grad(vmap)": lambda f: grad(lambda xs: (vmap(f)(xs) ** 2).sum())(batch()),
}


def batch() -> mx.array:
    return mx.stack([X, X[::-1]])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", sorted(PROGRAMS))
def test_derivatives_are_those_of_a_constant(name: str, mode: str):
    f = PROGRAMS[name]
    got = MODES[mode](lambda x: f(x, x))
    if "vmap" in mode:
        want = mx.stack(
            [grad(lambda x, c=c: (f(x, c) ** 2).sum())(x) for x, c in zip(batch(), batch())]
        )
    else:
        want = MODES[mode](lambda x: f(x, X))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    assert np.any(np.array(want) != 0)
