"""Random indices, read and written: every subset mapped, on several axes, under every transform.

What an index means is a matrix P of zeros and ones, with a row for each entry that it chooses:
reading is P x, writing is y without what P chooses and P^T u, and all derivatives are plain.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import pytest

from mlxshim import grad, jvp, vmap
from mlxshim.core.versions import MLX
from mlxshim.testing import MODES, check

Key = tuple[Any, ...]
SEEDS = range(12)
OPERATIONS = ("add", "subtract", "multiply", "divide", "maximum", "minimum")


class Index:
    """A random index of a random array: the key, with a source for each array of indices in it."""

    def __init__(self, seed: int, arrays: bool) -> None:
        self.rng = rng = random.Random(seed)
        self.shape = tuple(rng.randint(2, 4) for _ in range(rng.randint(1, 3)))
        self.sources: list[Callable[[], mx.array]] = []
        self.parts: list[Any] = []
        placed, length = False, rng.randint(1, 2)
        for n in self.shape[: rng.randint(1, len(self.shape))]:
            kind = rng.choice(("slice", "array") if arrays else ("slice", "slice", "int"))
            if (kind == "array" and not placed) or (arrays and not placed and n == self.shape[-1]):
                placed = True
                signed, dtype = rng.random() < 0.5, rng.choice((mx.int32, mx.uint8, mx.int64))
                self.sources.append(_distinct(n, length, signed and dtype != mx.uint8, dtype))
                self.parts.append(self)
            elif kind == "int":
                self.parts.append(rng.randint(-n, n - 1))
            else:
                self.parts.append(self._slice(n))
        if rng.random() < 0.4:
            self.parts.insert(rng.randint(0, len(self.parts)), None)
        if rng.random() < 0.4:
            # What it stands for is taken from the end of the dimensions that have no index.
            self.parts.append(Ellipsis)
        self.size = mx.zeros(self.shape).size

    def _slice(self, n: int) -> slice:
        while True:
            ends = [self.rng.choice((None, *range(-n - 1, n + 2))) for _ in range(2)]
            key = slice(*ends, self.rng.choice((None, 1, 2, -1, -2)))
            if range(*key.indices(n)):
                return key

    def key(self, arrays: tuple[mx.array, ...]) -> Any:
        rest = iter(arrays)
        key = tuple(next(rest) if part is self else part for part in self.parts)
        return key[0] if len(key) == 1 else key

    def chosen(self, arrays: tuple[mx.array, ...]) -> mx.array:
        return mx.reshape(mx.arange(self.size), self.shape)[self.key(arrays)]

    def matrix(self, arrays: tuple[mx.array, ...]) -> mx.array:
        places = mx.reshape(self.chosen(arrays), (-1, 1))
        return (places == mx.arange(self.size)).astype(mx.float32)

    def updates(self) -> tuple[int, ...]:
        """A shape that broadcasts to what is chosen."""
        shape = self.chosen(tuple(source() for source in self.sources)).shape
        kept = shape[self.rng.randint(0, len(shape)) :] if self.rng.random() < 0.3 else shape
        return tuple(1 if self.rng.random() < 0.2 else n for n in kept)

    def modes(self, count: int = 4) -> list[str]:
        return [
            "vmap",
            *self.rng.sample([m for m in MODES if m not in ("call", "vmap")], count - 1),
        ]


def _distinct(n: int, length: int, signed: bool, dtype: Any) -> Callable[[], mx.array]:
    def draw() -> mx.array:
        indices = mx.argsort(mx.random.uniform(shape=(n,)))[:length].astype(mx.int32)
        return (indices - n if signed else indices).astype(dtype)

    return draw


def _away(shape: tuple[int, ...]) -> Callable[[], mx.array]:
    return lambda: mx.random.uniform(0.5, 1.5, shape)


@pytest.fixture(autouse=True)
def _seeded():
    mx.random.seed(0)


@pytest.mark.parametrize("arrays", [False, True], ids=["windows", "arrays"])
@pytest.mark.parametrize("seed", SEEDS)
def test_reading(seed: int, arrays: bool):
    index = Index(seed, arrays)

    def fun(x: mx.array, *i: mx.array) -> mx.array:
        return mx.sin(x)[index.key(i)]

    def meaning(x: mx.array, *i: mx.array) -> mx.array:
        flat = index.matrix(i) @ mx.reshape(mx.sin(x), (-1,))
        return mx.reshape(flat, index.chosen(i).shape)

    check(fun, _away(index.shape), *index.sources, reference=meaning, modes=index.modes())


@pytest.mark.parametrize("arrays", [False, True], ids=["windows", "arrays"])
@pytest.mark.parametrize("seed", SEEDS)
def test_writing(seed: int, arrays: bool):
    index = Index(seed, arrays)

    def fun(y: mx.array, u: mx.array, *i: mx.array) -> mx.array:
        y = mx.sin(y)
        y[index.key(i)] = u
        return y

    def meaning(y: mx.array, u: mx.array, *i: mx.array) -> mx.array:
        return _with(mx.sin(y), _spread(index, u, i), index, i)

    sources = (_away(index.shape), _away(index.updates()), *index.sources)
    check(fun, *sources, reference=meaning, modes=index.modes())


@pytest.mark.parametrize("arrays", [False, True], ids=["windows", "arrays"])
@pytest.mark.parametrize("seed", SEEDS)
def test_updating(seed: int, arrays: bool):
    index = Index(seed, arrays)
    op = OPERATIONS[seed % len(OPERATIONS)]

    def fun(y: mx.array, u: mx.array, *i: mx.array) -> mx.array:
        return getattr(mx.sin(y).at[index.key(i)], op)(u)

    def meaning(y: mx.array, u: mx.array, *i: mx.array) -> mx.array:
        y, u = mx.sin(y), _spread(index, u, i)
        part = index.matrix(i) @ mx.reshape(y, (-1,))
        return _with(y, getattr(mx, op)(part, u), index, i)

    modes = index.modes()
    if index.sources:  # MLX has no jvp of such a scatter, and of a product no vjp
        lacking = ("jvp", "grad", "vjp") if op in ("multiply", "divide") else ("jvp",)
        modes = [m for m in modes if not any(d in m for d in lacking)]
    sources = (_away(index.shape), _away(index.updates()), *index.sources)
    check(fun, *sources, reference=meaning, modes=modes)


@pytest.mark.parametrize("seed", SEEDS)
def test_rows_by_a_mask(seed: int):
    rng = random.Random(seed)
    shape = tuple(rng.randint(2, 4) for _ in range(rng.randint(1, 3)))
    below = rng.randint(0, len(shape) - 1)
    masked, rows = shape[: len(shape) - below], shape[len(shape) - below :]
    many = rng.random() < 0.5

    def fun(y: mx.array, u: mx.array, mask: mx.array) -> mx.array:
        y = mx.sin(y)
        y[mask] = u
        return y

    def meaning(y: mx.array, u: mx.array, mask: mx.array) -> mx.array:
        where = mx.reshape(mask, (*masked, *(1,) * len(rows))).astype(mx.float32)
        if many:
            order = mx.cumsum(mx.reshape(mask, (-1,)).astype(mx.int32)) - 1
            places = mx.expand_dims(order, 1) == mx.arange(u.shape[0])
            u = mx.reshape(places.astype(mx.float32) @ mx.reshape(u, (u.shape[0], -1)), shape)
        return mx.sin(y) * (1 - where) + u * where

    count = mx.zeros(masked).size
    updates = (count, *rows) if many else rows
    sources = (_away(shape), _away(updates), lambda: mx.random.bernoulli(0.5, masked))
    check(fun, *sources, reference=meaning, modes=["vmap", "vmap(grad)", "vmap(vmap)"])


@pytest.mark.parametrize("seed", SEEDS)
def test_slices_that_begin_at_an_array(seed: int):
    rng = random.Random(seed)
    shape = tuple(rng.randint(2, 4) for _ in range(rng.randint(2, 4)))
    axes = rng.sample(range(len(shape)), rng.randint(1, 2))
    sizes = tuple(rng.randint(1, n) if i in axes else n for i, n in enumerate(shape))

    def start() -> mx.array:
        return mx.array([random.Random().randint(0, shape[a] - sizes[a]) for a in axes])

    def matrices(i: mx.array) -> list[mx.array]:
        firsts = {a: i[k] for k, a in enumerate(axes)}
        return [
            (mx.expand_dims(mx.arange(m) + firsts.get(a, 0), 1) == mx.arange(n)).astype(mx.float32)
            for a, (n, m) in enumerate(zip(shape, sizes))
        ]

    def along(x: mx.array, by: list[mx.array]) -> mx.array:
        for axis, matrix in enumerate(by):
            x = mx.moveaxis(mx.tensordot(matrix, x, ([1], [axis])), 0, axis)
        return x

    def replaced(y: mx.array, u: mx.array, i: mx.array) -> mx.array:
        back = [mx.transpose(m) for m in matrices(i)]
        return y * (1 - along(mx.ones(sizes), back)) + along(u, back)

    modes = ["vmap", *rng.sample([m for m in MODES if m not in ("call", "vmap")], 3)]
    check(
        lambda x, i: mx.slice(mx.sin(x), i, axes, sizes),
        _away(shape),
        start,
        reference=lambda x, i: along(mx.sin(x), matrices(i)),
        modes=modes,
    )
    check(
        lambda y, u, i: mx.slice_update(mx.sin(y), u, i, axes),
        _away(shape),
        _away(sizes),
        start,
        reference=lambda y, u, i: replaced(mx.sin(y), u, i),
        modes=modes,
    )


@pytest.mark.parametrize("order", ["jvp(grad)", "grad(jvp)"])
@pytest.mark.parametrize("seed", SEEDS)
def test_second_derivatives_of_one_sample(seed: int, order: str):
    """Hv of sum (P x)^3 is 6 P^T (P x * P v)."""
    index = Index(seed, arrays=False)
    x, v = _away(index.shape)(), _away(index.shape)()

    def loss(x: mx.array) -> mx.array:
        part = x[index.key(())]
        return mx.sum(part * part * part)

    if order == "jvp(grad)":
        got = jvp(grad(loss), [x], [v])[1][0]
    else:
        got = grad(lambda x: jvp(loss, [x], [v])[1][0])(x)
    matrix = index.matrix(())
    both = (matrix @ mx.reshape(x, (-1,))) * (matrix @ mx.reshape(v, (-1,)))
    want = mx.reshape(6 * mx.transpose(matrix) @ both, index.shape)
    assert mx.allclose(got, want, rtol=1e-4, atol=1e-5)


def _spread(index: Index, u: mx.array, arrays: tuple[mx.array, ...]) -> mx.array:
    return mx.reshape(mx.broadcast_to(u, index.chosen(arrays).shape), (-1,))


def _with(y: mx.array, u: mx.array, index: Index, arrays: tuple[mx.array, ...]) -> mx.array:
    """`y` with the flat updates in the places that the index chooses."""
    matrix = index.matrix(arrays)
    free = mx.reshape(1 - mx.sum(matrix, axis=0), index.shape)
    return y * free + mx.reshape(mx.transpose(matrix) @ u, index.shape)


@pytest.mark.skipif(MLX < (0, 32, 0), reason="MLX scatters, which has no such derivative")
@pytest.mark.parametrize("op", ["maximum", "minimum"])
@pytest.mark.parametrize("key", [(slice(None), ...), slice(-5, 9), (slice(None, None, 2), 0), 0])
def test_of_two_equals_one_sample_decides_who_has_the_cotangent(key: Any, op: str):
    """MLX gives it to the array where all is updated, else to both; beside a mapped array too."""

    def total(y: mx.array, z: mx.array) -> mx.array:
        return (getattr(y.at[key], op)(y[key]) * z).sum()

    y, zs = mx.random.normal((2, 1)), mx.random.normal((3, 2, 1))
    want = mx.stack([mx.grad(total)(y, z) for z in zs])
    assert mx.allclose(vmap(grad(total), (None, 0))(y, zs), want)
    assert mx.allclose(vmap(grad(total), (0, 0))(mx.stack([y] * 3), zs), want)
    assert mx.allclose(grad(lambda y: vmap(total, (None, 0))(y, zs).sum())(y), want.sum(0))


def _by_product(y: mx.array, u: mx.array, mask: mx.array) -> mx.array:
    """The n-th True takes the n-th update, as a matrix of zeros and ones."""
    order = mx.cumsum(mask.astype(mx.int32)) - 1
    chosen = (mx.expand_dims(order, 1) == mx.arange(len(u))) & mx.expand_dims(mask, 1)
    kept = mx.expand_dims(1 - mask.astype(y.dtype), 1)
    return mx.sin(y * kept + chosen.astype(u.dtype) @ u)


def test_second_derivatives_of_updates_at_a_mask():
    def assign(y: mx.array, u: mx.array, mask: mx.array) -> mx.array:
        y = y + 0
        y[mask] = u
        return mx.sin(y)

    arrays = (mx.random.normal((6, 2)), mx.random.normal((6, 2)))
    assert check(
        assign,
        *arrays,
        lambda: mx.random.bernoulli(0.5, (6,)),
        reference=_by_product,
        modes=["vmap(jvp(grad))"],
    )


@pytest.mark.parametrize(
    "read",
    [
        lambda x, i: x[0],
        lambda x, i: x[i],
        lambda x, i: x[mx.array([[0], [1]])],
        lambda x, i: mx.take(x, i, axis=0),
        lambda x, i: mx.take_along_axis(x, mx.reshape(i, (-1, 1)), axis=0),
        lambda x, i: mx.diagonal(x),
        lambda x, i: mx.diag(x),
        lambda x, i: mx.trace(x[None, :], axis1=0, axis2=1),
    ],
)
def test_an_index_of_an_array_without_entries_has_a_gradient(read: Any):
    """And what is gathered alike. MLX's process dies of a division by zero."""

    def total(x: mx.array, i: mx.array) -> mx.array:
        return mx.square(read(x, i)).sum()

    x, i = mx.zeros((2, 0)), mx.array([1, 0])
    assert grad(total)(x, i).shape == (2, 0)
    assert grad(lambda x: grad(total)(x, i).sum())(x).shape == (2, 0)
    assert vmap(grad(total), (None, 0))(x, i).shape == (2, 2, 0)
    assert vmap(grad(total), (0, None))(mx.zeros((3, 2, 0)), i).shape == (3, 2, 0)
    assert grad(lambda x: vmap(total, (None, 0))(x, i).sum())(x).shape == (2, 0)
    assert jvp(grad(lambda x: total(x, i)), [x], [x])[1][0].shape == (2, 0)
    assert grad(lambda x: vmap(total, (0, None))(x, i).sum())(mx.zeros((3, 2, 0))).shape == (
        3,
        2,
        0,
    )


