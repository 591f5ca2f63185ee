"""Products that MLX's own transforms do not serve: `mx.addmm` and `mx.block_masked_mm`.

    addmm:            Y = alpha * A B + beta * C
    block_masked_mm:  Y = O * ((L * A) (R * B)), each mask one value for a block of 32 or 64 squared

Source: mlx/ops.cpp (shapes and dtypes), mlx/primitives.cpp (`AddMM::vmap`, `BlockMaskedMM::vjp`).

* addmm: MLX's own vmap is right unless C alone is mapped, which it refuses. A C that is in no trace
  (the bias of a model) cannot be; any other becomes a product and a sum. MLX's own jvp leaves out
  alpha and beta (0.31.1 to 0.32.4): there too.
* block_masked_mm, which has no vmap: samples are a leading dimension of whatever is mapped, the
  gradients of all samples MLX's own gradients of that one call. An operand that samples share is
  copied for each where MLX masks it.

matmul, inner, outer, tensordot, einsum, kron and hadamard_transform are right as they are.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from ..core import levels
from ..core.interception import intercept, original
from ..core.primitive import Arrays, Axes, Primitive
from ..core.tracers import is_tracer
from ._constants import constant
from ._folding import aligned, broadcast_shape, front, on_stream, pad_dims
from ._mlx_0_31 import matmul
from ._partial import not_boolean, vjp_at

# addmm -----------------------------------------------------------------------------------------


@intercept(mx, "addmm")
def addmm(
    c: mx.array,
    a: mx.array,
    b: mx.array,
    /,
    alpha: float = 1.0,
    beta: float = 1.0,
    *,
    stream: Any = None,
) -> mx.array:
    stack = levels.active()
    scaled = "jvp" in stack and (alpha != 1 or beta != 1)
    if not scaled and ("vmap" not in stack or not is_tracer(c)):
        return original(mx, "addmm")(c, a, b, alpha, beta, stream=stream)
    # MLX's own call checks the arguments, and tells the shape and dtype.
    out = original(mx, "addmm")(c, a, b, alpha, beta, stream=stream)
    return on_stream(stream, _product_and_sum, c, a, b, alpha, beta, out.dtype)


def _product_and_sum(
    c: mx.array, a: mx.array, b: mx.array, alpha: float, beta: float, dtype: mx.Dtype
) -> mx.array:
    product, c = mx.matmul(a.astype(dtype), b.astype(dtype)), c.astype(dtype)
    if alpha != 1:
        product = product * constant(alpha, dtype)
    return product + (c if beta == 1 else c * constant(beta, dtype))


# block_masked_mm -------------------------------------------------------------------------------


@intercept(mx, "block_masked_mm")
def block_masked_mm(
    a: mx.array,
    b: mx.array,
    /,
    block_size: int = 64,
    mask_out: mx.array | None = None,
    mask_lhs: mx.array | None = None,
    mask_rhs: mx.array | None = None,
    *,
    stream: Any = None,
) -> mx.array:
    given = (mask_out, mask_lhs, mask_rhs)
    out = original(mx, "block_masked_mm")(a, b, block_size, *given, stream=stream)
    stack = levels.active()
    if all(m is None for m in given) or not {"vmap", "jvp"} & {*stack} or not is_tracer(out):
        return out
    row, column = a.ndim == 1, b.ndim == 1
    # What a vector lacks, its masks lack too.
    lacking = ((-2,) * row + (-1,) * column, (-2,) * row, (-1,) * column)
    masks = [
        mx.expand_dims(m, axes) if axes else m for m, axes in zip(given, lacking) if m is not None
    ]
    if any(m.dtype != mx.bool_ for m in masks):
        masks = [m.astype(out.dtype) for m in masks]
    a = mx.expand_dims(a, 0) if row else a
    b = mx.expand_dims(b, 1) if column else b
    static = {"block": block_size, "given": tuple(m is not None for m in given)}
    arrays = [a.astype(out.dtype), b.astype(out.dtype), *masks]
    y = on_stream(stream, _bind, *arrays, **static)[0]
    return mx.reshape(y, out.shape) if row or column else y


def _bind(*arrays: mx.array, **static: Any) -> list[mx.array]:
    if "vmap" in levels.active():
        return masked(*arrays, **static)
    return masked.differentiable(*arrays, **static)  # MLX has no jvp, nor always a right vjp


def _named(masks: Sequence[mx.array], given: tuple[bool, ...]) -> list[mx.array | None]:
    rest = iter(masks)
    return [next(rest) if there else None for there in given]


def _fused(*arrays: mx.array, block: int, given: tuple[bool, ...]) -> list[mx.array]:
    a, b, *masks = _full_operands(*arrays, given=given)
    return [original(mx, "block_masked_mm")(a, b, block, *_named(masks, given))]


def _full_operands(
    a: mx.array, b: mx.array, *masks: mx.array, given: tuple[bool, ...], always: bool = False
) -> list[mx.array]:
    """The arguments with the whole batch where MLX needs it.

    Masks cannot add to the batch of the operands. An operand that is shared and masked has to be
    copied: MLX's CPU kernel masks it in place (0.32.4: wrong numbers for a stride of zero).
    """
    shapes = [x.shape[:-2] for x in (a, b, *masks)]
    batch = broadcast_shape(*shapes)
    if always or given[1] or given[2]:
        a, b = (mx.contiguous(mx.broadcast_to(x, (*batch, *x.shape[-2:]))) for x in (a, b))
    elif batch != broadcast_shape(*shapes[:2]):
        a = mx.broadcast_to(a, (*batch, *a.shape[-2:]))
    return [a, b, *masks]


def _decomposed(*arrays: mx.array, block: int, given: tuple[bool, ...]) -> list[mx.array]:
    a, b, *masks = arrays
    out, lhs, rhs = _named(masks, given)
    a, b = _masked(a, lhs, block), _masked(b, rhs, block)
    batch = broadcast_shape(a.shape[:-2], b.shape[:-2])
    a, b = (mx.broadcast_to(x, (*batch, *x.shape[-2:])) for x in (a, b))
    return [_masked(matmul(a, b), out, block)]


def _masked(x: mx.array, mask: mx.array | None, block: int) -> mx.array:
    if mask is None:
        return x
    # Products with zeros and ones, whose derivatives of any order are right on every version.
    wide = matmul(mask.astype(x.dtype), _repeats(mask.shape[-1], x.shape[-1], block, x.dtype))
    rows = _repeats(mask.shape[-2], x.shape[-2], block, x.dtype)
    return x * mx.swapaxes(matmul(mx.swapaxes(wide, -1, -2), rows), -1, -2)


@functools.lru_cache(maxsize=64)
def _repeats(count: int, length: int, block: int, dtype: mx.Dtype) -> mx.array:
    """(count, length): each of a row's entries `block` times, as a matrix."""
    return mx.array([[i // block == n for i in range(length)] for n in range(count)]).astype(dtype)


def _batch(
    size: int, arrays: Arrays, axes: Axes, **static: Any
) -> tuple[list[mx.array], list[int]]:
    return _bind(*aligned(size, arrays, axes), **static), [0]


def _vjp(primals: Arrays, cotangents: Arrays, outputs: Arrays, **static: Any) -> list[mx.array]:
    # MLX's own second derivatives are wrong; those of the decomposition are not.
    bind = masked_vjp if "vmap" in levels.active() else masked_vjp.differentiable
    found = iter(bind(*primals, cotangents[0], **static))
    return [next(found) if x.dtype != mx.bool_ else mx.zeros_like(x) for x in primals]


def _vjp_by(forward: Any, *arrays: mx.array, **static: Any) -> list[mx.array]:
    """The gradients of the floating arguments."""
    *primals, cotangent = arrays
    fun = functools.partial(forward, **static)
    return vjp_at(fun, primals, not_boolean(primals), [cotangent])


def _fused_vjp(*arrays: mx.array, given: tuple[bool, ...], **static: Any) -> list[mx.array]:
    """An output mask is an operand's mask here, so the operands are copied for this one too."""

    def forward(*xs: mx.array, **static: Any) -> list[mx.array]:
        return _fused(*_full_operands(*xs, given=given, always=True), **static)

    *primals, cotangent = arrays
    return _vjp_by(forward, *primals, mx.contiguous(cotangent), given=given, **static)


def _vjp_batch(
    size: int, arrays: Arrays, axes: Axes, **static: Any
) -> tuple[list[mx.array], list[int]]:
    """All gradients are per sample, so each argument has the mapped axis."""
    full = [front(x, axis, size) for x, axis in zip(arrays, axes)]
    ndim = max(x.ndim for x in full)
    bind = masked_vjp if "vmap" in levels.active() else masked_vjp.differentiable
    grads = bind(*(pad_dims(x, ndim) for x in full), **static)
    floating = [x for x in full[:-1] if x.dtype != mx.bool_]
    return [mx.reshape(g, x.shape) for g, x in zip(grads, floating)], [0] * len(grads)


masked = Primitive(
    "block_masked_mm", decomposition=_decomposed, lowering=_fused, batch=_batch, vjp=_vjp
)
masked_vjp = Primitive(
    "block_masked_mm_vjp",
    decomposition=lambda *arrays, **static: _vjp_by(_decomposed, *arrays, **static),
    lowering=_fused_vjp,
    batch=_vjp_batch,
)
