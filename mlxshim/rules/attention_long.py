"""Attention whose scores would not fit: in blocks, as an operation with rules of its own.

The decomposition holds the scores of all heads and samples of a call, and more than once while it
is differentiated. Where those would take more than a budget of bytes, and no fused kernel is there
to serve the call, forward and backward are done in blocks (attention_blocks.py).
Second derivatives and tangents are decomposed.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import mlx.core as mx

from ..core import levels
from ..core.primitive import Arrays, Axes, Node
from . import _devices
from . import attention_blocks as blocks
from ._folding import sample_shape
from ._opaque import Opaque
from ._partial import jvp_at, not_boolean, vjp_at
from .attention_folds import batch, fold, fold_all, unfold
from .attention_plain import decompose, decompose_vjp

# The budget ------------------------------------------------------------------------------------

#: Bytes of scores in one call, and the part of a GPU's memory that they may take instead. A step of
#: training holds about three times as many for the call at work, and once as many for each layer
#: that waits for its backward pass.
DEFAULT_BUDGET, PART_OF_GPU = 512 << 20, 1 / 16

_budget: ContextVar[float | None] = ContextVar("attention_budget", default=None)
#: What the context says of the budget.
budget = _budget.get


def _default_budget() -> float:
    return _part_of_memory() if _devices.gpu() else DEFAULT_BUDGET


@functools.cache
def _part_of_memory() -> float:
    try:
        info = mx.device_info()
    except (AttributeError, TypeError, RuntimeError):
        info = {}
    size: Any = info.get("memory_size") or info.get("total_memory") or 0
    return max(DEFAULT_BUDGET, size * PART_OF_GPU)


@contextlib.contextmanager
def attention_budget(nbytes: float) -> Iterator[None]:
    """Attention whose scores take more bytes than this is done in blocks, in this context.

    It is a matter of memory and time, not of the result. It holds for
    `mx.fast.scaled_dot_product_attention` where a transform of this library traces it and no fused
    kernel serves it: on a CPU; when training on Metal; on CUDA in float32, or with head dimensions
    that its kernels do not have. The scores are those of all heads and of all samples that are
    mapped, `N * B * H * Lq * Lk` numbers. The default is 512 MiB, on a GPU a sixteenth of its
    memory. What is traced in the context keeps the choice: a function that was compiled outside is
    not compiled again.

    Args:
        nbytes: The most bytes of scores; 0: always in blocks, `math.inf`: never.

    Raises:
        ValueError: `nbytes` is negative or no number.

    Example:
        >>> import mlx.core as mx
        >>> from mlxshim import attention_budget, grad
        >>> q = mx.random.normal((1, 2, 1024, 8))
        >>> def loss(q):
        ...     out = mx.fast.scaled_dot_product_attention(q, q, q, scale=0.3, mask="causal")
        ...     return (out * out).sum()
        >>> with attention_budget(0):
        ...     in_blocks = grad(loss)(q)
        >>> mx.allclose(in_blocks, grad(loss)(q), atol=1e-4).item()
        True
    """
    if not isinstance(nbytes, (int, float)) or not nbytes >= 0:
        raise ValueError(
            f"[attention_budget] takes a number of bytes, 0 or more (math.inf: no limit), "
            f"not {nbytes!r}."
        )
    token = _budget.set(nbytes)
    try:
        yield
    finally:
        _budget.reset(token)


def exceeds_budget(q: mx.array, k: mx.array, stack: Sequence[levels.Kind]) -> bool:
    """Whether blocks are asked for, and able to serve: no tangents, no second derivative."""
    try:
        batch, heads, length, _ = q.shape
        scores = batch * heads * length * k.shape[2] * q.dtype.size
    except (AttributeError, IndexError, ValueError):
        return False  # refused further on
    for level in levels.vmaps():
        scores *= level.size
    limit = budget()
    if scores <= (DEFAULT_BUDGET if limit is None else limit):
        return False
    if limit is None and scores <= _default_budget():
        return False
    return "jvp" not in stack and stack.count("grad") < 2


# The operation ---------------------------------------------------------------------------------


class _InBlocks(Opaque):
    """Under no vmap it is still a node: with the derivative in blocks."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._outside = functools.lru_cache(maxsize=512)(self._build_outside)

    def __call__(self, *arrays: mx.array, **static: Any) -> list[mx.array]:
        vmaps = levels.vmaps()
        if vmaps and vmaps[-1].mapped is not None:
            return super().__call__(*arrays, **static)
        return self._outside(**static)(*arrays)

    def _build_outside(self, **static: Any) -> Callable[..., Any]:
        def vmap(arrays: Arrays, axes: Axes) -> tuple[list[mx.array], list[int]]:
            size = next(x.shape[a] for x, a in zip(arrays, axes) if a is not None)
            outputs = self.batch(size, arrays, axes, **static)
            return outputs, [0] * len(outputs)

        def jvp(primals: Arrays, tangents: Sequence[mx.array | None]) -> list[mx.array]:
            full = [mx.zeros_like(x) if t is None else t for x, t in zip(primals, tangents)]
            return self.jvp(primals, full, (), **static)

        def value(*arrays: mx.array) -> list[mx.array]:
            # mx.jvp pushes tangents through all that lies behind a node, unless it is stopped.
            return self.lowering(*map(mx.stop_gradient, arrays), **static)

        node: Any = Node(value)
        node.vjp(functools.partial(self.vjp, **static))
        node.jvp(jvp)
        node.vmap(vmap)
        return node


