"""Plans: what a vmap learns about its own trace, so that it need not be built twice over.

A node of a primitive carries a value, the decomposition, for the case that nothing it is called
with is mapped; everywhere else that value is transformed and thrown away, at every trace
anew. Only MLX knows what is mapped, and tells when the trace is through. So the second trace of a
vmap notes which calls were, and from then on those take a placeholder for their value.

Nothing rests on a plan being right. A call that does not look like the noted one gets its value.
One that looks like it and is not mapped this time is still computed once, from unmapped arrays; it
is repeated for every sample without memory being written, and struck off the plan.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import mlx.core as mx

_PLANS = 16  # of one vmap, for as many shapes of its first argument
_LEARNING = (2, 3)  # a vmap that is made anew for every call learns nothing, and pays nothing


class Noted:
    """One call of a primitive that was mapped."""

    __slots__ = ("asked", "form", "inputs", "node")

    def __init__(self, form: Any, arrays: Sequence[mx.array], node: Callable[..., Any]) -> None:
        #: What the primitive and its static arguments are known by.
        self.form = form
        self.inputs = [(x.shape, x.dtype) for x in arrays]
        self.node = node
        #: The words of a caller that came to this call, with these arrays (`Primitive.again`).
        self.asked: Any = None

    def is_like(self, arrays: Sequence[mx.array]) -> bool:
        return [(x.shape, x.dtype) for x in arrays] == self.inputs


class Plan:
    """The calls of one trace by their number; None for one that must always have its value."""

    __slots__ = ("noted", "traces")

    def __init__(self) -> None:
        self.noted: dict[int, Noted | None] = {}
        self.traces = 0

    @property
    def learns(self) -> bool:
        return self.traces in _LEARNING


class Plans:
    """The plans of one vmap."""

    __slots__ = ("_plans",)

    def __init__(self) -> None:
        self._plans: dict[Hashable, Plan] = {}

    def of(self, key: Hashable) -> Plan:
        """The plan for a trace that begins; `key` tells apart traces that will differ."""
        plan = self._plans.get(key)
        if plan is None:
            if len(self._plans) >= _PLANS:
                self._plans.clear()
            plan = self._plans[key] = Plan()
        plan.traces += 1
        return plan


@functools.lru_cache(maxsize=256)
def placeholder(shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    """An array that is never evaluated."""
    return mx.zeros(shape, dtype)
