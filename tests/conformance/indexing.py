"""Reading and writing at indices: every kind of index, indices mapped or not, repeated indices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx

from .case import booleans, case, integers, normal

X = normal(3, 4, 5)
FIRST = ("vmap", "vmap(vmap)", "vmap(grad)", "grad(vmap)")
FEW = (*FIRST, "vmap(vjp)", "compile(vmap)")


def distinct(*shape: int, high: int, dtype: Any = mx.int32) -> Callable[[], mx.array]:
    """Indices in which the last axis has no number twice: what is written has one value."""

    def draw() -> mx.array:
        order = mx.argsort(mx.random.uniform(shape=(*shape[:-1], high)), axis=-1)
        return order[..., : shape[-1]].astype(dtype)

    return draw


# Reading ----------------------------------------------------------------------------------------

I2, I3 = integers(2, high=3), integers(3, high=4)
SIGNED = integers(2, low=-3, high=3)

case("array.__getitem__/array", lambda x, i: x[i], X, integers(2, 2, high=3))
case("array.__getitem__/negative", lambda x, i: x[i], X, SIGNED, modes=FEW)
case("array.__getitem__/scalar", lambda x, i: x[i], X, integers(high=3))
case("array.__getitem__/scalar of a vector", lambda x, i: x[i], normal(4), integers(high=4))
case("array.__getitem__/uint8", lambda x, i: x[i], X, integers(2, high=3, dtype=mx.uint8))
case("array.__getitem__/list", lambda x: x[[0, 2, 0]], X, modes=FIRST)
case("array.__getitem__/two arrays", lambda x, i, j: x[i, j], X, I2, integers(3, 1, high=4))
case("array.__getitem__/inner array", lambda x, i: x[:, i], X, I3)
case("array.__getitem__/last array", lambda x, i: x[..., i], X, integers(2, 2, high=5))
case("array.__getitem__/apart", lambda x, i, j: x[i, :, j], X, I2, integers(2, high=5))
case("array.__getitem__/array and slice", lambda x, i: x[i, 1:, ::2], X, I2)
case("array.__getitem__/slice and array", lambda x, i: x[::-1, i, None, 1:4], X, I3, modes=FEW)
case("array.__getitem__/integer and array", lambda x, i: x[-1, i], X, I3, modes=FEW)
case("array.__getitem__/integer apart", lambda x, i: x[1, :, i], X, I3, modes=FEW)
case("array.__getitem__/scalars", lambda x, i, j: x[i, 1, j], X, integers(high=3), integers(high=5))
case("array.__getitem__/of integers", lambda x, i: x[i], integers(4, 2), I2, modes=FIRST)
case(
    "array.__getitem__/one of many",
    lambda x, i: mx.tanh(x)[i[0], i[1:]] * x[0, i[1:]],
    X,
    integers(3, high=3),
)
case("take", lambda x, i: mx.take(x, i, axis=1), X, integers(2, 2, high=4))
case("take/flat", lambda x, i: mx.take(x, i), X, integers(3, high=60))
case("take/last", lambda x, i: mx.take(x, i, axis=-1), X, integers(3, low=-5, high=5), modes=FEW)
case("take/scalar", lambda x, i: mx.take(x, i, axis=2), X, integers(high=5))
case("take/number", lambda x: mx.take(x, 2, axis=1), X)
case("take/embedding", lambda x, i: mx.take(x, i, axis=0), normal(6, 2), integers(5, high=6))
case("take_along_axis", lambda x, i: mx.take_along_axis(x, i, 1), X, integers(3, 2, 5, high=4))
case(
    "take_along_axis/broadcast",
    lambda x, i: mx.take_along_axis(x, i, axis=-1),
    normal(3, 1, 5),
    integers(1, 4, 2, high=5),
)
case("take_along_axis/flat", lambda x, i: mx.take_along_axis(x, i, None), X, integers(4, high=60))
case(
    "take_along_axis/of argmax",
    lambda x: mx.take_along_axis(x, mx.argmax(x, axis=1, keepdims=True), 1),
    X,
)


# The references are for MLX's own kernels on the CPU, which free a start before they read it.
def _inside(n: int, start: mx.array, size: int) -> mx.array:
    """(n, size): which place of an axis is which of the slice."""
    return mx.expand_dims(mx.arange(n), 1) == start + mx.arange(size)


def _sliced(x: mx.array, start: mx.array, axes: Any, sizes: Any) -> mx.array:
    for k, axis in enumerate(axes):
        x = mx.take(x, start[k] + mx.arange(sizes[axis]), axis=axis)
    return x


def _replaced(y: mx.array, u: mx.array, start: mx.array, axes: Any) -> mx.array:
    inside = mx.ones((1,) * y.ndim, y.dtype)
    for k, axis in enumerate(axes):
        places = _inside(y.shape[axis], start[k], u.shape[axis]).astype(u.dtype)
        u = mx.moveaxis(mx.tensordot(places, u, ([1], [axis])), 0, axis)
        along = mx.max(places, axis=1)
        inside = inside * mx.reshape(along, [-1 if i == axis else 1 for i in range(y.ndim)])
    return y * (1 - inside) + u


def _pair() -> mx.array:
    return mx.stack([mx.random.randint(0, 3, ()), mx.random.randint(0, 2, ())])


def _slice_case(name: str, axes: Any, sizes: Any, source: Any) -> None:
    case(
        name,
        lambda x, i: mx.slice(x, i, axes, sizes),
        X,
        source,
        reference=lambda x, i: _sliced(x, i, axes, sizes),
    )


_slice_case("slice", (1,), (3, 2, 5), integers(1, high=3))
_slice_case("slice/axes", (2, 0), (2, 4, 3), _pair)
case(
    "slice/number",
    lambda x: mx.slice(x, mx.array([1]), (0,), (2, 4, 5)),
    X,
    reference=lambda x: x[1:],
)

# Writing ----------------------------------------------------------------------------------------


def put(*key: Any) -> Callable[..., mx.array]:
    """`y[key] = u` on a new array; arrays in the key are the arguments that follow."""

    def fun(y: mx.array, u: Any, *arrays: mx.array) -> mx.array:
        y = y * 1
        y[_fill(key, arrays)] = u
        return y

    return fun


def _fill(key: tuple[Any, ...], arrays: tuple[mx.array, ...]) -> Any:
    rest = iter(arrays)
    full = tuple(next(rest) if k is I else k for k in key)
    return full[0] if len(full) == 1 else full


I = object()  # noqa: E741  an array of indices
S = slice
ALL = slice(None)
Y = normal(3, 4, 5)

case("array.__setitem__", put(S(1, None)), Y, normal(2, 4, 5), dtypes=(mx.float32, mx.float16))
case("array.__setitem__/broadcast", put(S(1, None)), Y, normal(4, 1))
case("array.__setitem__/leading ones", put(S(1, None)), Y, normal(1, 1, 2, 1, 5), modes=FEW)
case("array.__setitem__/number", lambda y: put(S(1, None))(y, 2.5), Y)
case("array.__setitem__/integer", put(-2), Y, normal(4, 5))
case("array.__setitem__/integers", put(1, -1), Y, normal(5), modes=FEW)
case("array.__setitem__/element", put(1, 2, 3), Y, normal(), modes=FEW)
case("array.__setitem__/strides", put(S(None, None, -1), S(3, 0, -2)), Y, normal(3, 2, 5))
case(
    "array.__setitem__/steps of one entry",
    put(S(None, None, -1), S(0, 2, 2), S(4, 2, -2)),
    normal(1, 4, 5),
    normal(1, 1, 1),
    reference=put(S(0, 1), S(0, 1), S(4, 5)),
)
case("array.__setitem__/cache", put(..., S(1, 3), ALL), Y, normal(3, 2, 5))
case("array.__setitem__/ellipsis", put(1, ..., S(None, None, 2)), Y, normal(4, 3), modes=FEW)
case("array.__setitem__/none", put(None, S(0, 2), ..., None), Y, normal(1, 2, 4, 5, 1), modes=FEW)
case("array.__setitem__/everything", put(...), Y, normal(4, 5), modes=FEW)
case("array.__setitem__/all", put(ALL), Y, normal(4, 5), modes=FEW)
case("array.__setitem__/integers of integers", put(S(0, 2)), integers(4, 2), integers(2))
case("array.__setitem__/cast", put(S(0, 2)), integers(4, 2), normal(2), modes=("vmap",))
case("array.__setitem__/cast to float", put(S(0, 2)), normal(4, 2), integers(2), modes=FEW)
case("array.__setitem__/array", put(I), Y, normal(2, 4, 5), distinct(2, high=3))
case("array.__setitem__/array, broadcast", put(I), Y, normal(5), distinct(2, high=3))
case("array.__setitem__/scalar", put(I), Y, normal(4, 5), integers(high=3))
case("array.__setitem__/inner array", put(ALL, I), Y, normal(3, 2, 5), distinct(2, high=4))
case("array.__setitem__/negative", put(ALL, I), Y, normal(2, 1), distinct(2, high=4), modes=FEW)
case("array.__setitem__/last array", put(..., I), Y, normal(4, 2), distinct(2, high=5))
case(
    "array.__setitem__/two arrays",
    put(I, I),
    Y,
    normal(2, 5),
    distinct(2, high=3),
    integers(2, high=4),
    modes=FIRST,
)
case(
    "array.__setitem__/apart",
    put(I, ALL, I),
    Y,
    normal(2, 4),
    distinct(2, high=3),
    integers(2, high=5),
    modes=FIRST,
)
case(
    "array.__setitem__/array and strides",
    put(S(None, None, 2), I, S(None, None, -2)),
    Y,
    normal(2, 2, 3),
    distinct(2, high=4),
)
case("array.__setitem__/array and none", put(I, None), Y, normal(2, 1, 4, 5), distinct(2, high=3))
case("array.__setitem__/integer and array", put(1, I), Y, normal(2, 5), distinct(2, high=4))
case("array.__setitem__/list", put(ALL, [0, 2]), Y, normal(3, 2, 5), modes=FEW)
case("array.__setitem__/mask", lambda y, m: put(m)(y, 0.5), Y, booleans(3, 4))
case("array.__setitem__/mask of updates", put(I), Y, normal(12, 5), booleans(3, 4))
case("array.__setitem__/whole mask", put(I), Y, normal(60), booleans(3, 4, 5))
case("array.__setitem__/added to", lambda y, u: _added(y, u, S(1, 3)), Y, normal(2, 4, 5))
case(
    "array.__setitem__/added at indices",
    lambda y, u, i: _added(y, u, i),
    Y,
    normal(2, 4, 5),
    distinct(2, high=3),
)


def _added(y: mx.array, u: mx.array, key: Any) -> mx.array:
    y = y + 0
    y[key] += u
    y[key] *= 2
    return y


def _seen_elsewhere(y: mx.array, u: mx.array) -> mx.array:
    y = mx.tanh(y)
    before, same = y + 0, y
    y[1] = u
    return same * before


def _in_turn(u: mx.array) -> mx.array:
    y = mx.zeros((3, 4))
    for k in range(3):
        y[k] = u[k] + (y[k - 1] if k else 0)
    return y


case("array.__setitem__/seen elsewhere", _seen_elsewhere, Y, normal(4, 5))
case("array.__setitem__/in turn", _in_turn, normal(3, 4))

# x.at[...] --------------------------------------------------------------------------------------


def at(op: str, *key: Any) -> Callable[..., mx.array]:
    def fun(y: mx.array, u: Any, *arrays: mx.array) -> mx.array:
        return getattr(y.at[_fill(key, arrays)], op)(u)

    return fun


def away(*shape: int) -> Callable[[], mx.array]:
    """What can be divided by."""
    return lambda: mx.random.uniform(0.5, 1.5, shape)


def in_two(op: str, *key: Any) -> Callable[..., mx.array]:
    """What it means: old versions differentiate a window's updates wrongly."""
    fun = getattr(mx, op)

    def meaning(y: mx.array, u: Any) -> mx.array:
        full = _fill(key, ())
        return put(*key)(y, fun(y[full], u))

    return meaning


