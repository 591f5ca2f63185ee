from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from .case import case, integers, normal

HALF = (mx.float32, mx.float16)
VALUES = ("vmap", "vmap(vmap)", "compile(vmap)", "vmap(compile)")


def packed(*shape: int) -> Callable[[], mx.array]:
    return lambda: mx.random.randint(0, 2**31 - 1, shape).astype(mx.uint32) * 2 + 1


def e8m0(*shape: int) -> Callable[[], mx.array]:
    return integers(*shape, low=122, high=128, dtype=mx.uint8)


def e4m3(*shape: int) -> Callable[[], mx.array]:
    return integers(*shape, low=24, high=64, dtype=mx.uint8)


def affine(**static) -> Callable[..., mx.array]:
    return lambda x, *w: mx.quantized_matmul(x, *w, group_size=32, **static)


# 4 bits: eight entries to a word; K = 64 is two groups.
W, S = packed(5, 8), normal(5, 2)
case("quantized_matmul", affine(), normal(3, 64), W, S, S, dtypes=HALF)
case("quantized_matmul/vector", affine(), normal(64), W, S, S)
case("quantized_matmul/3-D x", affine(), normal(2, 3, 64), W, S, S)
case("quantized_matmul/transpose=False", affine(transpose=False), normal(3, 5), W, S, S)
case(
    "quantized_matmul/batched w",
    affine(),
    normal(2, 3, 64),
    packed(2, 5, 8),
    normal(2, 5, 2),
    normal(2, 5, 2),
)
case(
    "quantized_matmul/broadcast w",
    affine(),
    normal(2, 1, 3, 64),
    packed(3, 5, 8),
    normal(3, 5, 2),
    normal(3, 5, 2),
)
case(
    "quantized_matmul/broadcast x, transpose=False",
    affine(transpose=False),
    normal(1, 3, 5),
    packed(2, 5, 8),
    normal(2, 5, 2),
    normal(2, 5, 2),
)


def first(**static) -> Callable[..., mx.array]:
    """What MLX makes of several matrices that meet a matrix or a vector: it reads the first."""
    return lambda x, *w: mx.quantized_matmul(x, *(p[0] for p in w), group_size=32, **static)


for title, x, transpose in (("matrix", normal(3, 64), True), ("vector", normal(5), False)):
    case(
        f"quantized_matmul/{title}, batched w",
        affine(transpose=transpose),
        x,
        packed(2, 5, 8),
        *[normal(2, 5, 2)] * 2,
        reference=first(transpose=transpose),
        modes=("call", "vmap", "vmap(vmap)", "vmap(grad)", "grad(vmap)", "vmap(jvp)"),
    )
case("quantized_matmul/8 bits", affine(bits=8), normal(3, 64), packed(5, 16), S, S)
case("quantized_matmul/3 bits", affine(bits=3), normal(3, 64), packed(5, 6), S, S)


def floating(mode: str, **static) -> Callable[..., mx.array]:
    return lambda x, w, s: mx.quantized_matmul(x, w, s, mode=mode, **static)


case("quantized_matmul/mxfp4", floating("mxfp4"), normal(3, 64), W, e8m0(5, 2), dtypes=HALF)
case("quantized_matmul/mxfp8", floating("mxfp8"), normal(3, 64), packed(5, 16), e8m0(5, 2))
case("quantized_matmul/nvfp4", floating("nvfp4"), normal(3, 64), W, e4m3(5, 4))
case(
    "quantized_matmul/mxfp4 transpose=False",
    floating("mxfp4", transpose=False),
    normal(3, 5),
    W,
    e8m0(5, 2),
)


def twice(x: mx.array, w: mx.array, s: mx.array, b: mx.array) -> mx.array:
    """A layer on a layer, so that the second meets what the first one's rule made."""
    y = mx.quantized_matmul(x, w, s, b, group_size=32)
    # Small, for in half precision a tanh near one has hardly a slope that is right.
    return mx.quantized_matmul(mx.tanh(0.02 * y), w, s, b, group_size=32, transpose=False)


case("quantized_matmul/twice", twice, normal(3, 64), W, S, S)

for mode, dtypes in (("affine", HALF), ("mxfp4", HALF), ("mxfp8", HALF), ("nvfp4", HALF)):
    # Rounding has no derivative worth the name, and fp8 none at all.
    case(
        f"quantize/{mode}",
        lambda w, mode=mode: mx.quantize(w, mode=mode),
        normal(3, 64),
        dtypes=dtypes,
        modes=VALUES,
    )
case("dequantize", lambda *w: mx.dequantize(*w, group_size=32), W, S, S)
case(
    "dequantize/3-D",
    lambda *w: mx.dequantize(*w, group_size=32),
    packed(2, 5, 8),
    *[normal(2, 5, 2)] * 2,
)
case("dequantize/3 bits", lambda *w: mx.dequantize(*w, group_size=32, bits=3), packed(5, 6), S, S)
case("dequantize/dtype", lambda *w: mx.dequantize(*w, group_size=32, dtype=mx.float16), W, S, S)
case("dequantize/mxfp4", lambda *w: mx.dequantize(*w, mode="mxfp4"), W, e8m0(5, 2))
case(
    "dequantize/mxfp8",
    lambda *w: mx.dequantize(*w, mode="mxfp8", dtype=mx.float32),
    packed(5, 16),
    e8m0(5, 2),
)
case("dequantize/nvfp4", lambda *w: mx.dequantize(*w, mode="nvfp4"), W, e4m3(5, 4))

case("to_fp8", lambda x: mx.to_fp8(x), normal(3, 4), dtypes=HALF)
case("from_fp8", lambda x: mx.from_fp8(x, mx.float32), integers(3, 4, high=120, dtype=mx.uint8))
