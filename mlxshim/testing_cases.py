"""The cases of the conformance suite: samples, what is asked of an operation, and the loop."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import mlx.core as mx

from mlxshim.core import native
from mlxshim.core.versions import LATE_WRITES_BUG
from mlxshim.rules._dtypes import HALVES

Fun = Callable[..., Any]
Cast = Callable[[mx.array], mx.array]


class Case(NamedTuple):
    """One comparison: what the transform comes to, and the loop, with every input cast."""

    where: str
    ours: Callable[[], Any]
    oracle: Callable[[Cast], Any]


def as_drawn(x: mx.array) -> mx.array:
    return x


def in_float32(x: mx.array) -> mx.array:
    """The same numbers, of which what follows rounds off less."""
    return x.astype(mx.float32) if x.dtype in HALVES else x


def outcome(thunk: Callable[[], Any]) -> list[mx.array] | Exception:
    try:
        out = _flat(thunk())
        mx.eval(out)
        return out
    except Exception as e:
        if LATE_WRITES_BUG:
            mx.synchronize()
        return e


class Samples:
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


def cases(mode: str, fun: Fun, reference: Fun, samples: Samples, t: Any) -> Iterator[Case]:
    def flat(*xs: mx.array) -> list[mx.array]:
        return _flat(fun(*xs))

    def meaning(*xs: mx.array) -> list[mx.array]:
        return _flat(reference(*xs))

    if mode == "call":
        if fun is not reference:
            one = samples.one()
            yield Case("of one sample", lambda: flat(*one), lambda cast: meaning(*map(cast, one)))
        return
    if mode == "vmap(vmap)":
        for outer, inner in samples.nested():
            arrays = _twice(samples, outer, inner)
            yield Case(
                f"in_axes={outer}, {inner}",
                lambda a=arrays, o=outer, i=inner: t.vmap(t.vmap(flat, in_axes=i), in_axes=o)(*a),
                _loop(loop(meaning, inner), outer, arrays),
            )
        return

    floating = samples.floating
    if mode not in ("vmap", "compile(vmap)", "vmap(compile)") and not floating:
        return
    for place in samples.places():
        arrays = samples.stacked(place)
        where = f"in_axes={place}"
        if mode == "vmap":
            yield Case(
                where,
                lambda a=arrays, p=place: t.vmap(flat, in_axes=p)(*a),
                _loop(meaning, place, arrays),
            )
        elif mode == "compile(vmap)":
            if place == tuple(0 if p is not None else None for p in place):
                mapped = mx.compile(t.vmap(flat, in_axes=place))
                yield Case(where, lambda a=arrays, m=mapped: m(*a), _loop(meaning, place, arrays))
        elif mode == "vmap(compile)":
            if place == tuple(0 if p is not None else None for p in place):
                compiled = mx.compile(flat)
                yield Case(
                    where,
                    lambda a=arrays, c=compiled, p=place: t.vmap(c, in_axes=p)(*a),
                    _loop(meaning, place, arrays),
                )
        else:
            yield from _derivatives(mode, flat, meaning, samples, place, arrays, where, t)


def _loop(fun: Fun, place: Any, arrays: Sequence[mx.array]) -> Callable[[Cast], Any]:
    return lambda cast: loop(fun, place)(*map(cast, arrays))


def _derivatives(
    mode: str,
    flat: Fun,
    meaning: Fun,
    samples: Samples,
    place: tuple[int | None, ...],
    arrays: list[mx.array],
    where: str,
    t: Any,
) -> Iterator[Case]:
    one = outcome(lambda: meaning(*samples.one()))
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
            yield Case(
                f"argnum {n} {where}",
                lambda n=n: t.vmap(t.grad(loss, argnums=n), in_axes=place)(*arrays),
                _loop(native.grad(true_loss, argnums=n), place, arrays),
            )
        return
    if mode == "grad(vmap)":
        for n in floating:
            yield Case(
                f"argnum {n} {where}",
                lambda n=n: t.grad(
                    lambda *xs: mx.sum(t.vmap(loss, in_axes=place)(*xs).astype(mx.float32)),
                    argnums=n,
                )(*arrays),
                lambda cast, n=n: _gathered(
                    _loop(native.grad(true_loss, argnums=n), place, arrays)(cast), place[n]
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

        yield Case(
            where,
            lambda: t.vmap(pullback(t, flat), in_axes=axes)(*arrays, *cotangents),
            _loop(pullback(mx, meaning), axes, [*arrays, *cotangents]),
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
        yield Case(
            where,
            lambda: t.vmap(pushed(t, flat), in_axes=axes)(*arrays, *tangents),
            _loop(pushed(mx, meaning), axes, [*arrays, *tangents]),
        )
    elif mode == "jvp(vmap)":
        yield Case(
            where,
            lambda: pushed(t, t.vmap(flat, in_axes=place))(*arrays, *tangents),
            _loop(pushed(mx, meaning), axes, [*arrays, *tangents]),
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

            yield Case(
                f"argnum {n} {where}",
                lambda h=hvp, a=axes_n, v=tangent: t.vmap(h(t, loss), in_axes=a)(*arrays, v),
                _loop(hvp(mx, true_loss), axes_n, [*arrays, tangent]),
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


def _twice(samples: Samples, outer: Any, inner: Any) -> list[mx.array]:
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