for op in ("add", "subtract", "multiply", "divide", "maximum", "minimum"):
    modes = FEW if op in ("subtract", "divide", "minimum") else None
    options: dict[str, Any] = {"modes": modes} if modes else {}
    # Where there are ties, as in half precision, their derivative has several values.
    unique = op not in ("maximum", "minimum")
    key = S(1, None)
    meaning = in_two(op, key)
    case(f"array.at.{op}", at(op, key), Y, away(2, 4, 5), reference=meaning, half=unique, **options)
    case(f"array.at.{op}/broadcast", at(op, ..., S(3, 0, -2)), Y, away(4, 1), modes=FIRST)
    case(f"array.at.{op}/array", at(op, ALL, I), Y, away(3, 2, 5), distinct(2, high=4), **options)
    case(
        f"array.at.{op}/integer",
        at(op, 1),
        Y,
        away(),
        reference=in_two(op, 1),
        half=unique,
        **options,
    )
    case(f"array.at.{op}/ellipsis", at(op, ...), Y, away(4, 1), modes=("vmap", "vmap(grad)"))
    case(f"array.at.{op}/number", lambda y, op=op: at(op, S(0, 2))(y, 2.5), Y, modes=FIRST)
case("array.at.add/repeated", at("add", I), Y, normal(4, 5), integers(2, 2, high=3))
case("array.at.subtract/repeated", at("subtract", I), Y, normal(6, 4, 5), integers(6, high=3))
case("array.at.maximum/repeated", at("maximum", I), Y, normal(6, 4, 5), integers(6, high=3))
case("array.at.multiply/repeated", at("multiply", I), Y, away(6, 4, 5), integers(6, high=3))


