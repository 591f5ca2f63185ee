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
from mlxshim.core.versions import SELECT_JVP_BUG
from mlxshim.extend import Operation
from mlxshim.rules._dtypes import HALVES
from mlxshim.testing_cases import Fun, Samples, as_drawn, cases, in_float32, outcome
from mlxshim.testing_cases import loop as loop

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

#: Relative to the largest value of the result; in float32 a second derivative may lose more. In
#: half precision a loop may round off more itself: what is further from it counts as right where it
#: is as near to the loop in float32, or no further from that than the loop is, but for a factor of
#: two and one rounding.
TOLERANCE = {mx.float32: 2e-4, mx.float16: 2e-2, mx.bfloat16: 6e-2}


class Result(NamedTuple):
    """One case: which mode, which arguments mapped where, what went wrong (None: nothing)."""

    mode: str
    where: str
    error: str | None
    wrong: bool = False  # a number that differs, as against an exception
    share: float = 0.0  # the largest error, as a part of the tolerance


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
            of the dtype by default. In half precision what the loop in float32 comes to is as
            good, and where the loop is itself further from that, twice its error is allowed.
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
        samples = Samples(arrays, dtype)
        tol = TOLERANCE.get(dtype, 2e-4) if tolerance is None else tolerance
        for mode in modes:
            for where, ours, oracle in cases(mode, fun, reference, samples, transforms):
                n = next(number)
                if n in skip:
                    continue
                want: list[mx.array] | Exception = []
                if n not in blind:
                    announce(f"loop {n}")
                    want = outcome(lambda f=oracle: f(as_drawn))
                    if isinstance(want, Exception) or not want:
                        continue  # what one sample does not have
                    if SELECT_JVP_BUG and "jvp" in mode and any(w.dtype == mx.bool_ for w in want):
                        want = []  # MLX's tangent of a selection is no tangent there: no oracle
                where = f"{where} {str(dtype).split('.')[-1]}"
                announce(f"case {n} {mode} {where}")
                got = outcome(ours)
                if isinstance(got, Exception):
                    said = f"{type(got).__name__}: {(str(got).splitlines() or [''])[0][:200]}"
                    yield Result(mode, where, said)
                    continue
                if not want:
                    yield Result(mode, where, None)
                    continue
                error, share = _unlike(got, want), 0.0
                if error is None:
                    second = mode == "vmap(jvp(grad))" and dtype == mx.float32
                    error, share = _too_far(got, want, tol * (5 if second else 1))
                if share > 1 and dtype in HALVES:
                    true = outcome(lambda f=oracle: f(in_float32))
                    error = _further_off(got, want, true, tol, error)
                yield Result(mode, where, error, error is not None, share)


def _unlike(got: list[mx.array], want: list[mx.array]) -> str | None:
    """What differs and is no matter of precision."""
    if len(got) != len(want):
        return f"{len(got)} outputs, the loop has {len(want)}"
    for i, (g, w) in enumerate(zip(got, want)):
        if g.shape != w.shape:
            return f"output {i} has shape {g.shape}, the loop's {w.shape}"
        if g.dtype != w.dtype:
            return f"output {i} is {g.dtype}, the loop's {w.dtype}"
        if not mx.issubdtype(w.dtype, mx.inexact):
            if not mx.array_equal(g, w).item():
                return f"output {i} differs"
            continue
        # Infinities and NaNs must be where the loop has them.
        odd = mx.logical_not(mx.isfinite(w))
        same = mx.logical_or(g == w, mx.logical_and(mx.isnan(g), mx.isnan(w)))
        if not mx.all(mx.where(odd, same, mx.isfinite(g))).item():
            return f"output {i} is not finite where the loop's is, or otherwise"
    return None


def _distance(x: mx.array, y: mx.array) -> tuple[float, float]:
    """The largest difference of what is finite in `y`, and the largest value there."""
    if y.size == 0 or not mx.issubdtype(y.dtype, mx.inexact):
        return 0.0, 0.0
    if y.dtype != mx.complex64:
        x, y = x.astype(mx.float32), y.astype(mx.float32)
    odd, zero = mx.logical_not(mx.isfinite(y)), mx.zeros_like(y)
    error = mx.max(mx.abs(mx.where(odd, zero, x - y))).item()
    scale = mx.max(mx.abs(mx.where(odd, zero, y))).item()
    return float(error), float(scale)  # pyright: ignore


def _too_far(got: list[mx.array], want: list[mx.array], tol: float) -> tuple[str | None, float]:
    """The first output beyond the tolerance, and the largest error as a part of it."""
    said, largest = None, 0.0
    for i, (g, w) in enumerate(zip(got, want)):
        error, scale = _distance(g, w)
        share = error / (tol * max(scale, 1.0))
        if share > 1 and said is None:
            said = f"output {i} differs by {error:.3g} where the values reach {scale:.3g}"
        largest = max(largest, share)
    return said, largest


def _further_off(
    got: list[mx.array],
    want: list[mx.array],
    true: list[mx.array] | Exception,
    tol: float,
    said: str | None,
) -> str | None:
    """What is wrong if not the loop's own rounding explains it: `true` is the loop in float32.

    A loop that is off by a quarter of the values explains nothing.
    """
    if isinstance(true, Exception) or [t.shape for t in true] != [w.shape for w in want]:
        return said
    for i, (g, w, t) in enumerate(zip(got, want, true)):
        (ours, scale), (loops, _) = _distance(g, t), _distance(w, t)
        allowed = tol * max(scale, 1.0)
        if loops <= max(scale, 1.0) / 4:
            allowed = max(allowed, 2 * loops + _ROUNDING.get(w.dtype, 0.0) * scale)
        if ours > allowed:
            return (
                f"{said}; from float32 output {i} is off by {ours:.3g}, the loop by {loops:.3g}, "
                f"where the values reach {scale:.3g}"
            )
    return None


#: The distance of one from the next number.
_ROUNDING = {mx.float16: 2**-10, mx.bfloat16: 2**-7}
