"""Convolutions, against their definition: MLX has no jvp of them, nor always a right gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from .case import case, normal

HALF = (mx.float32, mx.float16)
FEW = ("call", "vmap", "vmap(vmap)", "vmap(grad)", "grad(vmap)", "vmap(jvp)", "vmap(jvp(grad))")


def defined(
    count: int,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    input_dilation: Any = 1,
    groups: int = 1,
    flip: bool = False,
) -> Callable[[mx.array, mx.array], mx.array]:
    """The sum over all places of the input, most of which do not count."""

    def each(value: Any) -> Sequence[int]:
        return [value] * count if isinstance(value, int) else value

    low, high = padding if isinstance(padding, tuple) else (padding, padding)
    sides = list(zip(*map(each, (stride, low, high, dilation, input_dilation))))

    def convolution(x: mx.array, w: mx.array) -> mx.array:
        counts = []
        for n, k, side in zip(x.shape[1:], w.shape[1:], sides):
            s, before, after, d, i = side
            outputs = (1 + i * (n - 1) + before + after - 1 - d * (k - 1)) // s + 1
            taps = [[j * s + t * d - before for t in range(k)] for j in range(outputs)]
            if flip:
                taps = [row[::-1] for row in taps]
            counts.append(
                mx.array([[[float(p == i * m) for m in range(n)] for p in r] for r in taps])
            )
        x = mx.unflatten(x, -1, (groups, -1))
        w = mx.unflatten(w, 0, (groups, -1))
        o, k, m = "opq"[:count], "ktu"[:count], "mij"[:count]
        places = ",".join("".join(letters) for letters in zip(o, k, m))
        equation = f"n{m}gc,gf{k}c,{places}->n{o}gf"
        counts = [c.astype(x.dtype) for c in counts]
        return mx.flatten(mx.einsum(equation, x, w, *counts), -2, -1)

    return convolution


def plain(name: str, x: Any, w: Any, *, options: Any = None, **static: Any) -> None:
    count, operation = len(x().shape) - 2, name.split("/")[0]

    def fun(x: mx.array, w: mx.array) -> mx.array:
        return getattr(mx, operation)(x, w, **static)

    case(name, fun, x, w, reference=defined(count, **static), **(options or {}))


def general(name: str, x: Any, w: Any, *, options: Any = None, **static: Any) -> None:
    def fun(x: mx.array, w: mx.array) -> mx.array:
        dilation, rest = static.get("dilation", 1), {**static}
        rest.pop("dilation", None)
        return mx.conv_general(x, w, kernel_dilation=dilation, **rest)

    reference = defined(len(x().shape) - 2, **static)
    case(f"conv_general{name}", fun, x, w, reference=reference, **(options or {}))


def transposed(name: str, x: Any, w: Any, *, options: Any = None, **static: Any) -> None:
    count, operation = len(x().shape) - 2, name.split("/")[0]
    kernel, groups = w().shape[1:-1], static.get("groups", 1)

    def each(option: str, default: int) -> Sequence[int]:
        value = static.get(option, default)
        return [value] * count if isinstance(value, int) else value

    sides = zip(kernel, each("dilation", 1), each("padding", 0))
    low = [d * (k - 1) - p for k, d, p in sides]
    high = [p + more for p, more in zip(low, each("output_padding", 0))]
    reference = defined(
        count, 1, (low, high), each("dilation", 1), each("stride", 1), groups, flip=True
    )

    def fun(x: mx.array, w: mx.array) -> mx.array:
        return getattr(mx, operation)(x, w, **static)

    case(name, fun, x, w, reference=reference, **(options or {}))


few = {"modes": FEW}
plain("conv1d", normal(2, 5, 4), normal(3, 3, 4), options={"dtypes": HALF})
plain("conv1d/strided", normal(2, 6, 3), normal(2, 3, 3), stride=2, padding=1, options=few)
plain("conv1d/dilated", normal(1, 7, 2), normal(3, 3, 2), dilation=2, padding=2, options=few)
plain("conv1d/grouped", normal(2, 5, 4), normal(6, 3, 2), groups=2, padding=1)
plain("conv1d/depthwise", normal(2, 5, 4), normal(4, 3, 1), groups=4, padding=2, options=few)
plain("conv1d/wide padding", normal(2, 4, 2), normal(3, 2, 2), padding=3, options=few)
plain(
    "conv1d/pointwise, padded", normal(2, 4, 2), normal(3, 1, 2), stride=2, padding=1, options=few
)

plain("conv2d", normal(2, 4, 5, 2), normal(3, 3, 2, 2), options={"dtypes": HALF})
plain(
    "conv2d/strided",
    normal(1, 6, 5, 2),
    normal(3, 3, 2, 2),
    stride=[2, 1],
    padding=[1, 0],
    options=few,
)
plain("conv2d/dilated", normal(1, 6, 6, 2), normal(2, 2, 3, 2), dilation=[2, 2], options=few)
plain("conv2d/grouped", normal(2, 4, 4, 4), normal(6, 3, 3, 2), groups=2, padding=1)
plain("conv2d/depthwise", normal(1, 4, 4, 3), normal(6, 3, 3, 1), groups=3, stride=2, padding=1)
plain("conv2d/pointwise", normal(1, 3, 3, 4), normal(3, 1, 1, 4), options=few)

plain("conv3d", normal(1, 3, 4, 3, 2), normal(3, 2, 2, 3, 2))
plain(
    "conv3d/strided",
    normal(1, 4, 4, 5, 2),
    normal(2, 3, 2, 2, 2),
    stride=[2, 1, 2],
    padding=[1, 0, 1],
    options=few,
)

general("", normal(2, 5, 4, 2), normal(3, 2, 3, 2))
general("/padded on one side", normal(1, 5, 2), normal(3, 3, 2), padding=([2], [0]))
general(
    "/asymmetric padding",
    normal(1, 4, 5, 2),
    normal(3, 3, 2, 2),
    padding=([1, 0], [2, 3]),
    stride=[2, 2],
    options=few,
)
general("/negative padding", normal(1, 7, 2), normal(3, 3, 2), padding=([-1], [1]), options=few)
general("/input dilation", normal(1, 4, 2), normal(3, 3, 2), input_dilation=2, padding=1)
general(
    "/an end that is not used",
    normal(1, 4, 2),
    normal(3, 2, 2),
    stride=3,
    input_dilation=2,
    options=few,
)
general("/flipped", normal(1, 5, 4, 2), normal(3, 3, 2, 2), flip=True, padding=1, options=few)
general(
    "/one entry",
    normal(2, 1, 2),
    normal(2, 1, 2),
    padding=3,
    input_dilation=2,
    flip=True,
    options=few,
)
general(
    "/one entry on one side",
    normal(1, 4, 1, 2),
    normal(1, 1, 1, 2),
    stride=[1, 2],
    padding=([3, 2], [3, 1]),
    dilation=[2, 1],
    input_dilation=[2, 1],
    options=few,
)
general(
    "/everything",
    normal(2, 4, 5, 4),
    normal(4, 2, 3, 2),
    stride=[2, 3],
    padding=([1, 4], [3, 0]),
    dilation=[2, 1],
    input_dilation=[3, 2],
    groups=2,
    flip=True,
)
general(
    "/everything in three dimensions",
    normal(1, 3, 4, 2, 2),
    normal(2, 2, 2, 2, 2),
    stride=[2, 1, 1],
    padding=([1, 0, 2], [0, 1, 0]),
    dilation=[1, 2, 1],
    input_dilation=[2, 1, 1],
    flip=True,
    options=few,
)

transposed("conv_transpose1d", normal(2, 4, 3), normal(2, 3, 3), options={"dtypes": HALF})
transposed(
    "conv_transpose1d/strided",
    normal(1, 4, 4),
    normal(2, 3, 2),
    stride=2,
    padding=1,
    output_padding=1,
    groups=2,
)
transposed("conv_transpose2d", normal(1, 3, 4, 2), normal(3, 2, 3, 2), options=few)
transposed(
    "conv_transpose2d/strided",
    normal(2, 3, 3, 4),
    normal(4, 3, 2, 2),
    stride=[2, 3],
    padding=[1, 0],
    dilation=[1, 2],
    output_padding=[1, 0],
    groups=2,
    options=few,
)
transposed(
    "conv_transpose3d",
    normal(1, 2, 3, 2, 2),
    normal(3, 2, 2, 2, 2),
    stride=[1, 2, 1],
    padding=[0, 1, 0],
    options=few,
)

for mode in ("full", "same", "valid"):
    case(f"convolve/{mode}", lambda a, v, mode=mode: mx.convolve(a, v, mode), normal(6), normal(3))
case("convolve/same, even", lambda a, v: mx.convolve(a, v, "same"), normal(6), normal(4))
case("convolve/shorter first", lambda a, v: mx.convolve(a, v), normal(3), normal(5))
