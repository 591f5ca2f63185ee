"""Fourier transforms: `mx.fft.fft`, `rfft2`, `irfftn`, …

The jvp of MLX's irfft takes every length for even. Before 0.32.4 its batching rule of a real
transform changes the length of every axis where only the last one's changes, and the jvp of all
transforms every axis of the tangent. Here a transform over `axes` is linear,

    y = F x    dy = F dx    dx~ = F^H dy~        F^H = N F^-1 (complex)

and maps by counting the mapped axis. With the half spectrum of a real one, F^H halves (rfft) or
doubles (irfft) what stands for itself and for its mirror image: all but the first frequency, and
the last of an even length.

Source: mlx/fft.cpp; mlx/primitives.cpp, `FFT`.
"""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx

from ..core import levels
from ..core.interception import intercept, original
from ..core.primitive import Arrays, Axes, Primitive
from ..core.versions import MLX
from ._devices import within

Ints = tuple[int, ...]

# The primitive: the arrays have their lengths, nothing is scaled ----------------------------------


def _transformed(
    x: mx.array, *, axes: Ints, real: bool, inverse: bool, length: int
) -> list[mx.array]:
    raw = original(mx.fft, f"{'i' * inverse}{'r' * real}fftn")
    sizes = [x.shape[axis] for axis in axes]
    if real and inverse:
        sizes[-1] = length
    return [raw(x, sizes, axes)]


def _value(x: mx.array, **form: Any) -> list[mx.array]:
    # Of a node that has the derivatives.
    return _transformed(mx.stop_gradient(x), **form)


def _batch(
    size: int, arrays: Arrays, mapped: Axes, *, axes: Ints, **form: Any
) -> tuple[list[mx.array], list[int]]:
    place = mapped[0] or 0
    return [_bind(arrays[0], axes=tuple(a + (a >= place) for a in axes), **form)], [place]


def _jvp(primals: Arrays, tangents: Arrays, **form: Any) -> list[mx.array]:
    return [_bind(tangents[0], **form)]


def _vjp(
    primals: Arrays,
    cotangents: Arrays,
    outputs: Arrays,
    *,
    axes: Ints,
    real: bool,
    inverse: bool,
    length: int,
) -> list[mx.array]:
    x, ct, last = primals[0], cotangents[0], axes[-1]
    whole = x if real and not inverse else ct  # which has every frequency, or every place
    count = math.prod(whole.shape[axis] for axis in axes)
    form = {"axes": axes, "real": real, "inverse": not inverse, "length": whole.shape[last]}
    if not real:
        return [_bind(ct, **form) * (1 / count if inverse else count)]
    half = ct if not inverse else x
    doubled = _twice(half.shape[last], whole.shape[last], half.ndim - last - 1)
    if inverse:
        return [_bind(ct, **form) * (doubled / count).astype(mx.complex64)]
    return [_bind(ct * (1 / doubled).astype(mx.complex64), **form) * count]


def _twice(half: int, whole: int, behind: int) -> mx.array:
    """How many frequencies of the whole spectrum each of the half stands for."""
    counts = [1 if k == 0 or 2 * k == whole else 2 for k in range(half)]
    return mx.reshape(mx.array(counts, mx.float32), (half, *(1,) * behind))


_rules: dict[str, Any] = {"decomposition": _value, "batch": _batch, "vjp": _vjp, "jvp": _jvp}
_spectrum = Primitive("fft", lowering=_transformed, **_rules)
_pushed = Primitive("fft", lowering=_value, **_rules)


def _bind(x: mx.array, **form: Any) -> mx.array:
    stack = levels.active()
    if "jvp" in stack and "vmap" not in stack:
        return _pushed.differentiable(x, **form)[0]
    return _spectrum(x, **form)[0]


# MLX's functions ----------------------------------------------------------------------------------

#: What follows the axes in MLX's signatures.
_OPTIONS = ("norm", "stream") if MLX >= (0, 31, 2) else ("stream",)


def _over(
    x: mx.array,
    sizes: Ints,
    axes: Ints,
    real: bool,
    inverse: bool,
    norm: str,
) -> mx.array:
    shape = list(x.shape)
    for axis, n in zip(axes, sizes):
        shape[axis] = n
    if real and inverse:
        shape[axes[-1]] = sizes[-1] // 2 + 1
    x = x[tuple(slice(0, n) for n in shape)]
    missing = [(0, n - have) for n, have in zip(shape, x.shape)]
    if any(high for _, high in missing):
        x = mx.pad(x, missing)
    x = x.astype(mx.float32 if real and not inverse else mx.complex64)
    y = _bind(x, axes=axes, real=real, inverse=inverse, length=sizes[-1])
    factor = {"backward": 0.0, "ortho": 0.5, "forward": 1.0}[norm] * (1 if inverse else -1)
    return y * math.prod(sizes) ** factor if factor else y


def _repair(name: str, default: Ints | None, one: bool) -> None:
    real, inverse = "r" in name, name.startswith("i")

    @intercept(mx.fft, name)
    def transform(a: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        raw, stack = original(mx.fft, name), levels.active()
        if "jvp" not in stack and not (_MISSHAPED and "vmap" in stack):
            return raw(a, *args, **kwargs)
        given = dict(zip(("n", "axis") if one else ("s", "axes"), args[:2]))
        given |= dict(zip(_OPTIONS, args[2:])) | kwargs
        checked = raw(a, **given)  # MLX's own messages; thrown away
        axes, sizes = given.get("axes", default), given.get("s")
        if one:
            axes, n = (given.get("axis", -1),), given.get("n")
            sizes = None if n is None else (n,)
        axes = tuple(axis % a.ndim for axis in (range(a.ndim) if axes is None else axes))
        if not axes:
            return checked
        if sizes is None:
            sizes = [a.shape[axis] for axis in axes]
            sizes[-1] = checked.shape[axes[-1]] if real and inverse else sizes[-1]
        stream = given.get("stream")
        with within(stream):
            norm = given.get("norm", "backward")
            return _over(a, tuple(sizes), axes, real, inverse, norm)


_MISSHAPED = MLX < (0, 32, 4)

for _name in ("fft", "ifft", "rfft", "irfft") if _MISSHAPED else ("irfft",):
    _repair(_name, None, one=True)
    _repair(f"{_name}2", (-2, -1), one=False)
    _repair(f"{_name}n", None, one=False)
