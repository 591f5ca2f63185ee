"""The conformance suite: any operation, under every transform, against a loop over samples.

    from mlxshim.testing import check
    check(lambda x, w: mx.fast.rms_norm(x, w, 1e-5), mx.random.normal((3, 8)), mx.ones(8))

The oracle of every case is the same function called sample by sample, with MLX's own derivatives
of one sample where a derivative is asked for. A case whose oracle raises is no case: what one
sample does not have, a batch does not have either.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import mlx.core as mx

import mlxshim
from mlxshim.core import native
from mlxshim.core.versions import SELECT_JVP_BUG
from mlxshim.extend import Operation
from mlxshim.rules._dtypes import HALVES

Fun = Callable[..., Any]

#: What is asked of an operation, in the order in which it is asked.
MODES = (
    "call",
    "vmap",
    "vmap(vmap)",
    "vmap(grad)",
    "grad(vmap)",
    "vmap(vjp)",
    "vmap(jvp)",
    "jvp(vmap)",
    "vmap(jvp(grad))",
    "compile(vmap)",
    "vmap(compile)",
)

#: Relative to the largest value of the result; in float32 a second derivative may lose more.
TOLERANCE = {mx.float32: 2e-4, mx.float16: 2e-2, mx.bfloat16: 6e-2}


class Result(NamedTuple):
    """One case: which mode, which arguments mapped where, what went wrong (None: nothing)."""

    mode: str
    where: str
    error: str | None
    wrong: bool = False  # a number that differs, as against an exception


class Nonconforming(AssertionError):
    """At least one case differs from the loop."""


def check(
    fun: Fun,
    *arrays: Any,
    modes: Sequence[str] = MODES,
    dtypes: Sequence[mx.Dtype] = (mx.float32,),
    tolerance: float | None = None,
    reference: Fun | None = None,
) -> int:
    """Put `fun` through the conformance suite; the number of cases that were compared.

    Args:
        fun: A function of arrays that returns an array or a list of arrays.
        arrays: One sample of each argument: an array, whose entries are shuffled to make further
            samples, or a function without arguments that draws a sample.
        modes: Some of `MODES`.
        dtypes: The floating arguments are cast to each of these in turn.
        tolerance: Allowed error relative to the largest value of the result; `TOLERANCE`
            of the dtype by default.
        reference: What `fun` means, for the oracle: `fun` itself by default, the decomposition
            of an operation made by `mlxshim.primitive`.

    Raises:
        Nonconforming: with one line for each case that raised or differs.
        ValueError: when the oracle raises in every case, so that nothing was compared.

    Example:
        >>> import mlx.core as mx
        >>> from mlxshim.testing import check
        >>> check(mx.sin, mx.array([0.1, 0.2, 0.3]), modes=["vmap", "vmap(grad)"])
        4
    """
    results = list(
        conformance(
            fun, *arrays, modes=modes, dtypes=dtypes, tolerance=tolerance, reference=reference
        )
    )
    if not results:
        raise ValueError("[check] The loop itself raises in every case: nothing was compared.")
    failed = [r for r in results if r.error is not None]
    if failed:
        lines = "\n".join(f"  {r.mode} {r.where}: {r.error}" for r in failed)
        raise Nonconforming(f"{len(failed)} of {len(results)} cases fail:\n{lines}")
    return len(results)


def conformance(
    fun: Fun,
    *arrays: Any,
    modes: Sequence[str] = MODES,
    dtypes: Sequence[mx.Dtype] = (mx.float32,),
    tolerance: float | None = None,
    reference: Fun | None = None,
    transforms: ModuleType = mlxshim,
    skip: Collection[int] = (),
    blind: Collection[int] = (),
    announce: Callable[[str], None] = lambda stage: None,
) -> Iterator[Result]:
    """Every case of the suite with its outcome; `transforms` is `mlxshim` or `mlx.core`.

    A runner that outlives a crash needs the last three: `announce` hears of every case before its
    oracle ("loop 7") and before the transform itself ("case 7 vmap in_axes=…"), the cases
    numbered in `skip` are left out, and those in `blind`, whose oracle crashes, are only run.
    """
    if reference is None:
        reference = fun.decomposition if isinstance(fun, Operation) else fun
    number = itertools.count()
    for dtype in dtypes:
        samples = _Samples(arrays, dtype)
        tol = TOLERANCE.get(dtype, 2e-4) if tolerance is None else tolerance
        for mode in modes:
            for where, ours, oracle in _cases(mode, fun, reference, samples, transforms):
                n = next(number)
                if n in skip:
                    continue
                want: list[mx.array] | Exception = []
                if n not in blind:
                    announce(f"loop {n}")
                    want = _outcome(oracle)
                    if isinstance(want, Exception) or not want:
                        continue  # what one sample does not have
                    if SELECT_JVP_BUG and "jvp" in mode and any(w.dtype == mx.bool_ for w in want):
                        want = []  # MLX's tangent of a selection is no tangent there: no oracle
                where = f"{where} {str(dtype).split('.')[-1]}"
                announce(f"case {n} {mode} {where}")
                got = _outcome(ours)
                if isinstance(got, Exception):
                    said = f"{type(got).__name__}: {(str(got).splitlines() or [''])[0][:200]}"
                    yield Result(mode, where, said)
                    continue
                if not want:
                    yield Result(mode, where, None)
                    continue
                second = mode == "vmap(jvp(grad))" and dtype == mx.float32
                error = _difference(got, want, tol * (5 if second else 1))
                yield Result(mode, where, error, error is not None)


def _outcome(thunk: Callable[[], Any]) -> list[mx.array] | Exception:
    try:
        out = _flat(thunk())
        mx.eval(out)
        return out
    except Exception as e:
        return e


class _Samples:
    """`SIZE * SIZE` samples of every argument, and stacks of them."""

    SIZE = 3

    def __init__(self, arrays: Sequence[Any], dtype: mx.Dtype) -> None:
        self.dtype = dtype
        self.drawn = [[self._draw(x) for _ in range(self.SIZE**2)] for x in arrays]
        self.floating = [
            i for i, s in enumerate(self.drawn) if mx.issubdtype(s[0].dtype, mx.floating)
        ]

    def _draw(self, source: Any) -> mx.array:
        if isinstance(source, mx.array):
            order = mx.random.permutation(source.size)
            x = mx.reshape(mx.take(mx.reshape(source, (-1,)), order), source.shape)
        else:
            x = source()
        return x.astype(self.dtype) if x.dtype == mx.float32 else x

    def one(self) -> list[mx.array]:
        return [s[0] for s in self.drawn]

    def stacked(self, mapped: Sequence[int | None]) -> list[mx.array]:
        return [
            s[0] if axis is None else mx.stack(s[: self.SIZE], axis=axis)
            for s, axis in zip(self.drawn, mapped)
        ]

    def places(self) -> Iterator[tuple[int | None, ...]]:
        """Every subset of the arguments, each on the first, the last and an inner axis."""
        ndims = [s[0].ndim for s in self.drawn]
        seen: set[tuple[int | None, ...]] = set()
        for flags in itertools.product((True, False), repeat=len(ndims)):
            if not any(flags):
                continue
            for kind in range(3):
                place = tuple(
                    (0, n, (1 + i) % (n + 1))[kind] if flag else None
                    for i, (flag, n) in enumerate(zip(flags, ndims))
                )
                if place not in seen:
                    seen.add(place)
                    yield place

    def nested(self) -> Iterator[tuple[tuple[int | None, ...], tuple[int | None, ...]]]:
        """(outer, inner) axes: all twice, and every way to map each argument at one level only."""
        count = len(self.drawn)
        yield (0,) * count, (0,) * count
        for flags in itertools.product((True, False), repeat=count):
            if any(flags) and not all(flags):
                outer = tuple(0 if flag else None for flag in flags)
                inner = tuple(None if flag else 0 for flag in flags)
                yield outer, inner
                yield (0,) * count, inner


Case = tuple[str, Callable[[], Any], Callable[[], Any]]


def _cases(mode: str, fun: Fun, reference: Fun, samples: _Samples, t: Any) -> Iterator[Case]:
    def flat(*xs: mx.array) -> list[mx.array]:
        return _flat(fun(*xs))

    def meaning(*xs: mx.array) -> list[mx.array]:
        return _flat(reference(*xs))

    if mode == "call":
        if fun is not reference:
            one = samples.one()
            yield "of one sample", lambda: flat(*one), lambda: meaning(*one)
        return
    if mode == "vmap(vmap)":
        for outer, inner in samples.nested():
            arrays = _twice(samples, outer, inner)
            yield (
                f"in_axes={outer}, {inner}",
                lambda a=arrays, o=outer, i=inner: t.vmap(t.vmap(flat, in_axes=i), in_axes=o)(*a),
                lambda a=arrays, o=outer, i=inner: loop(loop(meaning, i), o)(*a),
            )
        return

    floating = samples.floating
    if mode not in ("vmap", "compile(vmap)", "vmap(compile)") and not floating:
        return
    for place in samples.places():
        arrays = samples.stacked(place)
        where = f"in_axes={place}"
        if mode == "vmap":
            yield (
                where,
                lambda a=arrays, p=place: t.vmap(flat, in_axes=p)(*a),
                _loop(meaning, place, arrays),
            )
        elif mode == "compile(vmap)":
            if place == tuple(0 if p is not None else None for p in place):
                mapped = mx.compile(t.vmap(flat, in_axes=place))
                yield where, lambda a=arrays, m=mapped: m(*a), _loop(meaning, place, arrays)
        elif mode == "vmap(compile)":
            if place == tuple(0 if p is not None else None for p in place):
                compiled = mx.compile(flat)
                yield (
                    where,
                    lambda a=arrays, c=compiled, p=place: t.vmap(c, in_axes=p)(*a),
                    _loop(meaning, place, arrays),
                )
        else:
            yield from _derivatives(mode, flat, meaning, samples, place, arrays, where, t)


def _loop(fun: Fun, place: Any, arrays: list[mx.array]) -> Callable[[], Any]:
    return lambda: loop(fun, place)(*arrays)


def _derivatives(
    mode: str,
    flat: Fun,
    meaning: Fun,
    samples: _Samples,
    place: tuple[int | None, ...],
    arrays: list[mx.array],
    where: str,
    t: Any,
) -> Iterator[Case]:
    one = _outcome(lambda: meaning(*samples.one()))
    if isinstance(one, Exception):
        return  # what one sample does not have
    weights = _weights(one)
    floating = samples.floating

    def loss(*xs: mx.array) -> mx.array:
        return _weighted(flat(*xs), weights)

    def true_loss(*xs: mx.array) -> mx.array:
        return _weighted(meaning(*xs), weights)

    if mode == "vmap(grad)":
        for n in floating:
            yield (
                f"argnum {n} {where}",
                lambda n=n: t.vmap(t.grad(loss, argnums=n), in_axes=place)(*arrays),
                lambda n=n: loop(native.grad(true_loss, argnums=n), place)(*arrays),
            )
        return
    if mode == "grad(vmap)":
        for n in floating:
            yield (
                f"argnum {n} {where}",
                lambda n=n: t.grad(
                    lambda *xs: mx.sum(t.vmap(loss, in_axes=place)(*xs).astype(mx.float32)),
                    argnums=n,
                )(*arrays),
                lambda n=n: _gathered(
                    loop(native.grad(true_loss, argnums=n), place)(*arrays), place[n]
                ),
            )
        return
    if mode == "vmap(vjp)":
        # On other axes than the first too: rules move them, and vjp rules meet them anywhere.
        shift = sum(axis for axis in place if axis is not None)
        own = tuple(shift % (y.ndim + 1) for y in one)
        shapes = [(*y.shape[:a], samples.SIZE, *y.shape[a:]) for y, a in zip(one, own)]
        cotangents = [
            mx.random.normal(shape).astype(y.dtype)
            if mx.issubdtype(y.dtype, mx.floating)
            else mx.zeros(shape, y.dtype)
            for y, shape in zip(one, shapes)
        ]
        axes = place + own

        def pullback(transforms: Any, of: Fun) -> Fun:
            def pull(*xs: mx.array) -> Any:
                xs, cts = xs[: len(place)], list(xs[len(place) :])

                def of_floating(*active: mx.array) -> Any:
                    return of(*_with(xs, floating, active))

                return transforms.vjp(of_floating, [xs[i] for i in floating], cts)[1]

            return pull

        yield (
            where,
            lambda: t.vmap(pullback(t, flat), in_axes=axes)(*arrays, *cotangents),
            lambda: loop(pullback(mx, meaning), axes)(*arrays, *cotangents),
        )
        return

    tangents = [mx.random.normal(arrays[i].shape).astype(arrays[i].dtype) for i in floating]
    axes = place + tuple(place[i] for i in floating)

    def pushed(transforms: Any, of: Fun) -> Fun:
        def push(*xs: mx.array) -> Any:
            xs, tans = xs[: len(place)], list(xs[len(place) :])

            def of_floating(*active: mx.array) -> Any:
                return of(*_with(xs, floating, active))

            return transforms.jvp(of_floating, [xs[i] for i in floating], tans)[1]

        return push

    if mode == "vmap(jvp)":
        yield (
            where,
            lambda: t.vmap(pushed(t, flat), in_axes=axes)(*arrays, *tangents),
            lambda: loop(pushed(mx, meaning), axes)(*arrays, *tangents),
        )
    elif mode == "jvp(vmap)":
        yield (
            where,
            lambda: pushed(t, t.vmap(flat, in_axes=place))(*arrays, *tangents),
            lambda: loop(pushed(mx, meaning), axes)(*arrays, *tangents),
        )
    elif mode == "vmap(jvp(grad))":
        # One argument after the other: MLX's tape of several is the product of their tapes.
        for n in floating:
            axes_n = (*place, place[n])
            tangent = tangents[floating.index(n)]

            def hvp(transforms: Any, of: Fun, n: int = n) -> Fun:
                def product(*xs: mx.array) -> Any:
                    xs, tangent = xs[:-1], xs[-1]

                    def gradient(x: mx.array) -> Any:
                        return transforms.grad(of, argnums=n)(*_with(xs, [n], [x]))

                    return transforms.jvp(gradient, [xs[n]], [tangent])[1]

                return product

            yield (
                f"argnum {n} {where}",
                lambda h=hvp, a=axes_n, v=tangent: t.vmap(h(t, loss), in_axes=a)(*arrays, v),
                lambda h=hvp, a=axes_n, v=tangent: loop(h(mx, true_loss), a)(*arrays, v),
            )


def loop(fun: Fun, in_axes: Sequence[int | None]) -> Fun:
    """What `vmap(fun, in_axes)` means: one call for each sample, and the results stacked.

    Example:
        >>> import mlx.core as mx
        >>> from mlxshim.testing import loop
        >>> loop(lambda x, y: x * y, (0, None))(mx.array([1.0, 2.0]), mx.array(3.0))
        array([3, 6], dtype=float32)
    """

    def looped(*args: mx.array) -> Any:
        size = next(x.shape[a] for x, a in zip(args, in_axes) if a is not None)
        results = [
            fun(*(x if a is None else _at(x, i, a) for x, a in zip(args, in_axes)))
            for i in range(size)
        ]
        if isinstance(results[0], mx.array):
            return mx.stack(results)
        return [mx.stack(list(column)) for column in zip(*results)]

    return looped


def _at(x: mx.array, i: int, axis: int) -> mx.array:
    return x[(slice(None),) * (axis % x.ndim) + (i,)]  # mx.take refuses empty arrays


def _twice(samples: _Samples, outer: Any, inner: Any) -> list[mx.array]:
    size = samples.SIZE
    stacks: list[mx.array] = []
    for drawn, o, i in zip(samples.drawn, outer, inner):
        if o is None and i is None:
            stacks.append(drawn[0])
        elif o is None or i is None:
            stacks.append(mx.stack(drawn[:size]))
        else:
            stacks.append(
                mx.stack([mx.stack(drawn[r * size : (r + 1) * size]) for r in range(size)])
            )
    return stacks


def _flat(out: Any) -> list[mx.array]:
    if isinstance(out, mx.array):
        return [out]
    return [x for y in out for x in _flat(y)] if out is not None else []


def _with(xs: Sequence[mx.array], where: Sequence[int], values: Sequence[mx.array]) -> list[Any]:
    full = list(xs)
    for i, x in zip(where, values):
        full[i] = x
    return full


def _weights(outputs: list[mx.array]) -> list[mx.array | None]:
    return [
        mx.random.normal(y.shape).astype(y.dtype) if mx.issubdtype(y.dtype, mx.floating) else None
        for y in outputs
    ]


def _weighted(outputs: list[mx.array], weights: list[mx.array | None]) -> mx.array:
    terms = [mx.sum(y * w) for y, w in zip(outputs, weights) if w is not None]
    return sum(terms[1:], terms[0])


def _gathered(grads: mx.array, axis: int | None) -> mx.array:
    """The gradient of a sum over samples: one sample's each, or their sum where it is shared."""
    if axis is not None:
        return mx.moveaxis(grads, 0, axis)
    wide = mx.float32 if grads.dtype in HALVES else grads.dtype  # a sum that adds no error
    return mx.sum(grads.astype(wide), axis=0).astype(grads.dtype)


