"""One batched run of a loss, forward and backward, with each parameter's part in it written down.

The loss is mapped over the samples, and the whole is differentiated: grad of vmap, not vmap of
grad, so that the backward pass is the ordinary one of a batch. Every parameter is mapped as so many
equal copies of itself (no memory is written), and the cotangent of the copies is its gradient for
each sample. That is right for whatever a model does with a parameter, but a product with copies of
a matrix is a product for each sample. Where a layer is known, its call is therefore a node that
multiplies by the one matrix, all samples in one call, and writes down what the gradient is made of:

    linear         y = x W^T      (x, c): the gradient of a sample is c^T x over its rows
    lookup         y = W[ids]     (ids, c): row ids[t] of a sample's gradient gets c[t]
    norm           y = n(x) W     n(x) c, summed over rows: the gradient of a sample, which is small
    bias           y = x + W      c, summed over rows

with c the cotangent of y. Where the gradient of a linear layer takes no more memory than x and c,
as with long rows, it is made at once and they are not kept. What is not known, or is used another
way (`model.embed.weight` read by hand, a layer inside a checkpoint), goes by the copies. All parts
together are the gradient.

After Goodfellow, "Efficient per-example gradient computations" (2015).
"""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx

from ..core import native
from ..core.interception import original
from ..core.opaque import after, copies
from ..core.plans import placeholder
from ..core.primitive import Arrays, Axes, Node, full
from ..core.tracers import in_trace
from ..rules import _devices, norms
from ..rules._sums import sums_of_rows
from ..transforms.linear import vjp
from . import _state

Pair = tuple[mx.array, mx.array]

#: Samples' gradients are kept instead of what they are made of if they take at most this many times
#: the memory: norms and sums then need no product again, and an x is often several layers'.
KEPT_TIMES = 1.25


