"""Places of an array: reading and writing at indices, slices that begin at an array, sorting."""

from __future__ import annotations

import mlx.core as mx

from .builder import Builder, Unfit, broadcast, is_floating, is_integer
from .operations import operation

# A program's integers are from 0 to 3: `i % n` is a place of n.


def _index(b: Builder, n: int, shape: tuple[int, ...], distinct: bool = False) -> str:
    """Places of an axis of n; distinct ones are all of those that begin at an argument."""
    if not n:
        raise Unfit
    if distinct and shape:
        if len(shape) > 1 or shape[0] > n:
            raise Unfit
        step = b.choose(["mx.arange({k})", "mx.arange({k})[::-1]"]).format(k=shape[0])
        return f"({step} + {b.like('integers', ())}) % {n}"
    found = b.some(lambda x: is_integer(x) and x.shape == shape)
    i = found if found and not b.chance(3) else b.argument("integers", shape)
    forms = [f"{i} % {n}", f"{i} % {n}", f"mx.remainder({i}, {n}) - {n}"]
    forms += [f"({i} % {n}).astype(mx.{b.choose(['uint8', 'int64', 'uint32', 'int8', 'uint16'])})"]
    return b.choose(forms)


def _slice(b: Builder, n: int) -> str:
    i, j = b.number(0, n), b.number(0, n)
    forms = [":", f"{i}:", f":{j}", f"{min(i, j)}:{max(i, j)}", "::2", "::-1", f"{i}::-2"]
    return b.choose([*forms, f"-{max(i, 1)}:", f"{n}:{i}:-1"])


def key(b: Builder, shape: tuple[int, ...], distinct: bool = False) -> str:
    """An index of every kind for an array of that shape; `distinct`, with no place twice."""
    arrays = b.choose([0, 1, 1, 2]) if shape else 0
    which = b.draw_some(range(len(shape)), arrays)
    common = b.choose([(2,), (3,), (1,), (), (2, 2), (3, 1), (0,)])
    parts, first = [], True
    for axis, n in enumerate(shape):
        if axis in which:
            if n and b.chance(6) and not (distinct and not first):
                places = [b.number(0, n - 1) for _ in range(b.number(1, 3))]
                parts.append(str(sorted(set(places)) if distinct else places))
            else:
                extent = common if first or not b.chance(3) else common[1:]
                parts.append(_index(b, n, extent, distinct and first))
            first = False
        elif n and b.chance(3):
            parts.append(str(b.number(-n, n - 1)))
        else:
            parts.append(_slice(b, n))
    if b.chance(3):
        parts = parts[: b.number(0, len(parts))] if not which else parts
    if b.chance(3):
        at = b.number(0, len(parts))
        run = at
        while run < len(parts) and ":" in parts[run] and b.chance(2):
            run += 1
        # What dots stand for is taken whole.
        parts[at:run] = ["..."]
    if b.chance(4):
        parts.insert(b.number(0, len(parts)), "None")
    return ", ".join(parts) or "..."


# Reading ----------------------------------------------------------------------------------------


@operation("indexing", 5)
def read(b: Builder):
    x = b.floating(1)
    b.let(f"{x}[{key(b, b.arrays[x].shape)}]")


@operation("indexing", 2)
def taken(b: Builder):
    x = b.floating(1)
    shape = b.arrays[x].shape
    axis = b.axis(len(shape))
    places = b.choose([(2,), (3,), (), (2, 1), (0,)])
    forms = ["mx.take({x}, {i}, axis={a})", "mx.take({x}, {i})"]
    i = _index(b, shape[axis], places)
    b.let(b.choose(forms).format(x=x, i=i, a=axis))


@operation("indexing", 2)
def taken_along(b: Builder):
    x = b.floating(1)
    shape = b.arrays[x].shape
    axis = b.axis(len(shape))
    places = list(shape)
    places[axis] = b.choose([1, 2, 3])
    if b.chance(3):
        other = b.number(0, len(shape) - 1)
        if other != axis % len(shape):
            places[other] = 1
    forms = [_index(b, shape[axis], tuple(places))]
    forms += [f"mx.argmax({x}, axis={axis}, keepdims=True)", f"mx.argsort({x}, axis={axis})"]
    b.let(f"mx.take_along_axis({x}, {b.choose(forms)}, axis={axis})")


@operation("indexing")
def of_integers(b: Builder):
    x = b.some(is_integer) or b.argument("integers", b.shape(1))
    b.let(f"{x}[{key(b, b.arrays[x].shape)}]")


