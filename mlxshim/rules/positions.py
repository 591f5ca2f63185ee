"""Rotary positions: `mx.fast.rope`.

    y_i = R(scale * (l + offset) / freq_i) x_i       x: (B, ..., L, D)     offset: () or (B,)
                                                     freqs: (dims / 2,), or base^(2 i / dims)

where x_i is the i-th pair of features at position l, and R(t) turns a pair by the angle t. Samples
are further entries of the batch, each with its own offset if it is mapped. A rotation's transpose
turns back, so the backward pass is the same operation with the negative scale; with J the quarter
turn and c the cotangent of y, the angles' gradient is dt_i = <c_i, J y_i>.

MLX's own vmap is right, but decomposed. On CUDA its fused backward writes through the strides of
its cotangent: that of a sum has stride zero, and what comes out is no gradient. So there the rule
serves plain gradients too.

Source: mlx/fast.cpp, mlx/backend/cuda/rope.cu, mlx/backend/metal/rope.cpp; Su et al., "RoFormer",
2021.
"""

from __future__ import annotations

import functools
from typing import Any

import mlx.core as mx

from ..core import levels, native
from ..core.interception import intercept, original
from ..core.primitive import Arrays, Axes, Primitive
from ..core.versions import TWO_TANGENTS_BUG
from . import _devices
from ._constants import constant
from ._folding import is_ours
from .positions_plain import turned

# The call --------------------------------------------------------------------------------------


@intercept(mx.fast, "rope")
def rope(
    a: mx.array,
    dims: int,
    *,
    traditional: bool,
    base: float | None,
    scale: float,
    offset: Any,
    freqs: mx.array | None = None,
    stream: Any = None,
) -> mx.array:
    form = {"traditional": traditional, "base": base, "scale": scale}
    if TWO_TANGENTS_BUG and "jvp" in levels.active():
        _raw(a, dims, **form, offset=offset, freqs=freqs, stream=stream)  # or says what is wrong
        return turned(a, offset, freqs, dims=dims, **form)
    # Without a kernel MLX's own backward pass is shorter: it has the angles of the forward one.
    ours = is_ours(a) and (_devices.gpu() or "grad" not in levels.active())
    if not (ours or _turns_itself()) or not isinstance(offset, (int, mx.array)):
        return _raw(a, dims, **form, offset=offset, freqs=freqs, stream=stream)
    if isinstance(offset, int):
        offset = constant(offset, mx.int32)
    elif offset.ndim and offset.size == 1:
        # CUDA's kernel steps through a vector of offsets, even past the end of one of one.
        offset = mx.squeeze(offset)
    arrays = [a, offset] if freqs is None else [a, offset, freqs]
    if stream is None:
        return _bind(*arrays, dims=dims, **form)
    with mx.stream(stream):
        return _bind(*arrays, dims=dims, **form)


def _raw(*args: Any, **kwargs: Any) -> mx.array:
    return original(mx.fast, "rope")(*args, **kwargs)


def _turns_itself() -> bool:
    """Whether plain gradients must be ours, because MLX's take no cotangent of stride zero."""
    return "grad" in levels.active() and _devices.cuda()


def _bind(*arrays: mx.array, **form: Any) -> mx.array:
    if "vmap" not in levels.active() and _turns_itself():
        return rotation.differentiable(*arrays, **form)[0]
    return rotation(*arrays, **form)[0]


def _fused(
    x: mx.array, offset: mx.array, *freqs: mx.array, dims: int, **form: Any
) -> list[mx.array]:
    return [_raw(x, dims, **form, offset=offset, freqs=freqs[0] if freqs else None)]


# The rules -------------------------------------------------------------------------------------


def _batch(size: int, arrays: Arrays, axes: Axes, **form: Any) -> tuple[list[mx.array], list[int]]:
    if len(arrays) > 2 and axes[2] is not None:
        # The kernels have one set of frequencies: MLX's own operations instead.
        each = native.vmap(functools.partial(_fused, **form), in_axes=tuple(axes))
        return each(*arrays), [0]
    x, offset, *freqs = arrays
    if axes[0] is None:  # a kernel that writes through its input's strides wants them its own
        x = mx.contiguous(mx.broadcast_to(x, (size, *x.shape)))
    elif axes[0]:
        x = mx.moveaxis(x, axes[0], 0)
    batch = x.shape[1]
    if axes[1] is not None:
        offset = mx.reshape(mx.moveaxis(offset, axes[1], 0), (size, -1))
    if x.ndim == 4 and offset.size == (1 if axes[1] is None else size):
        # The entries of a sample turn alike: as heads they share what the kernel computes.
        offset = offset if axes[1] is None else mx.flatten(offset)
        return [_bind(x, offset, *freqs, **form)], [0]
    if offset.size > 1:  # one for each entry of the batch
        offset = mx.flatten(mx.broadcast_to(offset, (size, batch)))
    y = _bind(mx.flatten(x, 0, 1), offset, *freqs, **form)
    return [mx.unflatten(y, 0, (size, batch))], [0]


def _vjp(
    primals: Arrays, cotangents: Arrays, outputs: Arrays, *, scale: float, **form: Any
) -> list[mx.array]:
    _, offset, *freqs = primals
    cotangent = cotangents[0]
    if _devices.cuda():
        cotangent = _dense(cotangent)
    dx = _bind(cotangent, offset, *freqs, scale=-scale, **form)
    still = mx.zeros_like(offset) if offset.ndim else constant(0, offset.dtype)
    if not freqs:
        return [dx, still]
    turned = _wedge(outputs[0], cotangent, form["dims"], form["traditional"])
    return [dx, still, _of_freqs(turned, offset, freqs[0], scale)]


def _dense(x: mx.array) -> mx.array:
    """`x` with memory of its own for every entry, which the kernel then writes through.

    Heads mostly lie next to each other at every position, as a projection has them. An array that
    does is left as it is, and so is what is made of it.
    """
    return mx.swapaxes(mx.contiguous(mx.swapaxes(x, -3, -2)), -3, -2)


def _wedge(y: mx.array, c: mx.array, dims: int, traditional: bool) -> mx.array:
    """<c, J y> of every pair, (..., L, dims / 2)."""
    if traditional:
        first, second = slice(0, dims, 2), slice(1, dims, 2)
    else:
        first, second = slice(0, dims // 2), slice(dims // 2, dims)
    y, c = y.astype(mx.float32), c.astype(mx.float32)
    return c[..., second] * y[..., first] - c[..., first] * y[..., second]


def _of_freqs(turned: mx.array, offset: mx.array, freqs: mx.array, scale: float) -> mx.array:
    """The gradient of the angles, scale * (l + offset) / freq, brought to the frequencies."""
    steps = mx.expand_dims(offset, -1) + mx.arange(turned.shape[-2], dtype=mx.float32)  # (B, L)
    by_entry = mx.sum(turned, axis=tuple(range(1, turned.ndim - 2)))  # (B, L, dims / 2)
    total = mx.sum(by_entry * mx.expand_dims(steps, -1), axis=(0, 1))
    return (total * (-scale / mx.square(freqs.astype(mx.float32)))).astype(freqs.dtype)


# As of the norms, the value in a trace is MLX's own node.
rotation = Primitive("rope", decomposition=_fused, lowering=_fused, batch=_batch, vjp=_vjp)
