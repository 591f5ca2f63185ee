"""Products with gathered matrices: `mx.gather_mm`, `mx.gather_qmm`, `mx.gather_qqmm`, and
`mx.segmented_mm`.

    Y[i] = X[lhs[i]] W[rhs[i]]        X: (A..., M, K)   W: (E..., K, N)   Y: (I..., M, N)

lhs and rhs hold flat indices into A... and E...; one that is not given counts them, and the two
broadcast. In a mixture of experts W are the experts and rhs is the routing. gather_qmm has a
quantized W (see quantized.py), gather_qqmm quantizes X as well.

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
* segmented_mm: X or W mapped alone are further rows or columns; otherwise samples follow one
  another along the contraction, offset in the segments.
* a mapped global scale: a loop over samples of fused calls.

As long as only activations and indices are mapped no weight is copied or dequantized. The
decomposition, which copies a matrix for each index, is evaluated only if an argument is a tracer of
`grad` or `mx.compile` but nothing is mapped after all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from ..core import levels, native
from ..core.interception import intercept, original
from ..core.primitive import Arrays, Axes, Primitive
from ._mlx_0_31 import matmul
from ._tracers import is_tracer
from .quantized import (
    affine_gradients,
    broadcast_shape,
    dequantized,
    front,
    loop_batch,
    on_stream,
    pad_dims,
    parameters,
    quantized_matmul,
    requantized,
    sample_ndim,
    sum_to,
)

# The calls -------------------------------------------------------------------------------------


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
    # MLX's own call checks the arguments; where nothing is traced it is the answer.
    out = original(mx, "gather_mm")(
        a, b, lhs_indices, rhs_indices, sorted_indices=sorted_indices, stream=stream
    )
    if (lhs_indices is None and rhs_indices is None) or not _is_ours(out):
        return out
    x = mx.expand_dims(a, 0) if a.ndim == 1 else a
    w = mx.expand_dims(b, 1) if b.ndim == 1 else b
    arrays = [x.astype(out.dtype), w.astype(out.dtype)]
    static = {"op": "gather_mm", "parts": 1, "transpose": False, "quantization": ()}
    y = _gather(arrays, lhs_indices, rhs_indices, [], sorted_indices, static, stream)
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
    indices = (lhs_indices, rhs_indices)
    out = original(mx, "gather_qmm")(
        *(x, w, scales, biases, *indices, transpose, *quantization),
        sorted_indices=sorted_indices,
        stream=stream,
        **newer,
    )
    if no_indices or not _is_ours(out):
        return out
    weight = [w, scales] if biases is None else [w, scales, biases]
    if mode == "affine":
        weight[1:] = [p.astype(out.dtype) for p in weight[1:]]
    static = {"op": "gather_qmm", "parts": len(weight), "transpose": transpose}
    static["quantization"] = _quantization(mode, group_size, bits)
    arrays = [x.astype(out.dtype), *weight]
    return _gather(arrays, *indices, list(newer.values()), sorted_indices, static, stream)


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
    indices, pair = (lhs_indices, rhs_indices), (global_scale_x, global_scale_w)
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
    return _gather([x, *weight], *indices, scalars, sorted_indices, static, stream)


if hasattr(mx, "gather_qqmm"):  # since 0.32
    intercept(mx, "gather_qqmm")(gather_qqmm)


def _is_ours(out: mx.array) -> bool:
    stack = levels.active()
    return ("vmap" in stack or "jvp" in stack) and is_tracer(out)


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
) -> mx.array:
    static["has_lhs"], static["has_rhs"] = lhs is not None, rhs is not None
    # Sorted indices help kernels that meet the rows of x one to one; those of x help none.
    matched = lhs is None and rhs is not None and _count(arrays[0]) == rhs.size
    static["ordered"] = sorted_indices and matched
    indices = [i.astype(mx.uint32) for i in (lhs, rhs) if i is not None]
    return on_stream(stream, _bind, *arrays, *indices, *scalars, **static)[0]


def _bind(*arrays: mx.array, **static: Any) -> list[mx.array]:
    stack = levels.active()
    if "jvp" in stack and "vmap" not in stack:  # which MLX's own operation lacks
        return gather.differentiable(*arrays, **static)
    return gather(*arrays, **static)


# The decomposition and the lowering ------------------------------------------------------------


class _Operands:
    """The arguments of one call (or their axes), by name."""

    def __init__(
        self, values: Sequence[Any], parts: int, has_lhs: bool, has_rhs: bool, **_: Any
    ) -> None:
        self.x = values[0]
        self.weight = list(values[1 : 1 + parts])
        rest = list(values[1 + parts :])
        self.lhs = rest.pop(0) if has_lhs else None
        self.rhs = rest.pop(0) if has_rhs else None
        self.scalars = rest

    def flat(self) -> list[Any]:
        indices = [i for i in (self.lhs, self.rhs) if i is not None]
        return [self.x, *self.weight, *indices, *self.scalars]


def _fused(
    *arrays: mx.array,
    op: str,
    ordered: bool,
    transpose: bool,
    quantization: tuple[Any, ...],
    **form: Any,
) -> list[mx.array]:
    o = _Operands(arrays, **form)
    if ordered and o.rhs is not None and o.rhs.ndim > 1:
        # MLX's derivative of the sorted form takes rows with one dimension of indices.
        shape = o.rhs.shape
        o.x, o.rhs = _stack(o.x), mx.flatten(o.rhs)
        static = {"op": op, "ordered": True, "transpose": transpose, "quantization": quantization}
        out = _fused(*o.flat(), **static, **form)[0]
        return [mx.reshape(out, (*shape, *out.shape[-2:]))]
    fun, indices = original(mx, op), {"lhs_indices": o.lhs, "rhs_indices": o.rhs}
    if op == "gather_mm":
        return [fun(o.x, o.weight[0], **indices, sorted_indices=ordered)]
    options: dict[str, Any] = {**indices, **dict(quantization), "sorted_indices": ordered}
    if op == "gather_qmm":
        names = ["global_scale"]
        options["transpose"] = transpose
    else:
        names = ["global_scale_x", "global_scale_w"]
    return [fun(o.x, *o.weight, **options, **dict(zip(names, o.scalars)))]


def _decomposed(
    *arrays: mx.array,
    op: str,
    ordered: bool,
    transpose: bool,
    quantization: tuple[Any, ...],
    **form: Any,
) -> list[mx.array]:
    o = _Operands(arrays, **form)
    lhs, rhs = _full_indices(o)
    weight = [mx.take(_stack(p), rhs, axis=0) for p in o.weight]
    x = mx.take(_stack(o.x), lhs, axis=0)
    if op == "gather_qqmm":
        pair = o.scalars or [None, None]
        static = dict(quantization)
        x = requantized(x, pair[0], **static)
        if len(weight) == 1:
            w = requantized(weight[0], pair[1], **static)
        else:
            w = dequantized(*weight, *o.scalars[1:], dtype=x.dtype, **static)
    elif op == "gather_qmm":
        w = dequantized(*weight, *o.scalars, dtype=x.dtype, **dict(quantization))
    else:
        w = weight[0]
    return [matmul(x, mx.swapaxes(w, -1, -2) if transpose else w)]


def _stack(x: mx.array) -> mx.array:
    """(A..., M, K) -> (A, M, K)"""
    return mx.reshape(x, (_count(x), *x.shape[-2:])) if x.ndim != 3 else x


def _count(x: mx.array) -> int:
    return math.prod(x.shape[:-2])


def _full_indices(o: _Operands) -> tuple[mx.array, mx.array]:
    """Both indices, written out and of the shape of the result's batch."""
    lhs = _counting(o.x) if o.lhs is None else o.lhs
    rhs = _counting(o.weight[0]) if o.rhs is None else o.rhs
    shape = broadcast_shape(lhs.shape, rhs.shape)
    return mx.broadcast_to(lhs, shape), mx.broadcast_to(rhs, shape)


