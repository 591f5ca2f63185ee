from __future__ import annotations

import mlx.core as mx

from .case import case, integers, normal
from .quantized import HALF, e8m0, packed


def indices(*shape: int, high: int):
    return integers(*shape, high=high, dtype=mx.uint32)


def ordered(*shape: int, high: int):
    return lambda: mx.sort(mx.random.randint(0, high, shape))


#: The CPU's kernel takes float32 alone.
IN_HALF = mx.default_device() == mx.gpu

# A routing of 2 tokens to 3 of 4 experts, as mlx-lm writes it: x (tokens, 1, 1, dim).
case(
    "gather_mm",
    lambda x, w, i: mx.gather_mm(x, w, rhs_indices=i),
    normal(2, 1, 1, 5),
    normal(4, 5, 6),
    indices(2, 3, high=4),
    dtypes=HALF if IN_HALF else HALF[:1],
)
case(
    "gather_mm/swapped",
    lambda x, w, i: mx.gather_mm(x, w.swapaxes(-1, -2), rhs_indices=i),
    normal(2, 1, 3, 5),
    normal(4, 6, 5),
    indices(2, 3, high=4),
    half=IN_HALF,
)
case(
    "gather_mm/one token",
    lambda x, w, i: mx.gather_mm(x, w, rhs_indices=i),
    normal(1, 5),
    normal(4, 5, 6),
    indices(3, high=4),
    half=IN_HALF,
)
case(
    "gather_mm/lhs",
    lambda x, w, i: mx.gather_mm(x, w, lhs_indices=i),
    normal(2, 3, 5),
    normal(4, 5, 6),
    indices(4, high=2),
    half=IN_HALF,
)
case(
    "gather_mm/both",
    lambda x, w, i, j: mx.gather_mm(x, w, i, j),
    normal(2, 2, 3, 5),
    normal(3, 5, 6),
    indices(2, 1, high=4),
    indices(3, high=3),
    half=IN_HALF,
)
case(
    "gather_mm/sorted",
    lambda x, w, i: mx.gather_mm(x, w, rhs_indices=i, sorted_indices=True),
    normal(6, 1, 5),
    normal(4, 5, 7),
    ordered(6, high=4),
    half=IN_HALF,
)
case(
    "gather_mm/sorted rows",
    lambda x, w, i: mx.gather_mm(x, w, rhs_indices=i, sorted_indices=True),
    normal(6, 2, 5),
    normal(4, 5, 7),
    ordered(6, high=4),
    half=IN_HALF,
)
case(
    "gather_mm/vectors",
    lambda x, w, i: mx.gather_mm(x, w, rhs_indices=i),
    normal(5),
    normal(4, 5, 6),
    indices(3, high=4),
    half=IN_HALF,
)


def affine(**static):
    return lambda x, w, s, i: mx.gather_qmm(
        x, w, s, 0.5 * s, rhs_indices=i, group_size=32, **static
    )


W, S = packed(4, 5, 8), normal(4, 5, 2)
case("gather_qmm", affine(), normal(2, 1, 1, 64), W, S, indices(2, 3, high=4), dtypes=HALF)
case(
    "gather_qmm/transpose=False",
    affine(transpose=False),
    normal(2, 1, 3, 5),
    W,
    S,
    indices(2, 3, high=4),
)
case(
    "gather_qmm/sorted",
    affine(sorted_indices=True),
    normal(6, 1, 64),
    W,
    S,
    ordered(6, high=4),
    reference=lambda x, w, s, i: x @ mx.dequantize(w, s, 0.5 * s, 32)[i].swapaxes(-1, -2),
)
case(
    "gather_qmm/lhs",
    lambda x, w, s, i: mx.gather_qmm(x, w, s, 0.5 * s, lhs_indices=i, group_size=32),
    normal(2, 3, 64),
    W,
    S,
    indices(4, high=2),
)
case(
    "gather_qmm/no indices",
    lambda x, w, s: mx.gather_qmm(x, w, s, 0.5 * s, group_size=32),
    normal(4, 3, 64),
    W,
    S,
)
case(
    "gather_qmm/mxfp4",
    lambda x, w, s, i: mx.gather_qmm(x, w, s, rhs_indices=i, mode="mxfp4"),
    normal(2, 1, 1, 64),
    W,
    e8m0(4, 5, 2),
    indices(2, 3, high=4),
)


def mixture(x: mx.array, up: mx.array, down: mx.array, i: mx.array) -> mx.array:
    """Two layers of experts on one routing."""
    y = mx.gather_mm(mx.reshape(x, (2, 1, 1, 5)), up, rhs_indices=i)
    return mx.gather_mm(mx.tanh(y), down, rhs_indices=i).squeeze(-2)


case(
    "gather_mm/mixture",
    mixture,
    normal(2, 5),
    normal(4, 5, 6),
    normal(4, 6, 3),
    indices(2, 3, high=4),
    half=IN_HALF,
)

SEGMENTS = mx.array([[0, 3], [3, 8], [1, 2], [4, 4]])


def of_segments(a: mx.array, b: mx.array, s: mx.array = SEGMENTS) -> mx.array:
    k = mx.arange(a.shape[1])
    inside = (k >= s[..., :1]) & (k < s[..., 1:])
    return (a * mx.expand_dims(inside, -2).astype(a.dtype)) @ b


# In half precision MLX's own is wrong on the CPU.
case(
    "segmented_mm",
    lambda a, b: mx.segmented_mm(a, b, SEGMENTS),
    normal(3, 8),
    normal(8, 5),
    reference=of_segments,
)
case(
    "segmented_mm/mapped",
    lambda a, b, s: mx.segmented_mm(a, b, s),
    normal(3, 8),
    normal(8, 5),
    lambda: mx.sort(mx.random.randint(0, 9, (2, 3, 2)), axis=-1),
    reference=of_segments,
)
