"""The primitive of experts.py: its decomposition, lowering, batching rule and derivatives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from ..core import levels
from ..core.interception import original
from ..core.primitive import Arrays, Axes, Primitive
from ._folding import (
    broadcast_shape,
    front,
    loop_batch,
    pad_dims,
    sample_ndim,
    sample_shape,
    sum_to,
)
from ._gathered_grad import add_at, gather_grad
from ._matrices import count_of, counting, offset, stack, too_narrow
from ._mlx_0_31 import matmul
from .quantization import affine_gradients, dequantized, requantized


def bind_gather(*arrays: mx.array, **static: Any) -> list[mx.array]:
    stack = levels.active()
    if "vmap" not in stack and has_wrong_derivative(arrays[0]):
        return gather.differentiable(*arrays, **static)
    return gather(*arrays, **static)


def has_wrong_derivative(x: mx.array) -> bool:
    """Whether a derivative is asked for that MLX's own operation on `x` lacks, or has wrong."""
    stack = levels.active()
    return "jvp" in stack or ("grad" in stack and too_narrow(x))


# The decomposition and the lowering ------------------------------------------------------------


class Operands:
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
    o = Operands(arrays, **form)
    if ordered and o.rhs is not None and o.rhs.ndim > 1:
        # MLX's derivative of the sorted form takes rows with one dimension of indices.
        shape = o.rhs.shape
        o.x, o.rhs = stack(o.x), mx.flatten(o.rhs)
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
    transpose: bool,
    quantization: tuple[Any, ...],
    **form: Any,
) -> list[mx.array]:
    o = Operands(arrays, **form)
    lhs, rhs = _full_indices(o)
    weight = [mx.take(stack(p), rhs, axis=0) for p in o.weight]
    x = mx.take(stack(o.x), lhs, axis=0)
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


def _full_indices(o: Operands) -> tuple[mx.array, mx.array]:
    """Both indices, written out and of the shape of the result's batch."""
    lhs = counting(o.x) if o.lhs is None else o.lhs
    rhs = counting(o.weight[0]) if o.rhs is None else o.rhs
    shape = broadcast_shape(lhs.shape, rhs.shape)
    return mx.broadcast_to(lhs, shape), mx.broadcast_to(rhs, shape)


# The batching rule -----------------------------------------------------------------------------


def _batch(
    size: int, arrays: Arrays, axes: Axes, **static: Any
) -> tuple[list[mx.array], list[int]]:
    form = {name: static[name] for name in ("parts", "has_lhs", "has_rhs")}
    o, axis = Operands(arrays, **form), Operands(axes, **form)
    if any(a is not None for a in axis.scalars):
        return loop_batch(bind_gather, size, arrays, axes, **static)
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
        single = sample_shape(o.x, axis.x)[-2] == 1
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
    o.lhs = offset(o.lhs, axis.lhs, size, ndim, count_of(o.x) // size if axis.x is not None else 0)
    o.rhs = offset(o.rhs, axis.rhs, size, ndim, count_of(o.weight[0]) // size if mapped else 0)
    return bind_gather(*o.flat(), **static), [0]


def _more_rows(
    size: int, o: Operands, axis: int, static: dict[str, Any]
) -> tuple[list[mx.array], list[int]]:
    """X alone is mapped."""
    o.x = mx.moveaxis(o.x, axis, -3)  # (A..., S, M, K)
    single = o.x.shape[-2] == 1
    if single and static["ordered"]:  # one index for S rows: the indices stay sorted
        assert o.rhs is not None
        o.rhs = mx.broadcast_to(mx.expand_dims(o.rhs, -1), (*o.rhs.shape, size))
        out = bind_gather(*o.flat(), **static)[0]
        return [out], [out.ndim - 3]
    o.x = mx.flatten(o.x, -3, -2)
    out = bind_gather(*o.flat(), **static)[0]
    return [mx.unflatten(out, -2, (size, -1))], [out.ndim - 2]


def _sort_again(
    size: int, o: Operands, axis: Operands, static: dict[str, Any]
) -> tuple[list[mx.array], list[int]]:
    """Single rows, sorted within each sample: sort the rows of all samples by their index."""
    assert o.rhs is not None
    x, rhs = front(o.x, axis.x, size), front(o.rhs, axis.rhs, size)
    flat = mx.flatten(rhs)
    order = mx.argsort(flat)
    o.x, o.rhs = mx.take(stack(x), order, axis=0), mx.take(flat, order)
    out = mx.take(bind_gather(*o.flat(), **static)[0], mx.argsort(order), axis=0)
    return [mx.reshape(out, (*rhs.shape, *out.shape[-2:]))], [0]


# The derivatives -------------------------------------------------------------------------------


def _vjp(primals: Arrays, cotangents: Arrays, outputs: Arrays, **static: Any) -> list[mx.array]:
    op, transpose = static["op"], static["transpose"]
    if op == "gather_qqmm":
        raise ValueError("[gather_qqmm] has no gradient.")
    form = {name: static[name] for name in ("parts", "has_lhs", "has_rhs")}
    o, cotangent = Operands(primals, **form), cotangents[0]
    lhs, rhs = _full_indices(o)
    back = Operands(primals, **form)
    back.x, back.lhs, back.rhs = cotangent, None, rhs
    if op == "gather_mm":
        back.weight = [mx.swapaxes(o.weight[0], -1, -2)]
    flags = {**static, "has_lhs": False, "has_rhs": True}
    flags["transpose"] = transpose if op == "gather_mm" else not transpose
    of_x = bind_gather(*back.flat(), **flags)[0]
    if o.lhs is None:
        of_x = sum_to(of_x, o.x.shape)
    else:
        of_x = mx.reshape(add_at(of_x, lhs, count=count_of(o.x))[0], o.x.shape)

    grads = [mx.zeros_like(p) for p in primals]
    grads[0] = of_x
    w = o.weight[0]
    if op == "gather_mm" or dict(static["quantization"])["mode"] == "affine":
        indices = [rhs] if o.lhs is None else [lhs, rhs]
        flags = {"count": count_of(w), "ordered": static["ordered"]}
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
        terms += bind_gather(tangents[0], *primals[1:], **static)
    # The packed entries of a quantized matrix have no tangent.
    first = 1 if static["op"] == "gather_mm" else 2
    inexact = first == 1 or dict(static["quantization"])["mode"] == "affine"
    if inexact and any(t is not None for t in tangents[first : 1 + parts]):
        full = list(primals)
        for i in range(first, 1 + parts):
            tangent = tangents[i]
            full[i] = mx.zeros_like(primals[i]) if tangent is None else tangent
        terms += bind_gather(*full, **static)
    return [
        sum(terms[1:], terms[0]) if terms else mx.zeros_like(bind_gather(*primals, **static)[0])
    ]


gather = Primitive(
    "gather_mm", decomposition=_decomposed, lowering=_fused, batch=_batch, vjp=_vjp, jvp=_jvp
)