def _product(inverse: bool) -> Callable[..., mx.array]:
    """`y.at[i].multiply(u)` for every i at once: MLX has no derivative of the operation itself."""

    def of(y: mx.array, u: mx.array, i: mx.array) -> mx.array:
        u = mx.reciprocal(u) if inverse else u
        # No `where`, whose jvp reads what is not there on 0.31.
        here = mx.expand_dims(i[:, None] == mx.arange(y.shape[0]), (2, 3)).astype(u.dtype)
        return y * mx.prod(here * mx.expand_dims(u, 1) + (1 - here), 0)

    return of


for op in ("multiply", "divide"):
    case(
        f"array.at.{op}/its derivative",
        at(op, I),
        normal(3, 2, 2),
        away(5, 2, 2),
        integers(5, high=3),
        reference=_product(op == "divide"),
        modes=("call", *FIRST, "vmap(jvp)"),
    )
case(
    "array.at.add/apart",
    at("add", I, ALL, I),
    Y,
    normal(4, 4),
    integers(4, high=3),
    integers(4, high=5),
    modes=FIRST,
)
case(
    "array.at.add/everything",
    at("add", None, S(None, None, -1), I, 2),
    Y,
    normal(1, 3, 4),
    integers(4, high=4),
)
case("array.at.add/of integers", at("add", I), integers(4, 2), integers(5, 2), integers(5, high=4))
case("array.at.add/uint8", at("add", I), Y, normal(5), integers(5, high=3, dtype=mx.uint8))


