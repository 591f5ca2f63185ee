"""The nodes that a tape records: the calls of known layers, and the copies of parameters.

A call is a node of (copy, x, weight, seed) that the tape's vmap is certain to map. Its batching
rule is one node of all samples, whose vjp rule writes into the tape what the gradient is made of
(`_tape.py`). Inside a gradient that is inside the loss, the copy stands for the parameter.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from ..core import native
from ..core.opaque import after, copies
from ..core.plans import placeholder
from ..core.primitive import Arrays, Axes, Node, full
from ..rules import norms
from ..rules._sums import sums_of_rows

if TYPE_CHECKING:
    from ._tape import Parameter, Tape

# Which tape runs in this thread ----------------------------------------------------------------


class _Tapes(threading.local):
    def __init__(self) -> None:
        self.stack: list[Tape] = []


_tapes = _Tapes()


def depth() -> int:
    return len(_tapes.stack)


@contextmanager
def entered(tape: Tape) -> Iterator[None]:
    _tapes.stack.append(tape)
    try:
        yield
    finally:
        _tapes.stack.pop()


def running() -> Tape | None:
    """The innermost tape that runs."""
    stack = _tapes.stack
    return stack[-1] if stack else None


def _recorded(depth: int, index: int) -> Parameter | None:
    """The parameter, unless somebody differentiates what was recorded once more."""
    stack = _tapes.stack
    return stack[depth].parameters[index] if len(stack) == depth + 1 else None


# In order --------------------------------------------------------------------------------------
#
# MLX evaluates what nothing waits for last of all. The values of the losses are small and made of
# logits: they come first, and the backward pass begins when they are there. What is made of a
# cotangent and of what a layer was given frees both: before the next layer's cotangent is used.


def _surprise(seed: mx.array, cotangent: mx.array, _: Any) -> mx.array:
    tape = running()
    assert tape is not None
    tape.surprised = True
    return cotangent


#: What waits for it has a cotangent: so has it, zeros.
guard: Any = Node(lambda seed: seed)
guard.vjp(_surprise)


values_first: Any = Node(lambda losses: losses)
values_first.vjp(lambda losses, cotangent, _: after([cotangent], [losses])[0])


# The nodes -------------------------------------------------------------------------------------
#
# Of each parameter, for all runs: building them costs more than calling them.
#
# While a tape records, only the gradient of what a layer was given goes anywhere: nobody asks for
# the seed's and the parameter's, and anything of their shape stands in for them. They are there in
# full for whoever differentiates once more what was recorded, which finds no tape.


def _layer_node(
    shaped: Callable[..., list[mx.array]],
    recorded: Any,
    vjp: Callable[[Arrays, Arrays, Arrays], list[mx.array]],
    jvp: Callable[[Arrays, Arrays], list[mx.array]],
) -> Any:
    """A node of (copy, x, weight, seed), which ends as the node `recorded` of all samples.

    The tape maps the copy for certain, so that the rule runs whatever x is. `shaped` is a value of
    no meaning.
    """

    def batch(arrays: Arrays, axes: Axes) -> tuple[list[mx.array], list[int]]:
        copy, x, weight, seed = arrays
        axis = axes[1]
        if axis:
            x = mx.moveaxis(x, axis, 0)
        if axes[0] is None:
            # Another vmap, inside the loss: its axis is one more of rows.
            return node(copy, x, weight, seed), [0]
        if axis is None:
            x = copies(x, copy.shape[axes[0]])
        return [recorded(x, weight, seed)], [0]

    node: Any = Node(shaped)
    node.vmap(batch)
    node.vjp(vjp)
    node.jvp(lambda primals, tangents: jvp(primals, full(primals, tangents)))
    return node


class _Nodes:
    def __init__(self, depth: int, index: int) -> None:
        self.depth, self.index = depth, index

    @functools.cached_property
    def product(self) -> Any:
        recorded: Any = Node(lambda x, weight, seed: mx.matmul(x, mx.swapaxes(weight, 0, 1)))
        recorded.vjp(self._record_product)
        return _layer_node(_shape_of_product, recorded, _product_vjp, _product_jvp)

    @functools.cached_property
    def lookup(self) -> Any:
        recorded: Any = Node(lambda ids, weight, seed: mx.take(weight, ids, axis=0))
        recorded.vjp(self._record_lookup)
        return _layer_node(_shape_of_lookup, recorded, _lookup_vjp, _lookup_jvp)

    @functools.cached_property
    def scaled(self) -> Any:
        recorded: Any = Node(lambda x, weight, seed: x * weight)
        recorded.vjp(self._record_scaled)
        return _layer_node(_shape_of_scaled, recorded, _scaled_vjp, _scaled_jvp)

    @functools.cached_property
    def shifted(self) -> Any:
        recorded: Any = Node(lambda x, bias, seed: x + bias)
        recorded.vjp(self._record_shifted)
        return _layer_node(_shape_of_shifted, recorded, _shifted_vjp, _shifted_jvp)

    def _record_product(self, primals: Arrays, cotangent: mx.array, _: Any) -> list[mx.array]:
        x, weight, seed = primals
        parameter = _recorded(self.depth, self.index)
        if parameter is not None:
            cotangent = parameter.in_order(cotangent)
            parameter.add_product(x, cotangent)
            return [_as(mx.matmul(cotangent, weight), x.dtype), weight, seed]
        rows, flat = rows_of(x, 0).astype(cotangent.dtype), rows_of(cotangent, 0)
        dweight = mx.matmul(mx.swapaxes(flat, 0, 1), rows).astype(weight.dtype)
        return [mx.matmul(cotangent, weight).astype(x.dtype), dweight, mx.zeros_like(seed)]

    def _record_lookup(self, primals: Arrays, cotangent: mx.array, _: Any) -> list[mx.array]:
        ids, weight, seed = primals
        parameter = _recorded(self.depth, self.index)
        if parameter is not None:
            rows = mx.reshape(ids, (ids.shape[0], -1))
            parameter.lookups.append((rows, rows_of(cotangent, 1)))
            return [ids, weight, seed]
        dweight = mx.zeros_like(weight).at[ids].add(cotangent.astype(weight.dtype))
        return [mx.zeros_like(ids), dweight, mx.zeros_like(seed)]

    def _record_scaled(self, primals: Arrays, cotangent: mx.array, _: Any) -> list[mx.array]:
        x, weight, seed = primals
        parameter = _recorded(self.depth, self.index)
        if parameter is not None:
            cotangent = parameter.in_order(cotangent)
            parameter.add_scale(x, cotangent)
            return [(cotangent * weight).astype(x.dtype), weight, seed]
        dweight = mx.sum(rows_of(cotangent * x, 0), axis=0).astype(weight.dtype)
        return [(cotangent * weight).astype(x.dtype), dweight, mx.zeros_like(seed)]

    def _record_shifted(self, primals: Arrays, cotangent: mx.array, _: Any) -> list[mx.array]:
        x, bias, seed = primals
        parameter = _recorded(self.depth, self.index)
        if parameter is not None:
            cotangent = parameter.in_order(cotangent)
            parameter.add_rows(sums_of_rows(cotangent))
            return [cotangent.astype(x.dtype), bias, seed]
        dbias = mx.sum(rows_of(cotangent, 0), axis=0).astype(bias.dtype)
        return [cotangent.astype(x.dtype), dbias, mx.zeros_like(seed)]

    @functools.cache  # noqa: B019  (as long-lived as the nodes)
    def norm(self, name: str, eps: float) -> Any:
        fused = functools.partial(normalised, name=name, eps=eps)
        backward = functools.partial(norms.backward, name=name, eps=eps)

        def record(primals: Arrays, cotangent: mx.array, _: Any) -> list[mx.array]:
            x, weight, seed = primals
            parameter = _recorded(self.depth, self.index)
            if parameter is not None:
                cotangent = parameter.in_order(cotangent)
                parameter.add_scale(fused(x, None), cotangent)
                if norms.takes_weight(name):
                    dx = of_both(x, weight, cotangent)[0]
                else:
                    (dx,) = backward(x, None, (cotangent * weight).astype(x.dtype))
                return [dx, weight, seed]
            return [*of_both(x, weight, cotangent), mx.zeros_like(seed)]

        def of_both(x: mx.array, weight: mx.array, cotangent: mx.array) -> list[mx.array]:
            dtype = cotangent.dtype  # which both are cast to
            dx, dweight = backward(x.astype(dtype), weight.astype(dtype), cotangent)
            return [dx.astype(x.dtype), dweight.astype(weight.dtype)]

        def vjp_of_copy(primals: Arrays, cotangents: Arrays, _: Any) -> list[mx.array]:
            copy, x, weight, seed = primals
            dx, dcopy = of_both(x, copy, cotangents[0])
            return [dcopy, dx, mx.zeros_like(weight), mx.zeros_like(seed)]

        def jvp_of_copy(primals: Arrays, tangents: Arrays) -> list[mx.array]:
            return native.jvp(fused, [primals[1], primals[0]], [tangents[1], tangents[0]])[1]

        recorded: Any = Node(lambda x, weight, seed: fused(x, weight))
        recorded.vjp(record)

        def shaped(copy: mx.array, x: mx.array, weight: mx.array, seed: mx.array) -> list[mx.array]:
            return [_like(x if x.dtype == weight.dtype else fused(x, weight))]

        return _layer_node(shaped, recorded, vjp_of_copy, jvp_of_copy)

    @functools.lru_cache(maxsize=4)  # noqa: B019
    def spread(self, size: int) -> Callable[..., mx.array]:
        def record(primals: Arrays, cotangent: mx.array, _: Any) -> list[mx.array]:
            parameter = _recorded(self.depth, self.index)
            if parameter is not None:
                parameter.add_by_copies(cotangent)
                return list(primals)
            return [mx.sum(cotangent, axis=0), mx.zeros_like(primals[1])]

        node: Any = Node(lambda weight, seed: copies(weight, size))
        node.vjp(record)
        return node


@functools.lru_cache(maxsize=4096)
def nodes_of(depth: int, index: int) -> _Nodes:
    return _Nodes(depth, index)


def normalised(x: mx.array, weight: mx.array | None, name: str, eps: float) -> mx.array:
    if name == "rms_norm":
        return mx.fast.rms_norm(x, weight, eps)
    return mx.fast.layer_norm(x, weight, None, eps)


def product_gradient(x: mx.array, c: mx.array, dtype: mx.Dtype) -> mx.array:
    """(samples, rows, inputs), (samples, rows, outputs) -> (samples, outputs, inputs)."""
    # The dtype that the layer computed in, as a batch's gradient.
    return _as(mx.matmul(mx.swapaxes(c, 1, 2), _as(x, c.dtype)), dtype)


def _as(x: mx.array, dtype: mx.Dtype) -> mx.array:
    return x if x.dtype == dtype else x.astype(dtype)


def _shape_of_product(
    copy: mx.array, x: mx.array, weight: mx.array, seed: mx.array
) -> list[mx.array]:
    shape, (outputs, inputs) = x.shape, weight.shape
    if x.dtype == weight.dtype and shape and shape[-1] == inputs:
        return [placeholder((*shape[:-1], outputs), x.dtype)]
    return [_like(mx.matmul(x, mx.swapaxes(weight, 0, 1)))]  # promotes, or says what is wrong


def _shape_of_lookup(
    copy: mx.array, ids: mx.array, weight: mx.array, seed: mx.array
) -> list[mx.array]:
    return [placeholder((*ids.shape, *weight.shape[1:]), weight.dtype)]


def _shape_of_scaled(
    copy: mx.array, x: mx.array, weight: mx.array, seed: mx.array
) -> list[mx.array]:
    return [_like(x)]


def _shape_of_shifted(
    copy: mx.array, x: mx.array, bias: mx.array, seed: mx.array
) -> list[mx.array]:
    return [_like(x if x.dtype == bias.dtype and x.ndim else x + bias)]


def _like(x: mx.array) -> mx.array:
    return placeholder(x.shape, x.dtype)


def rows_of(x: mx.array, leading: int) -> mx.array:
    """All axes but the first `leading` and the last as one."""
    return mx.reshape(x, (*x.shape[:leading], -1, x.shape[-1]))


# Inside a gradient that is inside the loss, the copy stands for the parameter.


def _product_vjp(primals: Arrays, cotangents: Arrays, outputs: Arrays) -> list[mx.array]:
    copy, x, weight, seed = primals
    c = cotangents[0]
    dcopy = mx.matmul(mx.swapaxes(rows_of(c, 0), 0, 1), rows_of(x, 0).astype(c.dtype))
    dx = mx.matmul(c, copy)
    return [
        dcopy.astype(copy.dtype),
        dx.astype(x.dtype),
        mx.zeros_like(weight),
        mx.zeros_like(seed),
    ]


def _product_jvp(primals: Arrays, tangents: Arrays) -> list[mx.array]:
    copy, x, *_ = primals
    dcopy, dx, *_ = tangents
    return [mx.matmul(dx, mx.swapaxes(copy, 0, 1)) + mx.matmul(x, mx.swapaxes(dcopy, 0, 1))]


def _lookup_vjp(primals: Arrays, cotangents: Arrays, outputs: Arrays) -> list[mx.array]:
    copy, ids, weight, seed = primals
    dcopy = mx.zeros_like(copy).at[ids].add(cotangents[0].astype(copy.dtype))
    return [dcopy, mx.zeros_like(ids), mx.zeros_like(weight), mx.zeros_like(seed)]


def _lookup_jvp(primals: Arrays, tangents: Arrays) -> list[mx.array]:
    return [mx.take(tangents[0], primals[1], axis=0)]


def _scaled_vjp(primals: Arrays, cotangents: Arrays, outputs: Arrays) -> list[mx.array]:
    copy, x, weight, seed = primals
    c = cotangents[0]
    dcopy = mx.sum(rows_of(c * x, 0), axis=0).astype(copy.dtype)
    return [dcopy, (c * copy).astype(x.dtype), mx.zeros_like(weight), mx.zeros_like(seed)]


def _scaled_jvp(primals: Arrays, tangents: Arrays) -> list[mx.array]:
    copy, x, *_ = primals
    dcopy, dx, *_ = tangents
    return [dx * copy + x * dcopy]


def _shifted_vjp(primals: Arrays, cotangents: Arrays, outputs: Arrays) -> list[mx.array]:
    copy, x, bias, seed = primals
    c = cotangents[0]
    dcopy = mx.sum(rows_of(c, 0), axis=0).astype(copy.dtype)
    return [dcopy, c.astype(x.dtype), mx.zeros_like(bias), mx.zeros_like(seed)]


def _shifted_jvp(primals: Arrays, tangents: Arrays) -> list[mx.array]:
    dcopy, dx, *_ = tangents
    return [dx + dcopy]
