"""What every printed program begins with: what transforms mean, and how results are compared."""

import math
import warnings

import mlx.core as mx

import mlxshim
from mlxshim.core import interception, levels


class Ours:
    """The transforms under test, of functions of arrays that return a list of arrays."""

    grad, jvp_of = staticmethod(mlxshim.grad), staticmethod(mlxshim.jvp)
    lightly_mapped = staticmethod(mlxshim.vmap)
    compile = staticmethod(lambda g: mx.compile(g))
    checkpoint = staticmethod(lambda g: mx.checkpoint(g))

    @staticmethod
    def vmap(g, in_axes, out_axes, form="plain"):
        if form == "chunks":
            return mlxshim.vmap(g, in_axes, out_axes, chunk_size=2)
        if form == "keywords":  # mapped over axis 0, all of them
            first = mlxshim.vmap(lambda x, **more: g(x, *more.values()), in_axes[:1], out_axes)
            return lambda x, *more: first(x, **{f"k{i}": y for i, y in enumerate(more)})
        if form == "tree":
            h = mlxshim.vmap(lambda t: g(*t["some"], t["last"][0]), (_tree(in_axes),), out_axes)
            return lambda *xs: h(_tree(xs))
        return mlxshim.vmap(g, in_axes, out_axes)

    @staticmethod
    def value_and_grad(g, argnums):
        h = mlxshim.value_and_grad(lambda *xs: scalar(g(*xs)), argnums=tuple(argnums))
        return lambda *xs: _flat(h(*xs))

    @staticmethod
    def vjp(g, argnums, count):
        return _product(mlxshim.vjp, g, argnums, count)

    @staticmethod
    def jvp(g, argnums):
        return _product(mlxshim.jvp, g, argnums, len(argnums))


class Meant:
    """Loops over samples, MLX's derivatives of those, and nothing compiled or recomputed."""

    grad, jvp_of = mx.grad, mx.jvp
    compile = checkpoint = staticmethod(lambda g: g)

    @staticmethod
    def lightly_mapped(g, in_axes):
        h = Meant.vmap(lambda *xs: [g(*xs)], in_axes, [0])
        return lambda *xs: h(*xs)[0]

    @staticmethod
    def vmap(g, in_axes, out_axes, form="plain"):
        def sample(xs, i):
            # Copies: what one sample does to an array that all share is its own affair.
            return [mx.array(x) if a is None else _at(x, a, i) for x, a in zip(xs, in_axes)]

        def loop(*xs):
            size = next(x.shape[a] for x, a in zip(xs, in_axes) if a is not None)
            if size:
                rows = [g(*sample(xs, i)) for i in range(size)]
                return [mx.stack(list(ys), axis=a) for ys, a in zip(zip(*rows), out_axes)]
            # Of no samples: what one of zeros would return, without it.
            zeros = [
                mx.zeros(_other(x, a, 1), x.dtype) if a is not None else x
                for x, a in zip(xs, in_axes)
            ]
            some = [mx.expand_dims(y, a) for y, a in zip(g(*sample(zeros, 0)), out_axes)]
            return [mx.zeros(_other(y, a, 0), y.dtype) for y, a in zip(some, out_axes)]

        return loop

    @staticmethod
    def value_and_grad(g, argnums):
        h = mx.value_and_grad(lambda *xs: scalar(g(*xs)), argnums=list(argnums))
        return lambda *xs: _flat(h(*xs))

    @staticmethod
    def vjp(g, argnums, count):
        return _product(mx.vjp, g, argnums, count)

    @staticmethod
    def jvp(g, argnums):
        return _product(mx.jvp, g, argnums, len(argnums))


def _at(x, axis, i):
    return x[(slice(None),) * (axis % x.ndim) + (i,)]  # mx.take refuses empty arrays


def _other(x, axis, extent):
    return tuple(extent if i == axis % x.ndim else n for i, n in enumerate(x.shape))


class Natively(Meant):
    """The loop with what MLX compiles and recomputes: what it gets wrong is not the transforms'."""

    compile, checkpoint = Ours.compile, Ours.checkpoint


def _product(transform, g, argnums, count):
    """(outputs, products) of a vjp or jvp; the last `count` arguments are the vectors."""

    def product(*xs):
        xs, vectors = xs[:-count], list(xs[-count:])

        def of_some(*some):
            full = list(xs)
            for i, x in zip(argnums, some):
                full[i] = x
            outputs = [y for y in g(*full) if mx.issubdtype(y.dtype, mx.floating)]
            # mx.vjp drops the second cotangent of an output that is there twice.
            return [y * 1 for y in outputs] if transform is mx.vjp else outputs

        return _flat(transform(of_some, [xs[i] for i in argnums], vectors))

    return product


def _tree(xs):
    return {"some": list(xs[:-1]), "last": (xs[-1],)}


def _flat(xs):
    return [xs] if isinstance(xs, mx.array) else [y for x in xs for y in _flat(x)]


