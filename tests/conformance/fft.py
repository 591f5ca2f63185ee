"""`mx.fft`: the parts of complex arguments and results stand apart, so that all is differentiated.

The references are sums of cosines and sines: old versions differentiate one sample wrongly.

Source: mlx/fft.cpp.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import mlx.core as mx

from mlxshim.core.versions import MLX

from .case import case, normal, uniform

F = mx.fft


def _parts(z: mx.array) -> list[mx.array]:
    return [mx.real(z), mx.imag(z)]


def transform(name: str) -> Callable[..., mx.array]:
    return lambda *args, **kwargs: getattr(F, name)(*args, **kwargs)


def _waves(rows: int, columns: int, period: int) -> tuple[mx.array, mx.array]:
    angles = [[2 * math.pi * i * k / period for k in range(columns)] for i in range(rows)]
    return mx.cos(mx.array(angles)), mx.sin(mx.array(angles))


def _along(axis: int, matrix: mx.array, x: mx.array) -> mx.array:
    return mx.moveaxis(mx.tensordot(matrix, x, ([1], [axis])), 0, axis)


def _dft(re: mx.array, im: mx.array, axes: Any, sign: int) -> list[mx.array]:
    for axis in axes:
        n = re.shape[axis]
        cos, sin = _waves(n, n, n)
        re, im = (
            _along(axis, cos, re) + sign * _along(axis, sin, im),
            _along(axis, cos, im) - sign * _along(axis, sin, re),
        )
        if sign < 0:
            re, im = re / n, im / n
    return [re, im]


def _rdft(x: mx.array, axes: Any) -> list[mx.array]:
    half = x.shape[axes[-1]] // 2 + 1
    return [mx.split(y, [half], axes[-1])[0] for y in _dft(x, mx.zeros_like(x), axes[::-1], 1)]


def _irdft(re: mx.array, im: mx.array, axes: Any, n: int) -> mx.array:
    *others, last = axes
    re, im = _dft(re, im, others, -1)
    cos, sin = _waves(n, re.shape[last], n)
    times = mx.array([1.0 if k == 0 or 2 * k == n else 2.0 for k in range(re.shape[last])]) / n
    return _along(last, cos * times, re) - _along(last, sin * times, im)


X2 = (normal(4, 6), normal(4, 6))
HALF_SPECTRUM = (normal(4, 4), normal(4, 4))

for sign, name in ((1, "fft"), (-1, "ifft")):
    fun = transform(name)

    def along(*axes: int, sign: int = sign) -> dict[str, Any]:
        return {"reference": lambda a, b: _dft(a, b, axes, sign)}

    case(f"fft.{name}", lambda a, b, f=fun: _parts(f(a + 1j * b, axis=0)), *X2, **along(0))
    case(f"fft.{name}/longer", lambda a, b, f=fun: _parts(f(a + 1j * b, n=8)), *X2, modes=("vmap",))
    fun = transform(f"{name}2")
    case(f"fft.{name}2", lambda a, b, f=fun: _parts(f(a + 1j * b)), *X2, **along(0, 1))
    fun = transform(f"{name}n")
    case(f"fft.{name}n", lambda a, b, f=fun: _parts(f(a + 1j * b, axes=[1, 0])), *X2, **along(1, 0))


def _real(name: str, fun: Callable[..., mx.array], axes: Any, *shape: int) -> None:
    case(name, lambda x: _parts(fun(x)), normal(*shape), reference=lambda x: _rdft(x, axes))


def _half(name: str, fun: Callable[..., mx.array], axes: Any, n: int) -> None:
    case(
        name,
        lambda a, b: fun(a + 1j * b),
        *HALF_SPECTRUM,
        reference=lambda a, b: _irdft(a, b, axes, n),
    )


case(
    "fft.fft/real",
    lambda x: _parts(F.fft(x)),
    normal(3, 5),
    reference=lambda x: _dft(x, mx.zeros_like(x), [1], 1),
)
_real("fft.rfft", lambda x: F.rfft(x), [1], 3, 6)
_real("fft.rfft/axis", lambda x: F.rfft(x, axis=0), [0], 5, 2)
_real("fft.rfft2", lambda x: F.rfft2(x), [0, 1], 3, 6)
_real("fft.rfftn", lambda x: F.rfftn(x), [0, 1, 2], 2, 3, 4)
_real("fft.rfftn/axes", lambda x: F.rfftn(x, axes=[2, 0]), [2, 0], 4, 2, 3)
_half("fft.irfft", lambda z: F.irfft(z), [1], 6)
_half("fft.irfft/odd", lambda z: F.irfft(z, n=7, axis=1), [1], 7)
_half("fft.irfft2", lambda z: F.irfft2(z), [0, 1], 6)
_half("fft.irfftn", lambda z: F.irfftn(z, axes=[1, 0]), [1, 0], 6)
if MLX >= (0, 31, 2):  # whose transforms have a norm
    case(
        "fft.fft/ortho",
        lambda a, b: _parts(F.fft(a + 1j * b, norm="ortho")),
        *X2,
        reference=lambda a, b: [y / math.sqrt(6) for y in _dft(a, b, [1], 1)],
    )
case("fft.fftshift", lambda x: F.fftshift(x), normal(3, 4))
case("fft.fftshift/axis", lambda x: F.fftshift(x, axes=[0]), normal(3, 4))
case("fft.ifftshift", lambda x: F.ifftshift(x), normal(3, 4))

# Composed of pads, frames and FFTs; since 0.32.
if hasattr(F, "stft"):
    WINDOW = uniform(4)
    case("fft.stft", lambda x: _parts(F.stft(x, n_fft=4, hop_length=2)), normal(12))
    case("fft.stft/window", lambda x, w: _parts(F.stft(x, n_fft=4, window=w)), normal(9), WINDOW)
    case(
        "fft.istft",
        lambda a, b: F.istft(a + 1j * b, n_fft=4, hop_length=2, length=9),
        normal(5, 3),
        normal(5, 3),
    )
