"""What is made of the parts that a run wrote down: gradients, their norms, weighted sums.

For samples b with rows t, and parts (x, c) or (ids, c) of one parameter W:

    gradient of b       sum_t c[b,t] x[b,t]^T                                 a product per sample
    its squared norm    sum_ts (x[b,t] . x[b,s]) (c[b,t] . c[b,s])            without the gradient
    weighted sum        sum_bt w[b] c[b,t] x[b,t]^T                           one product for all

The second line (Goodfellow 2015 for one row; Li et al. 2022, "Large language models can be strong
differentially private learners", for several) needs rows^2 numbers where the gradient has
inputs * outputs; whichever takes fewer multiplications is taken, a few samples at a time. Parts of
one parameter (a layer called several times, tied weights) are rows of one sum, so the cross terms
are in it. The third line uses the parts again: one backward pass gives both norms and weighted sum
(book-keeping: Bu et al. 2023, "Differentially private optimization on large model at small cost").
Gradients that the tape kept, because their parts are larger, are read for both, and no product is
left to do (the same paper's mixed optimization).

What is kept is in memory until the weights are known, as much as the forward pass held or less.
What norms and sums hold besides is little, because they take turns (`_Turns`): left to itself, MLX
would begin with what is deepest in the graph, which is every layer's products.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx

from ..core.tracers import in_trace
from ..rules import _devices
from ..rules._dtypes import HALVES
from ..transforms import _chunks
from ._nodes import product_gradient
from ._tape import Pair, Parameter, on_gpu

#: What norms and weighted sums may hold at a time: this share of what is kept, or these bytes. (A
#: GPU is given several turns ahead, and none of their memory is free before it has done them.)
HELD_SHARE, HELD = 1 / 32, 32 * 2**20

#: The backward pass is given to a GPU in so many shares, of which so many may be waiting there.
SHARES, AHEAD = 24, 6

#: Gradients of at most so many entries are put together.
SMALL = 2**14


class Run:
    """The losses of some samples, and the parts of the gradients of their parameters."""

    def __init__(self, results: Any, parameters: list[Parameter], size: int) -> None:
        self.results, self.parameters, self.size = results, parameters, size
        #: Shares of the parts that nobody has asked for yet; what tells that one is there.
        self._left: Iterator[list[mx.array]] = iter(())
        self._begun: list[mx.array] = []

    def gradients(self) -> list[mx.array]:
        """For each parameter, those of all samples: (samples, *shape)."""
        if not self.size:
            return [mx.zeros((0, *p.value.shape), p.value.dtype) for p in self.parameters]
        return [gradient(p, slice(0, self.size)) for p in self.parameters]

    def squared_norms(self, each: bool) -> list[mx.array]:
        """Of each sample, (samples,), float32: for each parameter, or one for the whole."""
        if not self.size:
            return [mx.zeros((0,))] * (len(self.parameters) if each else 1)
        turns = self._turns()
        small, large = ([], self.parameters) if each else _by_size(self.parameters)
        found = [_squares(p, self.size, turns) for p in large]
        if small:
            found.append(_sums_of_squares(_in_a_row([p.direct for p in small])))
        return [_summed([squares]) for squares in found] if each else [_summed(found)]

    def weighted_sums(self, weights: list[mx.array]) -> list[mx.array]:
        """For each parameter, the sum over samples, each times its weight; `weights` are
        (samples,), one for each parameter."""
        if not self.size:
            return [mx.zeros_like(p.value) for p in self.parameters]
        turns = self._turns()
        halves = {i: _Halves(w) for i, w in {id(w): w for w in weights}.items()}
        small, large = _by_size(self.parameters) if len(halves) == 1 else ([], self.parameters)
        weight_of = dict(zip(map(id, self.parameters), weights))
        found: dict[int, mx.array] = {}
        if small:
            sums = mx.sum(_weigh(_in_a_row([p.direct for p in small]), weights[0]), axis=0)
            ends = list(itertools.accumulate(p.value.size for p in small))
            for p, one in zip(small, mx.split(sums, ends[:-1])):
                found[id(p)] = mx.reshape(one, p.value.shape)
        for p in large:
            w = weight_of[id(p)]
            work = functools.partial(weighted_sum, weights=w, halves=halves[id(w)])
            found[id(p)] = turns.take(_bytes_weighed(p), p, work)
        return [found[id(p)] for p in self.parameters]

    def start(self) -> None:
        """Have the parts computed, the first of them, while Python builds what is made of all."""
        if in_trace():
            return
        _chunks.wait()  # their memory is the next chunk's
        mx.async_eval(self.results)
        self._left = self._shares()
        for parts in itertools.islice(self._left, AHEAD):
            self._begin(parts)

    def finish_starting(self) -> None:
        """Have the rest of them computed.

        A GPU's queue holds what its graphs read: all of the backward pass, as far as it goes. So a
        share waits until one before it is done.
        """
        for parts in self._left:
            self._begun.pop(0).item()
            self._begin(parts)

    def _begin(self, parts: list[mx.array]) -> None:
        mark = mx.zeros(())  # is there when the parts are
        mx.async_eval(mark, parts)
        self._begun.append(mark)

    def _shares(self) -> Iterator[list[mx.array]]:
        """The parts, those of the last layers first."""
        parts = [
            [x for pair in p.pairs for x in pair] + [x for x in (p.direct, p.kept) if x is not None]
            for p in reversed(self.parameters)
        ]
        share = sum(x.nbytes for some in parts for x in some) // SHARES
        taken: list[mx.array] = []
        nbytes = 0
        for some in parts:
            taken += some
            nbytes += sum(x.nbytes for x in some)
            if nbytes > share:
                yield taken
                taken, nbytes = [], 0
        yield taken

    def _turns(self) -> _Turns:
        held = sum(part.nbytes for p in self.parameters for pair in p.pairs for part in pair)
        held += sum(p.kept.nbytes for p in self.parameters if p.kept is not None)
        return _Turns(max(HELD, int(HELD_SHARE * held)))


class _Turns:
    """Work that holds `most` bytes together; what comes next waits until it is done."""

    def __init__(self, most: int) -> None:
        self.most, self.bytes = most, 0
        self.now: list[mx.array] = []
        self.before: list[mx.array] = []

    def take(
        self, nbytes: int, parameter: Parameter, work: Callable[[Parameter], mx.array]
    ) -> mx.array:
        """`work(parameter)`, which holds so many bytes while it runs and returns few."""
        if not nbytes:
            return work(parameter)
        if self.now and self.bytes + nbytes > self.most:
            self.before, self.now, self.bytes = self.now, [], 0
        self.bytes += nbytes
        done = work(parameter.waiting(self.before) if self.before else parameter)
        self.now.append(done)
        return done


def _by_size(parameters: list[Parameter]) -> tuple[list[Parameter], list[Parameter]]:
    """(small, others): the first take less time together, in a row, than each by itself."""
    some = [p for p in parameters if p.direct is not None and not p.pairs and p.kept is None]
    small = [p for p in some if p.value.size <= SMALL and p.value.dtype == some[0].value.dtype]
    chosen = set(map(id, small)) if len(small) > 1 else set()
    return (
        [p for p in small if id(p) in chosen],
        [p for p in parameters if id(p) not in chosen],
    )


def _in_a_row(arrays: list[Any]) -> mx.array:
    """(samples, ...) each -> (samples, all)."""
    return mx.concatenate([mx.reshape(x, (len(x), -1)) for x in arrays], axis=1)


# Gradients -------------------------------------------------------------------------------------


def gradient(parameter: Parameter, samples: slice) -> mx.array:
    """(samples, *shape), in the parameter's dtype."""
    value = parameter.value
    size = samples.stop - samples.start
    total: mx.array | None = None
    for made in (parameter.direct, parameter.kept):
        if made is not None:
            made = _part(made, samples, parameter)
            total = made if total is None else total + made
    for x, c in parameter.products:
        x, c = _part(x, samples, parameter), _part(c, samples, parameter)
        part = product_gradient(x, c, value.dtype)
        total = part if total is None else total + part
    for ids, c in parameter.lookups:
        if total is None:
            total = mx.zeros((size, *value.shape), value.dtype)
        ids, c = _part(ids, samples, parameter), _part(c, samples, parameter)
        total = total.at[mx.arange(size)[:, None], ids].add(c.astype(value.dtype))
    return mx.zeros((size, *value.shape), value.dtype) if total is None else total


