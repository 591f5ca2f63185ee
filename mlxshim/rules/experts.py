"""Products with gathered matrices: `mx.gather_mm`, `mx.gather_qmm`, `mx.gather_qqmm`.

    Y[i] = X[lhs[i]] W[rhs[i]]        X: (A..., M, K)   W: (E..., K, N)   Y: (I..., M, N)

lhs and rhs hold flat indices into A... and E...; one that is not given counts them, and the two
broadcast. In a mixture of experts W are the experts and rhs is the routing. gather_qmm has a
quantized W (see quantization.py), gather_qqmm quantizes X as well.

Source: mlx/ops.cpp, mlx/primitives.cpp (`GatherMM::vjp`, `GatherQMM::vjp`, `gather_mm_grad`). None
of them has a vmap or a jvp there. One call for all samples:

* X alone mapped: samples are further rows of each product, an expert is read once for all of them;
  if sorted indices promise a grouped product of single rows, further single rows with one index.
* indices mapped: samples are a leading dimension of the indices; W and an unmapped X stay as they
  are. Single rows sorted within each sample are sorted anew over all samples.
* W mapped: samples are further experts, rhs of sample n is offset by n * E; so sorted indices stay
  sorted. What is unmapped of a quantized W (packed entries, scales or biases) is copied.
* gradients: with respect to X the same operation with W transposed; with respect to W (or scales
  and biases) MLX's own gradient, samples being further experts.
* a mapped global scale: a loop over samples of fused calls.

As long as only activations and indices are mapped no weight is copied or dequantized. The
decomposition, which copies a matrix for each index, is evaluated only if an argument is a tracer of
`grad` or `mx.compile` but nothing is mapped after all. The rules: _gathered.py, _gathered_grad.py.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from ..core import levels
from ..core.interception import intercept, original
from ..core.tracers import is_tracer
from ._discrete import discrete
from ._dtypes import cast
from ._folding import on_stream
from ._gathered import bind_gather, has_wrong_derivative
from ._matrices import count_of
from ._plans import planned
from .quantization import parameters
from .quantized import quantized_matmul


@intercept(mx, "gather_mm")
def gather_mm(
    a: mx.array,
    b: mx.array,
    /,
    lhs_indices: mx.array | None = None,
    rhs_indices: mx.array | None = None,
    *,
    sorted_indices: bool = False,
    stream: Any = None,
) -> mx.array:
    lhs_indices, rhs_indices = discrete((lhs_indices, rhs_indices))
    # MLX's own call checks the arguments; where nothing is traced it is the answer.
    out = original(mx, "gather_mm")(
        a, b, lhs_indices, rhs_indices, sorted_indices=sorted_indices, stream=stream
    )
    if (lhs_indices is None and rhs_indices is None) or not _is_ours(out):
        return out
    x = mx.expand_dims(a, 0) if a.ndim == 1 else a
    w = mx.expand_dims(b, 1) if b.ndim == 1 else b
    arrays = [cast(x, out.dtype), cast(w, out.dtype)]
    static = {"op": "gather_mm", "parts": 1, "transpose": False, "quantization": ()}
    y, _ = _gather(arrays, lhs_indices, rhs_indices, [], sorted_indices, static, stream)
    return mx.reshape(y, out.shape) if y.ndim != out.ndim else y


@intercept(mx, "gather_qmm")
def gather_qmm(
    x: mx.array,
    w: mx.array,
    /,
    scales: mx.array,
    biases: mx.array | None = None,
    lhs_indices: mx.array | None = None,
    rhs_indices: mx.array | None = None,
    transpose: bool = True,
    group_size: int | None = None,
    bits: int | None = None,
    mode: str = "affine",
    global_scale: mx.array | None = None,
    *,
    sorted_indices: bool = False,
    stream: Any = None,
) -> mx.array:
    newer = {} if global_scale is None else {"global_scale": global_scale}
    no_indices = lhs_indices is None and rhs_indices is None
    if no_indices and not newer:
        return quantized_matmul(
            x, w, scales, biases, transpose, group_size, bits, mode, stream=stream
        )
    quantization = (group_size, bits, mode)
    indices: tuple[Any, Any] = discrete((lhs_indices, rhs_indices))

    def call() -> tuple[mx.array, list[mx.array]]:
        out = original(mx, "gather_qmm")(
            *(x, w, scales, biases, *indices, transpose, *quantization),
            sorted_indices=sorted_indices,
            stream=stream,
            **newer,
        )
        if no_indices or not _is_ours(out):
            return out, []
        weight = [w, scales] if biases is None else [w, scales, biases]
        if mode == "affine":
            weight[1:] = [cast(p, out.dtype) for p in weight[1:]]
        static = {"op": "gather_qmm", "parts": len(weight), "transpose": transpose}
        static["quantization"] = _quantization(mode, group_size, bits)
        arrays = [cast(x, out.dtype), *weight]
        return _gather(arrays, *indices, list(newer.values()), sorted_indices, static, stream)

    given = [p for p in (x, w, scales, biases, *indices, global_scale) if p is not None]
    there = (biases is None, lhs_indices is None, rhs_indices is None)
    words = ("gather_qmm", transpose, *quantization, sorted_indices, *there)
    return planned(words, given, stream, call)


def gather_qqmm(
    x: mx.array,
    w: mx.array,
    /,
    scales: mx.array | None = None,
    lhs_indices: mx.array | None = None,
    rhs_indices: mx.array | None = None,
    group_size: int | None = None,
    bits: int | None = None,
    mode: str = "nvfp4",
    global_scale_x: mx.array | None = None,
    global_scale_w: mx.array | None = None,
    *,
    sorted_indices: bool = False,
    stream: Any = None,
) -> mx.array:
    indices: tuple[Any, Any] = discrete((lhs_indices, rhs_indices))
    pair = (global_scale_x, global_scale_w)
    out = original(mx, "gather_qqmm")(
        *(x, w, scales, *indices, group_size, bits, mode, *pair),
        sorted_indices=sorted_indices,
        stream=stream,
    )
    if not _is_ours(out):
        return out
    weight = [w] if scales is None else [w, scales]
    static = {"op": "gather_qqmm", "parts": len(weight), "transpose": True}
    static["quantization"] = _quantization(mode, group_size, bits)
    scalars = [p for p in pair if p is not None]
    return _gather([x, *weight], *indices, scalars, sorted_indices, static, stream)[0]


if hasattr(mx, "gather_qqmm"):  # since 0.32
    intercept(mx, "gather_qqmm")(gather_qqmm)


def _is_ours(out: mx.array) -> bool:
    return ("vmap" in levels.active() or has_wrong_derivative(out)) and is_tracer(out)


def _quantization(mode: str, group_size: int | None, bits: int | None) -> tuple[Any, ...]:
    return tuple(parameters(mode, group_size, bits).items())


def _gather(
    arrays: list[mx.array],
    lhs: mx.array | None,
    rhs: mx.array | None,
    scalars: list[mx.array],
    sorted_indices: bool,
    static: dict[str, Any],
    stream: Any,
) -> tuple[mx.array, list[mx.array]]:
    """The product, and the arrays that the primitive was bound to."""
    static["has_lhs"], static["has_rhs"] = lhs is not None, rhs is not None
    # Sorted indices help kernels that meet the rows of x one to one; those of x help none.
    matched = lhs is None and rhs is not None and count_of(arrays[0]) == rhs.size
    static["ordered"] = sorted_indices and matched
    indices = [cast(i, mx.uint32) for i in (lhs, rhs) if i is not None]
    bound = [*arrays, *indices, *scalars]
    return on_stream(stream, bind_gather, *bound, **static)[0], bound
