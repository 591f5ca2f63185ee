"""mlxshim's control flow: branches and loops, of functions that capture what is around them."""

from __future__ import annotations

from .builder import Builder, Unfit, is_floating
from .operations import operation

BODIES = [
    "mx.sin(p)",
    "p * 0.5",
    "mx.tanh(p) * p",
    "p + 0.1 * mx.sum({z})",
    "p * mx.cos({z})",
    "p * 1",
]


def _body(b: Builder, x: str) -> str:
    """An expression in p, which has the shape and the dtype of x."""
    z = b.some(is_floating) or x
    body = b.choose(BODIES).format(z=z)
    b_x = b.arrays[x]
    value = eval(f"lambda p: {body}", dict(b.namespace))(b_x)
    if value.shape != b_x.shape:
        raise Unfit
    return body if value.dtype == b_x.dtype else f"({body}).astype({x}.dtype)"


@operation("flow", 3)
def branches(b: Builder):
    x = b.floating()
    n = b.like("integers", ())
    first, second = f"lambda p: {_body(b, x)}", f"lambda p: {_body(b, x)}"
    preds = [f"{n} > 1", f"mx.sum({x}) > 0", "True", f"mx.any({x} > 1)"]
    form = b.choose(["cond", "cond", "switch"])
    if form == "cond":
        b.let(f"t.cond({b.choose(preds)}, {first}, {second}, {x})")
    else:
        b.let(f"t.switch({n}, [{first}, {second}, lambda p: -p], {x})")


@operation("flow", 2)
def while_loop(b: Builder):
    x = b.floating()
    n = b.like("integers", ())
    test = b.choose(["v[0] < 3", "v[0] < 2", "(v[0] < 4) & (mx.sum(mx.abs(v[1])) < 9)"])
    body = f"lambda p: {_body(b, x)}"
    b.let(f"t.while_loop(lambda v: {test}, lambda v: (v[0] + 1, ({body})(v[1])), ({n}, {x}))[1]")


@operation("flow", 2)
def fori_loop(b: Builder):
    x = b.floating()
    upper = b.choose(["3", b.like("integers", ())])
    body = b.choose([_body(b, x), f"p + (i * {x}).astype(p.dtype)"])
    b.let(f"t.fori_loop({b.number(0, 1)}, {upper}, lambda i, p: {body}, {x})")


@operation("flow", 3)
def scan(b: Builder):
    x = b.floating(1, lambda x: 0 < x.shape[0] < 5)
    z = b.some(is_floating) or x
    step = b.choose(["mx.sin(c) + p", "c * p", "mx.tanh(c + p * mx.sum({z}))"]).format(z=z)
    out = b.choose(["c * p", "c + 1", "p", "mx.sum(c) * mx.sum(p)"])
    row = f"{x}[0] * 0.5"
    reverse = b.choose(["", ", reverse=True"])
    cast = f"({step}).astype({x}.dtype)"
    place = b.choose(["", "[0]", "[1]"])
    b.let(f"t.scan(lambda c, p: ({cast}, {out}), {row}, {x}{reverse}){place}")


@operation("flow", 2)
def mapped_in_turn(b: Builder):
    x = b.floating(1, lambda x: 0 < x.shape[0] < 5)
    z = b.some(is_floating) or x
    bodies = ["mx.sum(p) * p", "mx.sin(p)", f"p * mx.sum({z})"]
    if b.chance(2):
        b.let(f"t.map(lambda p: {b.choose(bodies)}, {x})")
        return
    axis = b.number(0, b.arrays[x].ndim - 1)
    if not 0 < b.arrays[x].shape[axis] < 6:
        raise Unfit
    fun = b.choose(["mx.maximum", "mx.add", "lambda p, q: p * q", "mx.minimum"])
    b.let(f"t.associative_scan({fun}, {x}, axis={axis})")