@operation("indexing", 2)
def dynamic_slice(b: Builder):
    x = b.floating(1, lambda x: x.size > 0)
    shape = b.arrays[x].shape
    axes = b.draw_some(range(len(shape)), b.choose([1, 1, 2]))
    sizes = [b.number(1, n) if a in axes else n for a, n in enumerate(shape)]
    start = b.like("integers", (len(axes),))
    # A start that does not fit is MLX's own affair.
    room = [shape[a] - sizes[a] + 1 for a in axes]
    b.let(f"t.slice({x}, {start} % mx.array({room}), {tuple(axes)}, {tuple(sizes)})")


@operation("indexing")
def shifted(b: Builder):
    x = b.floating(1, lambda x: x.size > 0)
    shape = b.arrays[x].shape
    axis = b.axis(len(shape))
    forms = [f"mx.roll({x}, {b.number(-2, 3)}, {axis})", f"mx.repeat({x}, 2, axis={axis})"]
    forms += [f"mx.roll({x}, 2)", f"mx.tile({x}, {b.choose([2, (2, 1)])})"]
    pad = tuple((b.number(0, 2), b.number(0, 1)) for _ in shape)
    forms += [f"mx.pad({x}, {pad}, constant_values=0.5)", f"mx.pad({x}, {pad}, mode='edge')"]
    strides = tuple(b.number(1, 2) for _ in shape)
    room = sum((n - 1) * s for n, s in zip(shape, strides))
    if room < b.arrays[x].size:
        forms += [f"mx.as_strided({x}, {shape}, {strides}, {b.arrays[x].size - 1 - room})"]
    b.let(b.choose(forms))


# Writing ----------------------------------------------------------------------------------------


def _updates(b: Builder, x: str, places: str) -> str:
    """What broadcasts to the places: of their shape, of a part of it, or a number."""
    shape = eval(f"x[{places}]", {**b.namespace, "x": b.arrays[x]}).shape
    if b.chance(4):
        return b.choose(["0.5", "2"])
    if b.chance(3):
        shape = tuple(1 if b.chance(3) else n for n in shape[b.number(0, len(shape)) :])
    found = b.some(lambda y: y.shape == shape and is_floating(y))
    if found and b.chance(2):
        return found
    return b.like("normal", shape, b.choose([b.dtype(x), b.dtype(x), "float32"]))


def _copied(b: Builder, x: str) -> tuple[str, str, str]:
    """The array that is written to: a copy, or x itself; the line before, and what is rebound."""
    if b.chance(2):
        return x, "", x
    w = f"w{len(b.lines)}"
    return w, f"{w} = {b.choose([f'mx.array({x})', f'{x} * 1', f'mx.zeros_like({x})'])}\n", ""


@operation("updates", 5)
def written(b: Builder):
    x = b.floating(1)
    places = key(b, b.arrays[x].shape, distinct=True)
    u = _updates(b, x, places)
    w, setup, rebinds = _copied(b, x)
    if b.chance(4):
        setup += f"same = {w}\n"  # which sees it, too
    setup += f"{w}[{places}] {b.choose(['=', '=', '+=', '*='])} {u}"
    b.let(f"{w} * {b.choose(['1', '2', w])}", setup=setup, rebinds=rebinds)


@operation("updates", 2)
def written_in_turn(b: Builder):
    x = b.floating(1, lambda x: 0 < x.shape[0] < 5)
    n = b.arrays[x].shape[0]
    w = f"w{len(b.lines)}"
    first = b.choose([f"mx.zeros_like({x})", f"{x} * 1", f"mx.zeros({x}.shape)"])
    step = b.choose([f"mx.sin({x}[n]) + {w}[n - 1]", f"{w}[n - 1] * {x}[n]", f"{w}[n] - {x}[-n]"])
    b.let(w, setup=f"{w} = {first}\nfor n in range({n}):\n    {w}[n] = {step}")


@operation("updates", 4)
def at(b: Builder):
    x = b.floating(1)
    op = b.choose(["add", "add", "subtract", "multiply", "divide", "maximum", "minimum"])
    # Of those that come together at one place MLX differentiates sums only.
    places = key(b, b.arrays[x].shape, distinct=op not in ("add", "subtract"))
    u = _updates(b, x, places)
    if op == "divide" and u in b.arrays:
        u = f"(1 + mx.abs({u}))"
    if op in ("maximum", "minimum") and any(c in places for c in "%[") and u in b.arrays:
        # MLX's derivative takes a slice beside an array for one entry (docs/mlx-issues.md).
        u = f"mx.stop_gradient({u})"
    b.let(f"{x}.at[{places}].{op}({u})")