def _batch(size: int, arrays: Arrays, axes: Axes, **static: Any) -> list[mx.array]:
    outs, places = batch(attention, size, arrays, axes, **static)
    return [mx.moveaxis(x, axis, 0) if axis else x for x, axis in zip(outs, places)]


def _vjp(primals: Arrays, cotangents: Arrays, outputs: Arrays, **static: Any) -> list[mx.array]:
    given = [*primals, *outputs, cotangents[0]]
    grads = attention_vjp(*given, **static)
    if static["has_mask"]:
        mask = primals[3]
        boolean = mask.dtype == mx.bool_
        grads += [mx.zeros_like(mask)] if boolean else mask_vjp(*given, **static)
    return grads + sinks_vjp(*given, **static) if len(grads) < len(primals) else grads


def _jvp(primals: Arrays, tangents: Arrays, outputs: Arrays, **static: Any) -> list[mx.array]:
    fun = functools.partial(decompose, **static)
    out = jvp_at(fun, primals, not_boolean(primals), tangents)
    return [*out, *_shaped(*primals)[1:]]


def _shaped(q: mx.array, k: mx.array, v: mx.array, *_: mx.array, **__: Any) -> list[mx.array]:
    rows = mx.zeros((*q.shape[:3], 1), blocks.dtype_of_sums(q))
    return [mx.zeros((*q.shape[:3], v.shape[3]), q.dtype), rows, rows]


attention = _InBlocks(
    "attention_in_blocks",
    lowering=blocks.forward,
    batch=_batch,
    vjp=_vjp,
    jvp=_jvp,
    shaped=_shaped,
)

# The backward pass -----------------------------------------------------------------------------


def _fold_with_rows(
    size: int, arrays: Arrays, axes: Axes, has_mask: bool
) -> tuple[list[mx.array], int]:
    """Everything that a backward pass takes, folded, and the dimension it is folded into."""
    *primals, out, top, total, cotangent = arrays
    folded, dim = fold_all(size, primals, axes[:-4], has_mask)
    of_rows = [fold(x, axis, size, dim) for x, axis in zip((out, top, total, cotangent), axes[-4:])]
    return [*folded, *of_rows], dim


def _batch_vjp(size: int, arrays: Arrays, axes: Axes, **static: Any) -> list[mx.array]:
    folded, dim = _fold_with_rows(size, arrays, axes, static["has_mask"])
    grads = [unfold(g, dim, size) for g in attention_vjp(*folded, **static)]
    return [mx.moveaxis(g, dim, 0) if dim else g for g in grads]