def test_what_is_multiplied_at_indices_that_come_twice_may_be_zero():
    """The derivative is the product's, of the updates too; a second one of them is refused."""
    x, u, i = (
        mx.array([2.0, 3.0, 5.0]),
        mx.array([0.0, 7.0, 0.0, 0.0, 2.0]),
        mx.array([0, 0, 1, 1, 2]),
    )

    def total(x: mx.array, u: mx.array) -> mx.array:
        return mx.square(1 + x.at[i].multiply(u)).sum()

    of_x, of_u = grad(total, argnums=(0, 1))(x, u)
    assert mx.array_equal(of_x, mx.array([0.0, 0.0, 2 * 11 * 2]))
    assert mx.array_equal(of_u, mx.array([2.0 * 2 * 7, 0, 0, 0, 2 * 11 * 5]))
    assert mx.array_equal(
        jvp(lambda u: x.at[i].multiply(u), (u,), (mx.ones(5),))[1], mx.array([14.0, 0.0, 5.0])
    )
    second = jvp(grad(lambda x: total(x, u)), (x,), (mx.ones(3),))[1]
    assert mx.array_equal(second, mx.array([0.0, 0.0, 8.0]))
    with pytest.raises(NotImplementedError, match=r"\[at.multiply\] .* second order"):
        grad(lambda u: grad(lambda u: total(x, u))(u).sum())(u)
