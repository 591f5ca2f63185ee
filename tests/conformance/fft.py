"""`mx.fft`: the parts of complex arguments and results stand apart, so that all is differentiated.

Source: mlx/fft.cpp.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from .case import case, normal, uniform

F = mx.fft


def _parts(z: mx.array) -> list[mx.array]:
    return [mx.real(z), mx.imag(z)]


def transform(name: str) -> Callable[..., mx.array]:
    return lambda *args, **kwargs: getattr(F, name)(*args, **kwargs)


X2 = (normal(4, 6), normal(4, 6))
HALF_SPECTRUM = (normal(4, 4), normal(4, 4))

for name in ("fft", "ifft"):
    fun = transform(name)
    case(f"fft.{name}", lambda a, b, f=fun: _parts(f(a + 1j * b, axis=0)), *X2)
    case(f"fft.{name}/longer", lambda a, b, f=fun: _parts(f(a + 1j * b, n=8)), *X2, modes=("vmap",))
for name in ("fft2", "ifft2"):
    fun = transform(name)
    case(f"fft.{name}", lambda a, b, f=fun: _parts(f(a + 1j * b)), *X2)
for name in ("fftn", "ifftn"):
    fun = transform(name)
    case(f"fft.{name}", lambda a, b, f=fun: _parts(f(a + 1j * b, axes=[1, 0])), *X2)
case("fft.fft/real", lambda x: _parts(F.fft(x)), normal(3, 5))
case("fft.rfft", lambda x: _parts(F.rfft(x)), normal(3, 6))
case("fft.rfft/axis", lambda x: _parts(F.rfft(x, axis=0)), normal(5, 2))
case("fft.rfft2", lambda x: _parts(F.rfft2(x)), normal(3, 6))
case("fft.rfftn", lambda x: _parts(F.rfftn(x)), normal(2, 3, 4))
case("fft.rfftn/axes", lambda x: _parts(F.rfftn(x, axes=[2, 0])), normal(4, 2, 3))
case("fft.irfft", lambda a, b: F.irfft(a + 1j * b), *HALF_SPECTRUM)
case("fft.irfft/odd", lambda a, b: F.irfft(a + 1j * b, n=7, axis=1), *HALF_SPECTRUM)
case("fft.irfft2", lambda a, b: F.irfft2(a + 1j * b), *HALF_SPECTRUM)
case("fft.irfftn", lambda a, b: F.irfftn(a + 1j * b, axes=[1, 0]), *HALF_SPECTRUM)
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
