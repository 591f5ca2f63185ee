"""Arrays that come from no argument, beside one that does, and arrays made of arrays."""

from __future__ import annotations

import mlx.core as mx

from .case import case, integers, normal

X = normal(3, 4)

case("zeros", lambda x: x + mx.zeros((3, 4)), X)
case("ones", lambda x: x * mx.ones((3, 4)), X)
case("empty", lambda x: mx.empty((3, 4)) * 0 + x, X)
case("eye", lambda x: x * mx.eye(3, 4, k=1), X)
case("identity", lambda x: x * mx.identity(3)[:, :1], X)
case("tri", lambda x: x * mx.tri(3, 4, 0), X)
case("arange", lambda x: x * mx.arange(1, 9, 2), X)
case("linspace", lambda x: x * mx.linspace(0, 1, 4), X)
for name in ("bartlett", "blackman", "hamming", "hanning"):
    case(name, lambda x, n=name: x * getattr(mx, n)(4), X)
for name in ("fftfreq", "rfftfreq"):
    case(f"fft.{name}", lambda x, n=name: x + getattr(mx.fft, n)(5)[:3, None], X)

case("zeros_like", lambda x: x + mx.zeros_like(x), X)
case("ones_like", mx.ones_like, X)
case("ones_like/integers", mx.ones_like, integers(2, 3))
case("empty_like", lambda x: mx.empty_like(x) * 0 + x, X)
case("full", lambda x: mx.full((2, 3), x), normal(3))
case("full/scalar", lambda x: x + mx.full((2, 3), 1.5), normal(3))
case("full/dtype", lambda x: mx.full((2, 3), x, mx.int32), integers())
case("full_like", lambda x, y: mx.full_like(x, y), normal(2, 3), normal(3))

case("asarray", lambda x: mx.asarray(x) * 2, X)
case("array", lambda x, y: mx.array([x, y, x]), normal(2, 3), normal(2, 3))
case("array/of an array", lambda x: mx.array(x) * 2, X)
case("array/of scalars", lambda x, y: mx.array([[x, y], [1.0, x]]), normal(), normal())
case("array/dtype", lambda x: mx.array([x, x], dtype=mx.float16), normal(3))