def _difference(got: list[mx.array], want: list[mx.array], tol: float) -> str | None:
    if len(got) != len(want):
        return f"{len(got)} outputs, the loop has {len(want)}"
    for i, (g, w) in enumerate(zip(got, want)):
        if g.shape != w.shape:
            return f"output {i} has shape {g.shape}, the loop's {w.shape}"
        if g.dtype != w.dtype:
            return f"output {i} is {g.dtype}, the loop's {w.dtype}"
        if w.size == 0:
            continue
        if not mx.issubdtype(w.dtype, mx.inexact):
            if not mx.array_equal(g, w).item():
                return f"output {i} differs"
            continue
        if w.dtype != mx.complex64:
            g, w = g.astype(mx.float32), w.astype(mx.float32)
        # Infinities and NaNs must be where the loop has them.
        odd = mx.logical_not(mx.isfinite(w))
        same = mx.logical_or(g == w, mx.logical_and(mx.isnan(g), mx.isnan(w)))
        if not mx.all(mx.where(odd, same, mx.isfinite(g))).item():
            return f"output {i} is not finite where the loop's is, or otherwise"
        zero = mx.zeros_like(w)
        error = float(mx.max(mx.abs(mx.where(odd, zero, g - w))).item())  # pyright: ignore
        scale = float(mx.max(mx.abs(mx.where(odd, zero, w))).item())  # pyright: ignore
        if error > tol * max(scale, 1.0):
            return f"output {i} differs by {error:.3g} where the values reach {scale:.3g}"
    return None