def along(axis: int, source: Callable[[], mx.array]) -> Callable[[], mx.array]:
    return lambda: mx.swapaxes(source(), axis, -1)


case(
    "put_along_axis",
    lambda y, u, i: mx.put_along_axis(y, i, u, axis=1),
    Y,
    normal(3, 2, 5),
    along(1, distinct(3, 5, 2, high=4)),
)
case(
    "put_along_axis/broadcast",
    lambda y, u, i: mx.put_along_axis(y, i, u, axis=-1),
    Y,
    normal(4, 1),
    distinct(3, 1, 2, high=5),
)
case(
    "put_along_axis/flat",
    lambda y, u, i: mx.put_along_axis(y, i, u, axis=None),
    Y,
    normal(6),
    distinct(6, high=60),
    modes=FEW,
)
case(
    "put_along_axis/of zeros",
    lambda u, i: mx.put_along_axis(mx.zeros((2, 6)), i, u, axis=-1),
    normal(2, 3),
    distinct(2, 3, high=6),
)

# Slices that begin at an array -------------------------------------------------------------------


def _update_case(name: str, axes: Any, updates: Any, source: Any) -> None:
    case(
        name,
        lambda y, u, i: mx.slice_update(y, u, i, axes),
        Y,
        updates,
        source,
        reference=lambda y, u, i: _replaced(y, u, i, axes),
    )