def _counting(x: mx.array) -> mx.array:
    return mx.reshape(mx.arange(_count(x), dtype=mx.uint32), x.shape[:-2])


# The batching rule -----------------------------------------------------------------------------


def _batch(
    size: int, arrays: Arrays, axes: Axes, **static: Any
) -> tuple[list[mx.array], list[int]]:
    form = {name: static[name] for name in ("parts", "has_lhs", "has_rhs")}
    o, axis = _Operands(arrays, **form), _Operands(axes, **form)
    if any(a is not None for a in axis.scalars):
        return loop_batch(_bind, size, arrays, axes, **static)
    routed = axis.lhs is not None or axis.rhs is not None
    mapped = any(a is not None for a in axis.weight)
    if not routed and not mapped:
        return _more_rows(size, o, axis.x, static)

    # The number of dimensions of the indices of one sample.
    lhs_ndim = sample_ndim(o.x, axis.x) - 2 if o.lhs is None else sample_ndim(o.lhs, axis.lhs)
    rhs_ndim = (
        sample_ndim(o.weight[0], axis.weight[0]) - 2
        if o.rhs is None
        else sample_ndim(o.rhs, axis.rhs)
    )
    ndim = max(lhs_ndim, rhs_ndim)
    if static["ordered"]:
        single = _sample_shape(o.x, axis.x)[-2] == 1
        if single and not mapped:
            return _sort_again(size, o, axis, static)
        # The indices of all samples are in order only if each has experts of its own.
        static["ordered"] = mapped and axis.x is not None
    if axis.x is not None:
        o.x = front(o.x, axis.x, size)
        o.x = pad_dims(o.x, ndim + 3) if o.lhs is None else o.x
    if mapped:
        o.weight = [mx.contiguous(front(p, a, size)) for p, a in zip(o.weight, axis.weight)]
        if o.rhs is None:
            o.weight = [pad_dims(p, ndim + 3) for p in o.weight]
    o.lhs = _offset(o.lhs, axis.lhs, size, ndim, _count(o.x) // size if axis.x is not None else 0)
    o.rhs = _offset(o.rhs, axis.rhs, size, ndim, _count(o.weight[0]) // size if mapped else 0)
    return _bind(*o.flat(), **static), [0]


def _more_rows(
    size: int, o: _Operands, axis: int, static: dict[str, Any]
) -> tuple[list[mx.array], list[int]]:
    """X alone is mapped."""
    o.x = mx.moveaxis(o.x, axis, -3)  # (A..., S, M, K)
    single = o.x.shape[-2] == 1
    if single and static["ordered"]:  # one index for S rows: the indices stay sorted
        assert o.rhs is not None
        o.rhs = mx.broadcast_to(mx.expand_dims(o.rhs, -1), (*o.rhs.shape, size))
        out = _bind(*o.flat(), **static)[0]
        return [out], [out.ndim - 3]
    o.x = mx.flatten(o.x, -3, -2)
    out = _bind(*o.flat(), **static)[0]
    return [mx.unflatten(out, -2, (size, -1))], [out.ndim - 2]


def _sort_again(
    size: int, o: _Operands, axis: _Operands, static: dict[str, Any]
) -> tuple[list[mx.array], list[int]]:
    """Single rows, sorted within each sample: sort the rows of all samples by their index."""
    assert o.rhs is not None
    x, rhs = front(o.x, axis.x, size), front(o.rhs, axis.rhs, size)
    flat = mx.flatten(rhs)
    order = mx.argsort(flat)
    o.x, o.rhs = mx.take(_stack(x), order, axis=0), mx.take(flat, order)
    out = mx.take(_bind(*o.flat(), **static)[0], mx.argsort(order), axis=0)
    return [mx.reshape(out, (*rhs.shape, *out.shape[-2:]))], [0]


def _offset(
    indices: mx.array | None, axis: int | None, size: int, ndim: int, step: int
) -> mx.array | None:
    """The indices of all samples, those of sample n into the n-th `step` matrices."""
    if indices is None or (axis is None and step == 0):
        return indices
    indices = pad_dims(
        mx.expand_dims(indices, 0) if axis is None else front(indices, axis, 0), 1 + ndim
    )
    if step == 0:
        return indices
    starts = mx.arange(0, size * step, step, dtype=mx.uint32)
    return indices + mx.reshape(starts, (size, *(1,) * ndim))


def _sample_shape(x: mx.array, axis: int | None) -> tuple[int, ...]:
    return tuple(n for i, n in enumerate(x.shape) if i != axis)


# The derivatives -------------------------------------------------------------------------------


def _vjp(primals: Arrays, cotangents: Arrays, outputs: Arrays, **static: Any) -> list[mx.array]:
    op, transpose = static["op"], static["transpose"]
    if op == "gather_qqmm":
        raise ValueError("[gather_qqmm] has no gradient.")
    form = {name: static[name] for name in ("parts", "has_lhs", "has_rhs")}
    o, cotangent = _Operands(primals, **form), cotangents[0]
    lhs, rhs = _full_indices(o)
    back = _Operands(primals, **form)
    back.x, back.lhs, back.rhs = cotangent, None, rhs
    if op == "gather_mm":
        back.weight = [mx.swapaxes(o.weight[0], -1, -2)]
    flags = {**static, "has_lhs": False, "has_rhs": True}
    flags["transpose"] = transpose if op == "gather_mm" else not transpose
    of_x = _bind(*back.flat(), **flags)[0]
    if o.lhs is None:
        of_x = sum_to(of_x, o.x.shape)
    else:
        of_x = mx.reshape(add_at(of_x, lhs, count=_count(o.x))[0], o.x.shape)

    grads = [mx.zeros_like(p) for p in primals]
    grads[0] = of_x
    w = o.weight[0]
    if op == "gather_mm" or dict(static["quantization"])["mode"] == "affine":
        indices = [rhs] if o.lhs is None else [lhs, rhs]
        flags = {"count": _count(w), "ordered": static["ordered"]}
        of_w = gather_grad(o.x, cotangent, *indices, **flags)[0]
        if transpose:
            of_w = mx.swapaxes(of_w, -1, -2)
        of_w = mx.reshape(of_w, (*w.shape[:-2], *of_w.shape[-2:]))
        if op == "gather_mm":
            grads[1] = of_w
        else:
            grads[2:4] = affine_gradients(of_w, *o.weight, **dict(static["quantization"]))
    return grads


def _jvp(primals: Arrays, tangents: Sequence[mx.array | None], **static: Any) -> list[mx.array]:
    """Y is linear in X, and linear in W or its scales and biases."""
    parts = static["parts"]
    terms: list[mx.array] = []
    if static["op"] == "gather_qqmm":
        raise ValueError("[gather_qqmm] has no forward derivative.")
    if tangents[0] is not None:
        terms += _bind(tangents[0], *primals[1:], **static)
    # The packed entries of a quantized matrix have no tangent.
    first = 1 if static["op"] == "gather_mm" else 2
    inexact = first == 1 or dict(static["quantization"])["mode"] == "affine"
    if inexact and any(t is not None for t in tangents[first : 1 + parts]):
        full = list(primals)
        for i in range(first, 1 + parts):
            tangent = tangents[i]
            full[i] = mx.zeros_like(primals[i]) if tangent is None else tangent
        terms += _bind(*full, **static)
    return [sum(terms[1:], terms[0]) if terms else mx.zeros_like(_bind(*primals, **static)[0])]


gather = Primitive(
    "gather_mm", decomposition=_decomposed, lowering=_fused, batch=_batch, vjp=_vjp, jvp=_jvp
)


# The gradient with respect to W: sums of X[lhs[i]]^T dY[i] over the i with one rhs[i] -----------


def _grad_fused(
    x: mx.array, cotangent: mx.array, *indices: mx.array, count: int, ordered: bool
) -> list[mx.array]:
    lhs, rhs = indices[0] if len(indices) == 2 else None, indices[-1]
    w = mx.broadcast_to(mx.zeros((), x.dtype), (count, x.shape[-1], cotangent.shape[-1]))
    # The sorted form ends in a segmented product, which has no derivative.
    if levels.active():
        ordered = False
    if ordered:
        x, cotangent, rhs = _stack(x), _stack(cotangent), mx.flatten(rhs)

    def product(w: mx.array) -> mx.array:
        return original(mx, "gather_mm")(x, w, lhs, rhs, sorted_indices=ordered)

    return native.vjp(product, [w], [cotangent])[1]


def _grad_decomposed(
    x: mx.array, cotangent: mx.array, *indices: mx.array, count: int, ordered: bool
) -> list[mx.array]:
    rhs = indices[-1]
    if len(indices) == 2:
        x = mx.take(_stack(x), indices[0], axis=0)
    elif x.shape[:-2] != rhs.shape:
        x = mx.broadcast_to(x, (*rhs.shape, *x.shape[-2:]))
    terms = matmul(mx.swapaxes(_stack(x), -1, -2), _stack(cotangent))
    return _add_at_decomposed(terms, mx.flatten(rhs), count=count)


def _grad_batch(
    size: int, arrays: Arrays, axes: Axes, *, count: int, ordered: bool
) -> tuple[list[mx.array], list[int]]:
    x, cotangent, *indices = arrays
    x_axis, c_axis, *index_axes = axes
    ndim = sample_ndim(cotangent, c_axis) - 2
    x = front(x, x_axis, size)
    if len(indices) == 1:
        x = pad_dims(x, ndim + 3)
    steps = [_count(x) // size, count][-len(indices) :]
    indices = [_offset(i, a, size, ndim, n) for i, a, n in zip(indices, index_axes, steps)]
    cotangent = front(cotangent, c_axis, size)
    out = gather_grad(
        x, cotangent, *(i for i in indices if i is not None), count=size * count, ordered=ordered
    )[0]
    return [mx.unflatten(out, 0, (size, count))], [0]


gather_grad = Primitive(
    "gather_mm_grad", decomposition=_grad_decomposed, lowering=_grad_fused, batch=_grad_batch
)


# Sums of matrices with one index, the transpose of taking matrices ------------------------------


def _add_at_fused(x: mx.array, indices: mx.array, *, count: int) -> list[mx.array]:
    return [mx.zeros((count, *x.shape[-2:]), x.dtype).at[indices].add(x)]


def _add_at_decomposed(x: mx.array, indices: mx.array, *, count: int) -> list[mx.array]:
    # A product with zeros and ones: a scatter has no right vmap before 0.32.
    rows = mx.expand_dims(mx.arange(count, dtype=mx.uint32), -1)
    chosen = (rows == mx.expand_dims(mx.flatten(indices), 0)).astype(x.dtype)
    flat = mx.reshape(x, (-1, x.shape[-2] * x.shape[-1]))
    return [mx.reshape(matmul(chosen, flat), (count, *x.shape[-2:]))]


def _add_at_batch(
    size: int, arrays: Arrays, axes: Axes, *, count: int
) -> tuple[list[mx.array], list[int]]:
    x, indices = front(arrays[0], axes[0], size), arrays[1]
    ndim = x.ndim - 3
    indices = _offset(indices, axes[1], size, ndim, count)
    assert indices is not None
    return [mx.unflatten(add_at(x, indices, count=size * count)[0], 0, (size, count))], [0]


add_at = Primitive(
    "add_at", decomposition=_add_at_decomposed, lowering=_add_at_fused, batch=_add_at_batch
)


# segmented_mm ----------------------------------------------------------------------------------
#
#     Y[i] = X[:, s_i:e_i] W[s_i:e_i, :]      X: (M, K)   W: (K, N)   segments: (..., 2)


@intercept(mx, "segmented_mm")
def segmented_mm(
    a: mx.array, b: mx.array, /, segments: mx.array, *, stream: Any = None
) -> mx.array:
    out = original(mx, "segmented_mm")(a, b, segments, stream=stream)
    # MLX has no derivative either; the decomposition's serves wherever one is traced.
    if not levels.active() or not is_tracer(out):
        return out
    arrays = [a.astype(out.dtype), b.astype(out.dtype), segments.astype(mx.uint32)]
    return on_stream(stream, _bind_segmented, *arrays)[0]


def _bind_segmented(*arrays: mx.array) -> list[mx.array]:
    return segmented(*arrays) if "vmap" in levels.active() else segmented.differentiable(*arrays)


def _segmented_decomposed(a: mx.array, b: mx.array, segments: mx.array) -> list[mx.array]:
    steps = mx.arange(a.shape[1], dtype=mx.uint32)
    ends = mx.reshape(segments, (-1, 2))
    inside = (steps >= ends[:, :1]) & (steps < ends[:, 1:])
    rows = mx.expand_dims(a, 0) * mx.expand_dims(inside.astype(a.dtype), 1)  # (I, M, K)
    out = matmul(mx.flatten(rows, 0, 1), b)
    return [mx.reshape(out, (*segments.shape[:-1], a.shape[0], b.shape[1]))]


def _segmented_batch(size: int, arrays: Arrays, axes: Axes) -> tuple[list[mx.array], list[int]]:
    a, b, segments = arrays
    a_axis, b_axis, s_axis = axes
    if b_axis is None and s_axis is None:
        rows = mx.flatten(front(a, a_axis, size), 0, 1)
        out = _bind_segmented(rows, b, segments)[0]
        return [mx.unflatten(out, -2, (size, -1))], [out.ndim - 2]
    if a_axis is None and s_axis is None:
        assert b_axis is not None
        columns = mx.flatten(mx.moveaxis(b, b_axis, 1), 1, 2)
        out = _bind_segmented(a, columns, segments)[0]
        return [mx.unflatten(out, -1, (size, -1))], [out.ndim - 1]
    if a_axis is None and b_axis is None:
        return _bind_segmented(a, b, front(segments, s_axis, size)), [0]
    b = front(b, b_axis, size)
    length = b.shape[1]
    a = mx.moveaxis(front(a, a_axis, size), 0, 1)  # (M, S, K)
    starts = mx.arange(0, size * length, length, dtype=mx.uint32)
    ends = mx.minimum(front(segments, s_axis, size), mx.array(length, mx.uint32))
    ends = ends + mx.reshape(starts, (size, *(1,) * (ends.ndim - 1)))
    return _bind_segmented(mx.flatten(a, 1, 2), mx.flatten(b, 0, 1), ends), [0]


segmented = Primitive(
    "segmented_mm",
    decomposition=_segmented_decomposed,
    lowering=lambda *arrays: [original(mx, "segmented_mm")(*arrays)],
    batch=_segmented_batch,
)