def _part(x: mx.array, samples: slice, parameter: Parameter) -> mx.array:
    whole = samples.start == 0 and samples.stop == parameter.size
    return x if whole else x[samples]


# Norms -----------------------------------------------------------------------------------------


def _squares(parameter: Parameter, size: int, turns: _Turns) -> mx.array:
    """Of each sample: (samples, ...), to be summed."""
    if not parameter.products and not parameter.lookups:
        if parameter.direct is None and parameter.kept is None:
            return mx.zeros((size,))
        value, everything = parameter.value, slice(0, size)
        if _row(value.dtype, value.size):
            return _sums_of_squares(gradient(parameter, everything))
        nbytes = 4 * size * value.size
        return turns.take(nbytes, parameter, lambda p: _sums_of_squares(gradient(p, everything)))
    if parameter.direct is None and parameter.kept is None and _prefers_rows(parameter):
        return turns.take(_bytes_by_rows(parameter), parameter, _by_rows)
    each = parameter.value.nbytes
    step = max(1, turns.most // max(1, each))
    found = []
    for i in range(0, size, step):
        samples = slice(i, min(i + step, size))

        def of_gradients(parameter: Parameter, samples: slice = samples) -> mx.array:
            return _sums_of_squares(gradient(parameter, samples))

        found.append(turns.take(each * (samples.stop - i), parameter, of_gradients))
    return mx.concatenate(found) if len(found) > 1 else found[0]


def _bytes_by_rows(parameter: Parameter) -> int:
    rows = sum(c.shape[1] for _, c in parameter.pairs)
    half = parameter.value.dtype in HALVES
    cast = sum(2 * part.nbytes for pair in parameter.products for part in pair) if half else 0
    return 2 * 4 * parameter.size * rows**2 + cast


def _prefers_rows(parameter: Parameter) -> bool:
    """Whether the sum over pairs of rows takes less work than the gradient."""
    outputs, inputs = parameter.value.shape[0], parameter.value.size // parameter.value.shape[0]
    products = sum(x.shape[1] for x, _ in parameter.products)
    lookups = sum(ids.shape[1] for ids, _ in parameter.lookups)
    # In half precision the products of rows are computed in float32, at half the speed.
    half = 2 if parameter.value.dtype in HALVES else 1
    pairs = half * (
        products**2 * (inputs + outputs) + lookups**2 * inputs + 2 * products * lookups * inputs
    )
    # Each entry is written and read some times besides.
    return pairs <= (products + 8) * inputs * outputs


def _by_rows(parameter: Parameter) -> mx.array:
    x, c = _joined(parameter.products)
    ids, e = _joined(parameter.lookups)
    found: mx.array | None = None
    if x is not None and c is not None:
        found = _dot(_gram(x, x), _gram(c, c))
    if ids is not None and e is not None:
        same = ids[:, :, None] == ids[:, None, :]
        term = mx.sum(mx.where(same, _gram(e, e), mx.array(0.0)), axis=(1, 2))
        found = term if found is None else found + term
        if x is not None and c is not None:
            # <c^T x, sum_t onehot(ids[t]) e[t]^T> = sum_st c[s, ids[t]] (x[s] . e[t])
            chosen = mx.take_along_axis(c, ids[:, None, :].astype(mx.int32), axis=2)
            found = found + 2 * _dot(chosen.astype(mx.float32), _gram(x, e))
    assert found is not None
    return mx.maximum(found, mx.array(0.0))  # rounding can take a sum that is zero below it


def _joined(pairs: list[Pair]) -> tuple[mx.array, mx.array] | tuple[None, None]:
    """Several calls as one, with the rows of all."""
    if len(pairs) < 2:
        return pairs[0] if pairs else (None, None)
    first, second = zip(*pairs)
    return mx.concatenate(list(first), axis=1), mx.concatenate(list(second), axis=1)


def _gram(x: mx.array, y: mx.array) -> mx.array:
    return mx.matmul(x.astype(mx.float32), mx.swapaxes(y.astype(mx.float32), 1, 2))


@on_gpu
def _squared(x: mx.array) -> mx.array:
    return mx.square(x.astype(mx.float32))


def _sums_of_squares(x: mx.array) -> mx.array:
    """(samples, ...) -> (samples, some), of squares that are still to be summed.

    Squares would be written out before they are summed, in float32, and a CPU adds them up one by
    one. A product of a row with itself does neither. It accumulates in float32; of bfloat16 the sum
    of each row is rounded, which is why there are many.
    """
    samples, size = len(x), x.size // len(x)
    row = _row(x.dtype, size)
    if not row:
        return mx.sum(mx.reshape(_squared(x), (samples, -1)), axis=1, keepdims=True)
    rows = mx.reshape(x, (samples, size // row, 1, row))
    return mx.reshape(mx.matmul(rows, mx.swapaxes(rows, 2, 3)), (samples, -1))


def _row(dtype: mx.Dtype, size: int) -> int:
    """How many squares one product adds up; 0 where they are written out."""
    if not _devices.gpu():
        return size // 128 if dtype == mx.float32 and size % 1024 == 0 else 0
    if dtype not in (mx.bfloat16, mx.float32):
        return 0
    # One warp reads a row (mlx/backend/cuda/gemms/gemv.cu).
    return next((row for row in (4096, 2048, 1024) if size % row == 0 and size >= 64 * row), 0)


def _summed(squares: list[mx.array]) -> mx.array:
    """What `_sums_of_squares` has found of several arrays: (samples,), float32."""
    of_dtype: dict[mx.Dtype, list[mx.array]] = {}
    for s in squares:
        of_dtype.setdefault(s.dtype, []).append(s if s.ndim > 1 else s[:, None])
    sums = [
        mx.sum((mx.concatenate(some, axis=1) if len(some) > 1 else some[0]).astype(mx.float32), 1)
        for some in of_dtype.values()
    ]
    return functools.reduce(mx.add, sums)


def _dot(x: mx.array, y: mx.array) -> mx.array:
    return mx.sum(x * y, axis=(1, 2))


# Weighted sums ---------------------------------------------------------------------------------


def weighted_sum(parameter: Parameter, weights: mx.array, halves: _Halves) -> mx.array:
    """(*shape), in the parameter's dtype."""
    value = parameter.value
    total: mx.array | None = None
    if parameter.direct is not None:
        total = mx.sum(_weigh(parameter.direct, weights), axis=0)
    if parameter.kept is not None:
        part = _sum_of_kept(parameter.kept, weights, halves)
        total = part if total is None else total + part
    for x, c in parameter.products:
        x = x.astype(c.dtype)
        if x.shape[-1] <= c.shape[-1]:
            x = _weigh(x, weights)
        else:
            c = _weigh(c, weights)
        flat, rows = _flat(c), _flat(x)
        part = mx.matmul(mx.swapaxes(flat, 0, 1), rows).astype(value.dtype)
        total = part if total is None else total + part
    for ids, c in parameter.lookups:
        if total is None:
            total = mx.zeros_like(value)
        c = _weigh(c, weights).astype(value.dtype)
        total = total.at[mx.reshape(ids, (-1,))].add(_flat(c))
    return mx.zeros_like(value) if total is None else total


class _Halves:
    """(2, samples): weights without their last bits, and those bits. A product of bfloat16, or of
    float32 on a GPU, takes few bits, and a factor rounded up would clip to more than the bound."""

    def __init__(self, weights: mx.array) -> None:
        first = weights.astype(mx.bfloat16).astype(mx.float32)
        self._of = {mx.float32: mx.stack([first, weights - first])}

    def of(self, dtype: mx.Dtype) -> mx.array:
        if dtype not in self._of:
            self._of[dtype] = self._of[mx.float32].astype(dtype)
        return self._of[dtype]


def _sum_of_kept(gradients: mx.array, weights: mx.array, halves: _Halves) -> mx.array:
    if gradients.dtype == mx.float16:  # has no range for small weights
        return mx.sum(_weigh(gradients, weights), axis=0)
    rows = mx.reshape(gradients, (gradients.shape[0], -1))
    sums = mx.sum(mx.matmul(halves.of(rows.dtype), rows), axis=0)
    return mx.reshape(sums, gradients.shape[1:])


def _bytes_weighed(parameter: Parameter) -> int:
    return sum(min(x.nbytes, c.nbytes) for x, c in parameter.products) + sum(
        c.nbytes for _, c in parameter.lookups
    )


@on_gpu
def _times(x: mx.array, w: mx.array) -> mx.array:
    return (x.astype(mx.float32) * w).astype(x.dtype)


def _weigh(x: mx.array, weights: mx.array) -> mx.array:
    return _times(x, mx.reshape(weights, (-1, *(1 for _ in x.shape[1:]))))


def _flat(x: mx.array) -> mx.array:
    return mx.reshape(x, (-1, x.shape[-1]))