def _batch_mask_vjp(size: int, arrays: Arrays, axes: Axes, **static: Any) -> list[mx.array]:
    arrays, axes = list(arrays), list(axes)
    if axes[3] is None:  # each sample has a gradient of its own
        arrays[3], axes[3] = mx.broadcast_to(arrays[3], (size, *arrays[3].shape)), 0
    shape = sample_shape(arrays[3], axes[3])
    folded, dim = _fold_with_rows(size, arrays, axes, True)
    g = mx.moveaxis(unfold(mask_vjp(*folded, **static)[0], dim, size), dim, 0)
    # Folding wrote a mask out for all the sequences or heads that share it.
    full = (1,) * (4 - len(shape)) + shape
    shared = [i + 1 for i, n in enumerate(full) if n == 1]
    g = mx.sum(g, axis=shared, keepdims=True) if shared else g
    return [mx.reshape(g, (size, *shape))]


def _batch_sinks_vjp(size: int, arrays: Arrays, axes: Axes, **static: Any) -> list[mx.array]:
    arrays, axes = list(arrays), list(axes)
    if axes[-5] is None:
        arrays[-5], axes[-5] = mx.broadcast_to(arrays[-5], (size, *arrays[-5].shape)), 0
    folded = _fold_with_rows(size, arrays, axes, static["has_mask"])[0]  # into the heads
    return [unfold(sinks_vjp(*folded, **static)[0], 0, size)]


def _vjp_of_vjp(
    plain: Callable[..., list[mx.array]],
    primals: Arrays,
    cotangents: Arrays,
    outputs: Arrays,
    **static: Any,
) -> list[mx.array]:
    *given, out, top, total, cotangent = primals
    xs = [*given, cotangent]
    places = not_boolean(xs)
    grads = [mx.zeros_like(x) for x in xs]
    for i, g in zip(places, vjp_at(functools.partial(plain, **static), xs, places, cotangents)):
        grads[i] = g
    # What the forward pass gave follows from the primals, whose gradients are whole ones.
    return [*grads[:-1], *(mx.zeros_like(x) for x in (out, top, total)), grads[-1]]


def _jvp_of_vjp(
    plain: Callable[..., list[mx.array]],
    primals: Arrays,
    tangents: Arrays,
    outputs: Arrays,
    **static: Any,
) -> list[mx.array]:
    def own(arrays: Arrays) -> list[mx.array]:
        return [*arrays[:-4], arrays[-1]]

    xs = own(primals)
    return jvp_at(functools.partial(plain, **static), xs, not_boolean(xs), own(tangents))


def _decompose_vjp_of(place: int, *arrays: mx.array, **static: Any) -> list[mx.array]:
    *primals, cotangent = arrays
    return vjp_at(functools.partial(decompose, **static), primals, [place], [cotangent])


def _backward(
    name: str,
    lowering: Callable[..., list[mx.array]],
    rule: Callable[..., list[mx.array]],
    plain: Callable[..., list[mx.array]],
    like: slice,
) -> _InBlocks:
    return _InBlocks(
        name,
        lowering=lowering,
        batch=rule,
        vjp=functools.partial(_vjp_of_vjp, plain),
        jvp=functools.partial(_jvp_of_vjp, plain),
        shaped=lambda *arrays, **_: list(arrays[like]),
    )


attention_vjp = _backward(
    "attention_in_blocks_vjp", blocks.backward, _batch_vjp, decompose_vjp, slice(3)
)
mask_vjp = _backward(
    "attention_in_blocks_mask_vjp",
    blocks.mask_gradient,
    _batch_mask_vjp,
    functools.partial(_decompose_vjp_of, 3),
    slice(3, 4),
)
sinks_vjp = _backward(
    "attention_in_blocks_sinks_vjp",
    blocks.sinks_gradient,
    _batch_sinks_vjp,
    functools.partial(_decompose_vjp_of, -1),
    slice(-5, -4),
)