_update_case("slice_update", (1,), normal(3, 2, 5), integers(1, high=3))
_update_case("slice_update/axes", (2, 0), normal(2, 4, 3), _pair)
case(
    "slice_update/number",
    lambda y, u: mx.slice_update(y, u, mx.array([1]), (0,)),
    Y,
    normal(2, 4, 5),
    reference=put(S(1, None)),
)
case(
    "slice_update/fewer dimensions",
    lambda y, u, i: mx.slice_update(y, u, i, (2,)),
    Y,
    normal(2),
    integers(1, high=4),
    reference=lambda y, u, i: _replaced(y, mx.broadcast_to(u, (3, 4, 2)), i, (2,)),
)

# Copies -----------------------------------------------------------------------------------------

case("as_strided", lambda x: mx.as_strided(x, (3, 4), (2, 1), 1), normal(4, 5))
case("as_strided/overlapping", lambda x: mx.as_strided(x, (2, 3, 2), (5, 1, 1)), normal(3, 5))
case("as_strided/backwards", lambda x: mx.as_strided(x, (4,), (-2,), 7), normal(2, 5))
case("as_strided/of a transpose", lambda x: mx.as_strided(x.T, (3, 3), (1, 2)), normal(4, 5))
case("as_strided/shape", lambda x: mx.as_strided(x, (5, 4)), normal(4, 5), modes=FEW)
case("pad", lambda x: mx.pad(x, ((1, 2), (0, 0), (0, 3)), constant_values=1.5), X)
case("pad/all axes", lambda x: mx.pad(x, 1), normal(3, 4))


def _padded(x: mx.array, v: mx.array) -> mx.array:
    inside = mx.pad(mx.ones(x.shape, mx.bool_), ((1, 0), (2, 1)))
    return mx.where(inside, mx.pad(x, ((1, 0), (2, 1))), v)


case(
    "pad/value",
    lambda x, v: mx.pad(x, ((1, 0), (2, 1)), constant_values=v),
    normal(3, 4),
    normal(),
    reference=_padded,  # MLX's derivative with respect to the value has the padded shape
)
for mode in ("edge", "reflect", "symmetric"):  # reflect and symmetric since 0.32
    case(f"pad/{mode}", lambda x, m=mode: mx.pad(x, ((1, 2), (0, 2)), mode=m), normal(3, 4))
case("repeat", lambda x: mx.repeat(x, 3, axis=1), X)
case("repeat/flat", lambda x: mx.repeat(x, 2), normal(3, 4), modes=FEW)
case("roll", lambda x: mx.roll(x, 2, axis=1), X)
case("roll/axes", lambda x: mx.roll(x, (1, -2), axis=(0, 2)), X, modes=FEW)
case("roll/flat", lambda x: mx.roll(x, 3), normal(3, 4), modes=FEW)
N = integers(low=-9, high=9)
case("roll/by an array", lambda x, n: mx.roll(x, n, axis=1), X, N)
case("roll/by arrays", lambda x, n, k: mx.roll(x, (n, k), axis=(0, -1)), X, N, N, modes=FEW)
case("roll/by an array, axes", lambda x, n: mx.roll(x, n, axis=[0, 1]), X, N, modes=FEW)
case("roll/by an array, flat", lambda x, n: mx.roll(x, n), normal(3, 4), N, modes=FEW)
case("tile", lambda x: mx.tile(x, (2, 1, 3)), normal(2, 3))
case("tile/number", lambda x: mx.tile(x, 2), normal(2, 3), modes=FEW)