@operation("updates", 2)
def masked(b: Builder):
    x = b.floating(1)
    shape = b.arrays[x].shape
    mask = shape[: b.number(1, len(shape))]
    m = b.choose([b.like("booleans", mask), f"({x} > 0)"])
    below = shape if m not in b.arrays else mask
    u = b.choose(["0.5", "count", "row"])
    if u == "count":  # one for each that may be True
        size = mx.zeros(below).size
        u = b.like("normal", (size, *shape[len(below) :]), b.dtype(x))
    elif u == "row":
        u = b.like("normal", shape[len(below) :], b.dtype(x))
    w, setup, rebinds = _copied(b, x)
    b.let(f"{w} * 1", setup=f"{setup}{w}[{m}] = {u}", rebinds=rebinds)


@operation("updates", 2)
def put_along(b: Builder):
    x = b.floating(1)
    shape = b.arrays[x].shape
    axis = b.axis(len(shape))
    count = b.number(1, max(shape[axis], 1))
    scores = b.like("normal", shape)
    whole = tuple(count if a == axis % len(shape) else n for a, n in enumerate(shape))
    u = b.like("normal", whole, b.dtype(x))
    cut = ", ".join(f":{count}" if a == axis % len(shape) else ":" for a in range(len(shape)))
    places = f"mx.argsort({scores}, axis={axis})[{cut}]"
    b.let(f"mx.put_along_axis({x}, {places}, {u}, axis={axis})")


@operation("updates", 2)
def dynamic_update(b: Builder):
    x = b.floating(1, lambda x: x.size > 0)
    shape = b.arrays[x].shape
    axes = b.draw_some(range(len(shape)), b.choose([1, 1, 2]))
    sizes = tuple(b.number(1, n) if a in axes else n for a, n in enumerate(shape))
    room = [shape[a] - sizes[a] + 1 for a in axes]
    start, u = b.like("integers", (len(axes),)), b.like("normal", sizes, b.dtype(x))
    b.let(f"t.slice_update({x}, {u}, {start} % mx.array({room}), {tuple(axes)})")


# Sorting ----------------------------------------------------------------------------------------


@operation("sorting", 3)
def in_order(b: Builder):
    x = b.floating(1)
    axis = b.choose([b.axis(b.arrays[x].ndim), b.axis(b.arrays[x].ndim), None])
    forms = ["mx.sort({x}, axis={a})", "mx.sort({x} * {y}, axis={a})", "mx.argsort({x}, axis={a})"]
    if axis is None:
        forms += ["mx.flatten({x})[mx.argsort({x}, axis=None)]"]
    else:
        forms += ["mx.take_along_axis({x}, mx.argsort(-{x}, axis={a}), axis={a})"]
        forms += ["mx.argsort(mx.argsort({x}, axis={a}), axis={a})"]
    y = b.some(lambda y: broadcast(b.arrays[x], y) and is_floating(y))
    b.let(b.choose(forms).format(x=x, y=y or x, a=axis))


@operation("sorting", 3)
def parted(b: Builder):
    """What is certain of a partition: its element, and what is on either side of it."""
    x = b.floating(1, lambda x: x.size > 0)
    shape = b.arrays[x].shape
    axis = b.choose([b.axis(len(shape)), b.axis(len(shape)), None])
    n = b.arrays[x].size if axis is None else shape[axis]
    k = b.number(0, n - 1) - (n if b.chance(3) else 0)
    at = axis or 0
    forms = [f"mx.partition({x}, {k}, axis={axis})"]
    if axis is not None:
        forms += [f"mx.take_along_axis({x}, mx.argpartition({x}, {k}, axis={axis}), axis={axis})"]
    parts = f"mx.split({b.choose(forms)}, [{k % n}, {k % n + 1}], axis={at})"
    b.let(f"[mx.sort(y, axis={at}) for y in {parts} if y.size]")


@operation("sorting", 2)
def largest(b: Builder):
    x = b.floating(1, lambda x: x.size > 0)
    shape = b.arrays[x].shape
    axis = b.choose([b.axis(len(shape)), -1, None])
    k = b.number(1, b.arrays[x].size if axis is None else shape[axis])
    b.let(f"mx.sort(mx.topk({x}, {k}, axis={axis}), axis={axis or 0})")


@operation("sorting")
def of_integers_in_order(b: Builder):
    x = b.some(is_integer) or b.argument("integers", b.shape(1))
    axis = b.axis(b.arrays[x].ndim)
    b.let(f"mx.sort({x}, axis={axis})")


@operation("sorting")
def searched(b: Builder):
    if not hasattr(mx, "searchsorted"):
        raise Unfit
    a = b.like("normal", (b.choose([5, 1, 3]),))
    v = b.floating()
    side = b.choose(["", ", side='right'"])
    b.let(f"mx.searchsorted(mx.sort({a}), {v}.astype(mx.float32){side})")
