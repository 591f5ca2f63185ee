"""Mistakes with control flow, and what is said of them."""

from __future__ import annotations

import mlx.core as mx
import pytest

import mlxshim
from mlxshim import cond, fori_loop, vmap, while_loop

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
    "switch operands": (
        lambda: mlxshim.switch(0, [mx.sin], x, operand=x),
        TypeError,
        "by position or",
    ),
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
    "map function": (lambda: mlxshim.map(None, x), TypeError, "f must be a function of one"),
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
