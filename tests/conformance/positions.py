from __future__ import annotations

import functools
from typing import Any

import mlx.core as mx

from .case import case, integers, normal, uniform

HALF = (mx.float32, mx.float16)


def rope(x: mx.array, offset: Any = 0, dims: int = 8, **options: Any) -> mx.array:
    options = {"traditional": False, "base": 10.0, "scale": 1.0, **options}
    return mx.fast.rope(x, dims, offset=offset, **options)


def with_freqs(x: mx.array, freqs: mx.array, offset: Any = 0, **options: Any) -> mx.array:
    return rope(x, offset, base=None, freqs=freqs, **options)


#: Angles of a few radians: of larger ones half precision hardly has the fraction of a turn.
WIDE = {"low": 4.0, "high": 20.0}

case("fast.rope", rope, normal(2, 3, 5, 8), dtypes=HALF)
case("fast.rope/traditional", functools.partial(rope, traditional=True), normal(2, 3, 5, 8))
case("fast.rope/partial", functools.partial(rope, dims=6, offset=3, scale=0.5), normal(2, 3, 5, 8))
case(
    "fast.rope/partial traditional",
    functools.partial(rope, dims=4, offset=3, traditional=True),
    normal(2, 5, 8),
)
case("fast.rope/no heads", functools.partial(rope, offset=7), normal(2, 5, 8))
case("fast.rope/more dimensions", functools.partial(rope, offset=7), normal(2, 2, 3, 5, 8))
case("fast.rope/offset", rope, normal(2, 3, 5, 8), integers(high=9), dtypes=HALF)
case(
    "fast.rope/offset of one",
    rope,
    normal(2, 3, 5, 8),
    integers(1, high=9),
    reference=lambda x, offset: rope(x, mx.squeeze(offset)),  # MLX reads past it on CUDA
)
case("fast.rope/offsets", rope, normal(2, 3, 5, 8), integers(2, high=9))
case("fast.rope/offsets no heads", rope, normal(2, 5, 8), integers(2, high=9, dtype=mx.int64))
case(
    "fast.rope/offsets more dimensions",
    functools.partial(rope, traditional=True),
    normal(2, 2, 3, 5, 8),
    integers(2, high=9),
)
case("fast.rope/one step", rope, normal(1, 3, 1, 8), integers(high=9))
case("fast.rope/freqs", with_freqs, normal(2, 3, 5, 8), uniform(4, **WIDE))
case(
    "fast.rope/freqs offset",
    lambda x, freqs, offset: with_freqs(x, freqs, offset, dims=6, traditional=True, scale=2.0),
    normal(2, 3, 5, 8),
    uniform(3, **WIDE),
    integers(high=9),
)
case(
    "fast.rope/freqs offsets",
    with_freqs,
    normal(2, 3, 5, 8),
    uniform(4, **WIDE),
    integers(2, high=9),
)