def on_gpu(fun: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """Element-wise operations as one kernel on a GPU; elsewhere building one takes seconds."""
    compiled = mx.compile(fun, shapeless=True)
    return lambda *arrays: (compiled if _devices.gpu() else fun)(*arrays)


@on_gpu
def _terms(x: mx.array, c: mx.array) -> mx.array:
    return x.astype(mx.float32) * c.astype(mx.float32)


def _sums_of_terms(x: mx.array, c: mx.array) -> mx.array:
    """The sums over each sample's rows of x * c, (samples, width)."""
    if x.dtype == c.dtype == mx.bfloat16 and _devices.gpu():
        return sums_of_rows(x * c)  # rounded as MLX rounds them for the gradient of a batch
    return sums_of_rows(_terms(x, c))


class Parameter:
    """One trainable array, and what a run found out about it."""

    def __init__(
        self,
        place: _state.Location,
        index: int,
        size: int,
        depth: int,
        last: list[mx.array],
        after: Callable[[list[mx.array], list[mx.array]], Arrays],
    ) -> None:
        self.place, self.index, self.size, self.depth = place, index, size, depth
        self.value = place.get()
        self._after = after
        #: What was made last of a cotangent, of whichever parameter of the run.
        self._last = last
        #: The samples' copy inside the mapped function: what the module holds meanwhile; and an
        #: array that is differentiated with respect to, so that every node has a derivative.
        self.copy: Any = None
        self.seed: Any = None
        #: (x, c) of every call as a linear map: (samples, rows, inputs), (samples, rows, outputs).
        self.products: list[Pair] = []
        #: (ids, c) of every lookup: (samples, rows), (samples, rows, width).
        self.lookups: list[Pair] = []
        #: The gradients (samples, *shape) by the copies, if anything used them, and by norms.
        self.direct: mx.array | None = None
        #: Those of the calls whose (x, c) would have taken more memory.
        self.kept: mx.array | None = None

    def product(self, x: mx.array) -> mx.array:
        nodes = _nodes(self.depth, self.index)
        return nodes.product(self.copy, x, self.value, self.seed)[0]

    def lookup(self, ids: mx.array) -> mx.array:
        nodes = _nodes(self.depth, self.index)
        return nodes.lookup(self.copy, ids, self.value, self.seed)[0]

    def shift(self, x: mx.array) -> mx.array:
        nodes = _nodes(self.depth, self.index)
        return nodes.shifted(self.copy, x, self.value, self.seed)[0]

    def norm(self, x: mx.array, name: str, eps: float) -> mx.array:
        nodes = _nodes(self.depth, self.index)
        if _devices.gpu():
            return nodes.norm(name, eps)(self.copy, x, self.value, self.seed)[0]
        # With no kernel there is nothing to keep whole, and what is normalised is there already.
        if x.dtype != self.value.dtype:
            x = x.astype((mx.zeros((), x.dtype) + mx.zeros((), self.value.dtype)).dtype)
        x = _normalised(x, None, name, eps)
        return nodes.scaled(self.copy, x, self.value, self.seed)[0]

    def add_product(self, x: mx.array, c: mx.array) -> None:
        """`x` was multiplied by the parameter, and `c` is the cotangent."""
        x, c = _rows(x, 1), _rows(c, 1)
        if self.size * self.value.nbytes > KEPT_TIMES * (x.nbytes + c.nbytes):
            self.products.append((x, c))
            return
        gradients = product_gradient(x, c, self.value.dtype)
        self.kept = gradients if self.kept is None else self.kept + gradients
        self._last[:] = [gradients]

    def add_scale(self, x: mx.array, c: mx.array) -> None:
        """The parameter multiplied each row of `x`."""
        self.add_rows(_sums_of_terms(x, c))

    def add_rows(self, sums: mx.array) -> None:
        """The gradients are sums over each sample's rows."""
        gradients = sums.astype(self.value.dtype)
        self.add(gradients)
        self._last[:] = [gradients]

    def in_order(self, cotangent: mx.array) -> mx.array:
        """To be used after what the run made last."""
        return self._after([cotangent], self._last)[0] if self._last else cotangent

    @property
    def pairs(self) -> list[Pair]:
        return self.products + self.lookups

    def waiting(self, others: list[mx.array]) -> Parameter:
        """The same, with nothing of which is computed before `others` are there."""
        parts = [part for pair in self.pairs for part in pair]
        made = [x for x in (self.direct, self.kept) if x is not None]
        arrays = [*parts, *made]
        if arrays and others:
            arrays = list(self._after(arrays, others))
        found = copy.copy(self)
        pairs = list(zip(arrays[: len(parts) : 2], arrays[1 : len(parts) : 2]))
        found.products, found.lookups = (
            pairs[: len(self.products)],
            pairs[len(self.products) :],
        )
        found.kept = arrays.pop() if self.kept is not None else None
        found.direct = arrays.pop() if self.direct is not None else None
        return found

    def add(self, gradients: mx.array) -> None:
        self.direct = gradients if self.direct is None else self.direct + gradients


class Tape:
    """The parameters of a model during one run."""

    def __init__(
        self,
        places: Sequence[_state.Location],
        size: int,
        depth: int,
        by_copies: set[int] | None = None,
    ) -> None:
        self.size, self.depth = size, depth
        #: Those whose copies were used, and whether others were: then the run is no good.
        self.by_copies: set[int] = set()
        self.surprised = False
        last: list[mx.array] = []
        # What nothing traces needs no transforms, and MLX's own node is built sooner.
        traced = in_trace()
        order = after if traced else original(mx, "depends")
        #: The parameters whose copies are expected to be used, by their number; None: not known.
        self.expected = None if traced else by_copies
        self.parameters = [
            Parameter(place, i, size, depth, last, order) for i, place in enumerate(places)
        ]
        self.seed: Any = None
        #: The loss of one sample, of its copies and its arrays: what the run's vmap maps.
        self.sample: Any = None
        self._of_copy: dict[int, Parameter] = {}

    def hold(self, arrays: Sequence[mx.array]) -> None:
        """The mapped function runs with these as the parameters."""
        self._of_copy = {}
        for parameter, x in zip(self.parameters, arrays):
            parameter.copy, parameter.seed = x, self.seed
            self._of_copy[id(x)] = parameter

    def release(self) -> None:
        self._of_copy = {}
        for parameter in self.parameters:
            parameter.copy = parameter.seed = None

    def find(self, array: Any) -> Parameter | None:
        return self._of_copy.get(id(array))

    def run(self, body: Callable[[list[mx.array]], mx.array]) -> None:
        """`body(copies)` -> losses (samples,), forward and backward."""

        def total(seed: mx.array) -> mx.array:
            self.seed = seed
            return _known(body(self._copies(seed)))

        try:
            with _entered(self):
                vjp(total, [mx.zeros(())], [mx.ones((self.size,))])
        finally:
            self.seed = self.sample = None

    def _copies(self, seed: mx.array) -> list[mx.array]:
        if self.expected is None:
            return [
                _nodes(self.depth, p.index).spread(self.size)(p.value, seed)
                for p in self.parameters
            ]
        guard, depends = [_guard(seed)], original(mx, "depends")
        found = [depends([copies(p.value, self.size)], guard)[0] for p in self.parameters]
        for i in self.expected:
            found[i] = _nodes(self.depth, i).spread(self.size)(self.parameters[i].value, seed)
        return found


# Which tape runs in this thread ----------------------------------------------------------------


class _Tapes(threading.local):
    def __init__(self) -> None:
        self.stack: list[Tape] = []


_tapes = _Tapes()


def depth() -> int:
    return len(_tapes.stack)


@contextmanager
def _entered(tape: Tape) -> Iterator[None]:
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
_guard: Any = Node(lambda seed: seed)
_guard.vjp(_surprise)


_known: Any = Node(lambda losses: losses)
_known.vjp(lambda losses, cotangent, _: after([cotangent], [losses])[0])


# The nodes -------------------------------------------------------------------------------------
#
# Of each parameter, for all runs: building them costs more than calling them.
#
# While a tape records, only the gradient of what a layer was given goes anywhere: nobody asks for
# the seed's and the parameter's, and anything of their shape stands in for them. They are there in
# full for whoever differentiates once more what was recorded, which finds no tape.


def _known_node(
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
        return _known_node(_shape_of_product, recorded, _product_vjp, _product_jvp)

    @functools.cached_property
    def lookup(self) -> Any:
        recorded: Any = Node(lambda ids, weight, seed: mx.take(weight, ids, axis=0))
        recorded.vjp(self._record_lookup)
        return _known_node(_shape_of_lookup, recorded, _lookup_vjp, _lookup_jvp)

    @functools.cached_property
    def scaled(self) -> Any:
        recorded: Any = Node(lambda x, weight, seed: x * weight)
        recorded.vjp(self._record_scaled)
        return _known_node(_shape_of_scaled, recorded, _scaled_vjp, _scaled_jvp)

    @functools.cached_property
    def shifted(self) -> Any:
        recorded: Any = Node(lambda x, bias, seed: x + bias)
        recorded.vjp(self._record_shifted)
        return _known_node(_shape_of_shifted, recorded, _shifted_vjp, _shifted_jvp)

    def _record_product(self, primals: Arrays, cotangent: mx.array, _: Any) -> list[mx.array]:
        x, weight, seed = primals
        parameter = _recorded(self.depth, self.index)
        if parameter is not None:
            cotangent = parameter.in_order(cotangent)
            parameter.add_product(x, cotangent)
            return [_as(mx.matmul(cotangent, weight), x.dtype), weight, seed]
        rows, flat = _rows(x, 0).astype(cotangent.dtype), _rows(cotangent, 0)
        dweight = mx.matmul(mx.swapaxes(flat, 0, 1), rows).astype(weight.dtype)
        return [mx.matmul(cotangent, weight).astype(x.dtype), dweight, mx.zeros_like(seed)]

    def _record_lookup(self, primals: Arrays, cotangent: mx.array, _: Any) -> list[mx.array]:
        ids, weight, seed = primals
        parameter = _recorded(self.depth, self.index)
        if parameter is not None:
            rows = mx.reshape(ids, (ids.shape[0], -1))
            parameter.lookups.append((rows, _rows(cotangent, 1)))
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
        dweight = mx.sum(_rows(cotangent * x, 0), axis=0).astype(weight.dtype)
        return [(cotangent * weight).astype(x.dtype), dweight, mx.zeros_like(seed)]

    def _record_shifted(self, primals: Arrays, cotangent: mx.array, _: Any) -> list[mx.array]:
        x, bias, seed = primals
        parameter = _recorded(self.depth, self.index)
        if parameter is not None:
            cotangent = parameter.in_order(cotangent)
            parameter.add_rows(sums_of_rows(cotangent))
            return [cotangent.astype(x.dtype), bias, seed]
        dbias = mx.sum(_rows(cotangent, 0), axis=0).astype(bias.dtype)
        return [cotangent.astype(x.dtype), dbias, mx.zeros_like(seed)]

    @functools.cache  # noqa: B019  (as long-lived as the nodes)
    def norm(self, name: str, eps: float) -> Any:
        fused = functools.partial(_normalised, name=name, eps=eps)
        backward = functools.partial(norms.backward, name=name, eps=eps)

        def record(primals: Arrays, cotangent: mx.array, _: Any) -> list[mx.array]:
            x, weight, seed = primals
            parameter = _recorded(self.depth, self.index)
            if parameter is not None:
                cotangent = parameter.in_order(cotangent)
                parameter.add_scale(fused(x, None), cotangent)
                # By the norm alone: with a weight MLX would add its gradient up, too.
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

        return _known_node(shaped, recorded, vjp_of_copy, jvp_of_copy)

    @functools.lru_cache(maxsize=4)  # noqa: B019
    def spread(self, size: int) -> Callable[..., mx.array]:
        def record(primals: Arrays, cotangent: mx.array, _: Any) -> list[mx.array]:
            parameter = _recorded(self.depth, self.index)
            if parameter is not None:
                parameter.add(cotangent)
                _tapes.stack[self.depth].by_copies.add(self.index)
                return list(primals)
            return [mx.sum(cotangent, axis=0), mx.zeros_like(primals[1])]

        node: Any = Node(lambda weight, seed: copies(weight, size))
        node.vjp(record)
        return node


@functools.lru_cache(maxsize=4096)
def _nodes(depth: int, index: int) -> _Nodes:
    return _Nodes(depth, index)


def _normalised(x: mx.array, weight: mx.array | None, name: str, eps: float) -> mx.array:
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


def _rows(x: mx.array, leading: int) -> mx.array:
    """All axes but the first `leading` and the last as one."""
    return mx.reshape(x, (*x.shape[:leading], -1, x.shape[-1]))


# Inside a gradient that is inside the loss, the copy stands for the parameter.


def _product_vjp(primals: Arrays, cotangents: Arrays, outputs: Arrays) -> list[mx.array]:
    copy, x, weight, seed = primals
    c = cotangents[0]
    dcopy = mx.matmul(mx.swapaxes(_rows(c, 0), 0, 1), _rows(x, 0).astype(c.dtype))
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
    dcopy = mx.sum(_rows(c * x, 0), axis=0).astype(copy.dtype)
    return [dcopy, (c * copy).astype(x.dtype), mx.zeros_like(weight), mx.zeros_like(seed)]


def _scaled_jvp(primals: Arrays, tangents: Arrays) -> list[mx.array]:
    copy, x, *_ = primals
    dcopy, dx, *_ = tangents
    return [dx * copy + x * dcopy]


def _shifted_vjp(primals: Arrays, cotangents: Arrays, outputs: Arrays) -> list[mx.array]:
    copy, x, bias, seed = primals
    c = cotangents[0]
    dcopy = mx.sum(_rows(c, 0), axis=0).astype(copy.dtype)
    return [dcopy, c.astype(x.dtype), mx.zeros_like(bias), mx.zeros_like(seed)]


def _shifted_jvp(primals: Arrays, tangents: Arrays) -> list[mx.array]:
    dcopy, dx, *_ = tangents
    return [dx + dcopy]
