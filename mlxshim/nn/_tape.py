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
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from ..core.interception import original
from ..core.opaque import after, copies
from ..core.primitive import Arrays
from ..core.tracers import in_trace
from ..rules import _devices
from ..rules._sums import sums_of_rows
from ..transforms.linear import vjp
from . import _state
from ._nodes import (
    entered,
    guard,
    nodes_of,
    normalised,
    product_gradient,
    rows_of,
    values_first,
)

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
        #: Whether the copies were used.
        self.by_copies = False
        #: Those of the calls whose (x, c) would have taken more memory.
        self.kept: mx.array | None = None

    def product(self, x: mx.array) -> mx.array:
        nodes = nodes_of(self.depth, self.index)
        return nodes.product(self.copy, x, self.value, self.seed)[0]

    def lookup(self, ids: mx.array) -> mx.array:
        nodes = nodes_of(self.depth, self.index)
        return nodes.lookup(self.copy, ids, self.value, self.seed)[0]

    def shift(self, x: mx.array) -> mx.array:
        nodes = nodes_of(self.depth, self.index)
        return nodes.shifted(self.copy, x, self.value, self.seed)[0]

    def norm(self, x: mx.array, name: str, eps: float) -> mx.array:
        nodes = nodes_of(self.depth, self.index)
        if _devices.gpu():
            return nodes.norm(name, eps)(self.copy, x, self.value, self.seed)[0]
        # With no kernel there is nothing to keep whole, and what is normalised is there already.
        if x.dtype != self.value.dtype:
            x = x.astype((mx.zeros((), x.dtype) + mx.zeros((), self.value.dtype)).dtype)
        x = normalised(x, None, name, eps)
        return nodes.scaled(self.copy, x, self.value, self.seed)[0]

    def add_product(self, x: mx.array, c: mx.array) -> None:
        """`x` was multiplied by the parameter, and `c` is the cotangent."""
        x, c = rows_of(x, 1), rows_of(c, 1)
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

    def add_by_copies(self, gradients: mx.array) -> None:
        """The copies have a cotangent."""
        self.by_copies = True
        self.add(gradients)


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
        #: Whether copies were used that were not expected to be: then the run is no good.
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

    def by_copies(self) -> set[int]:
        """The parameters whose copies were used, by their number."""
        return {p.index for p in self.parameters if p.by_copies}

    def run(self, body: Callable[[list[mx.array]], mx.array]) -> None:
        """`body(copies)` -> losses (samples,), forward and backward."""

        def total(seed: mx.array) -> mx.array:
            self.seed = seed
            return values_first(body(self._copies(seed)))

        try:
            with entered(self):
                vjp(total, [mx.zeros(())], [mx.ones((self.size,))])
        finally:
            self.seed = self.sample = None

    def _copies(self, seed: mx.array) -> list[mx.array]:
        if self.expected is None:
            return [
                nodes_of(self.depth, p.index).spread(self.size)(p.value, seed)
                for p in self.parameters
            ]
        watched, depends = [guard(seed)], original(mx, "depends")
        found = [depends([copies(p.value, self.size)], watched)[0] for p in self.parameters]
        for i in self.expected:
            found[i] = nodes_of(self.depth, i).spread(self.size)(self.parameters[i].value, seed)
        return found