def scalar(ys):
    """A sum of all entries of the floating outputs, with weights."""
    ys = [y for y in ys if mx.issubdtype(y.dtype, mx.floating)]
    return sum(mx.sum(y * mx.cos(mx.arange(y.size)).reshape(y.shape).astype(y.dtype)) for y in ys)


# Inputs and comparison --------------------------------------------------------------------------


def new_inputs(kinds, seed):
    """Arrays for (kind, shape, dtype) each."""
    mx.random.seed(seed)
    draw = {
        "normal": lambda shape: mx.random.normal(shape),
        "positive": lambda shape: mx.random.uniform(0.5, 1.5, shape),
        "integers": lambda shape: mx.random.randint(0, 4, shape),
        "booleans": lambda shape: mx.random.bernoulli(0.5, shape),
        "bits": lambda shape: mx.random.randint(0, 1 << 30, shape),
    }
    xs = [draw[kind](shape).astype(getattr(mx, dtype)) for kind, shape, dtype in kinds]
    mx.eval(xs)
    return xs


def outcome(function, xs):
    """A list of evaluated arrays, or the exception."""
    try:
        ys = function(*(mx.array(x) for x in xs))
        mx.eval(ys)
        return list(ys)
    except Exception as e:
        return e


def compare(program, kinds, *, precision=2e-4, calls=1, announce=print):
    """What is wrong with `program`, in words; "" for nothing, "no case: …" where there is no say.

    `program(t)` is a function of arrays made with the transforms `t`.
    """
    announce("loop")
    meant, samples = program(Meant), [new_inputs(kinds, seed) for seed in range(calls)]
    wants = [outcome(meant, xs) for xs in samples]
    for want in wants:
        if isinstance(want, Exception):
            return f"no case: {type(want).__name__}: {want}"
    announce("ours")
    ours = program(Ours)
    for xs, want in zip(samples, wants):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            got = outcome(ours, xs)
        for w in caught:
            announce(f"warned {w.message}")
        if interception.in_place() or levels.active() or levels.vmaps():
            return "interception or a level was left behind"
        wrong = _wrong(got, want, precision)
        if wrong:
            announce("loop")
            if "needs MLX 0.32" in wrong:
                return f"no case: {wrong}"
            natively = _wrong(outcome(program(Natively), xs), want, precision)
            if natively:
                return f"no case: natively {natively}"
            unstable = not isinstance(got, Exception) and _unstable(meant, xs, got, want, precision)
            return f"no case: {wrong}" if unstable else wrong
    return ""


def _wrong(got, want, precision):
    if isinstance(got, Exception):
        return f"raised {type(got).__name__}: {got}"
    return difference(got, want, precision)


def difference(got, want, precision):
    if [(y.shape, y.dtype) for y in got] != [(y.shape, y.dtype) for y in want]:
        kinds = [[f"{y.dtype}{list(y.shape)}" for y in ys] for ys in (got, want)]
        return f"outputs are {kinds[0]}, the loop's {kinds[1]}"
    for i, (g, w) in enumerate(zip(got, want)):
        error, scale = _error(g, w)
        if not error <= precision * max(scale, 1e-2):
            return f"output {i} differs by {error:.2g} where values reach {scale:.2g}"
    return ""


def _error(g, w):
    """The largest difference, infinite where only one is finite; and the largest value."""
    if w.size == 0:
        return 0.0, 0.0
    if w.dtype != mx.complex64:
        g, w = g.astype(mx.float32), w.astype(mx.float32)
    same = mx.logical_or(g == w, mx.logical_and(mx.isnan(g), mx.isnan(w)))
    error = mx.max(mx.where(same, 0.0, mx.abs(g - w)))
    scale = mx.max(mx.where(mx.isfinite(w), mx.abs(w), 0.0))
    error, scale = float(error.item()), float(scale.item())
    return (math.inf if math.isnan(error) else error), scale


def _unstable(meant, xs, got, want, precision):
    """Whether rounding alone explains the difference: arguments moved that much move the loop."""
    moved = [0.0] * len(want)
    for seed in range(5):
        mx.random.seed(seed)
        near = [
            x * (1 + 0.003 * precision * mx.random.normal(x.shape)).astype(x.dtype)
            if mx.issubdtype(x.dtype, mx.floating)
            else x
            for x in xs
        ]
        ys = outcome(meant, near)
        if isinstance(ys, Exception) or [y.shape for y in ys] != [y.shape for y in want]:
            return True
        moved = [max(m, _error(y, w)[0]) for m, y, w in zip(moved, ys, want)]
    return all(
        [y.shape for y in got] == [y.shape for y in want]
        and (error <= precision * max(scale, 1e-2) or error <= 100 * m)
        for m, (error, scale) in zip(moved, map(_error, got, want))
    ) and [y.dtype for y in got] == [y.dtype for y in want]
