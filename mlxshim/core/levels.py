"""Levels: which transforms are being traced, innermost last, in this thread.

A level is pushed for as long as the user's function runs. MLX calls batching and vjp rules after
that function has returned: a rule of a `Node` sees the levels *around* the transform it serves,
and an empty stack at the outermost one. What MLX then runs of the user's once more (a checkpointed
function, a custom function without a rule: C++ maps those by calling them again) still sees the
vmap that it is mapped by, in which nothing is a tracer that is mapped for certain.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Hashable, Iterator
from typing import Any, Literal, TypeVar

import mlx.core as mx

from . import compilation
from .plans import Noted, Plan

R = TypeVar("R")
Kind = Literal["vmap", "grad", "jvp"]


class VmapLevel:
    """What rules and collectives may ask of one active vmap."""

    __slots__ = (
        *("axis_name", "calls", "compiles", "constants", "depth", "kept", "mapped", "plan"),
        *("randomness", "size", "ties", "used"),
    )

    def __init__(
        self, axis_name: object, size: int, randomness: str, plan: Plan | None = None
    ) -> None:
        self.axis_name = axis_name
        self.size = size
        self.randomness = randomness
        #: What is known of this trace, and how many calls of primitives it has made so far.
        self.plan = plan
        self.calls = 0
        #: What the plan knew of the last call, if it was used.
        self.used: Noted | None = None
        #: A tracer of this level that is mapped for certain: one of its inputs. None once the
        #: function has returned, and MLX maps what it recorded.
        self.mapped: mx.array | None = None
        #: Whether this is the outermost level, and its graph is for more than one evaluation.
        self.kept = False
        #: Whether compilation is known to be on (`tracers.look_around`).
        self.compiles = False
        #: What `shared` has made, if this is the outermost level.
        self.constants: dict[Hashable, mx.array] = {}
        #: How many vmap levels are around this one.
        self.depth = 0
        #: Whether a tangent that samples share is to be one of each sample's own.
        self.ties = False


class _Here:
    """The levels of one thread. (Slots are reached sooner than a `threading.local`.)"""

    __slots__ = ("abstract", "calls", "hidden", "running", "stack", "unmarked", "vmaps")

    def __init__(self) -> None:
        self.stack: list[Kind] = []
        self.vmaps: list[VmapLevel] = []
        #: For each call of a function that `mx.vmap` made: whether a level of ours is in it.
        self.calls: list[bool] = []
        #: How many functions of vmaps are running, so that nothing is compiled.
        self.running = 0
        #: Whether only shapes and dependencies are asked for.
        self.abstract = False
        #: How many derivatives are around that the stack does not tell of.
        self.hidden = 0
        #: Whether tracers of the active levels may have lost their mark (`unmarked`).
        self.unmarked = False


class _Levels(threading.local):
    def __init__(self) -> None:
        self.here = _Here()
        self.stack, self.vmaps = self.here.stack, self.here.vmaps


_levels = _Levels()


#: What stands in for a function of MLX's, by that function's id: one that a transform is given
#: itself, as in `vmap(mx.sort)`, is looked up here and not as an attribute. The function is kept
#: beside it, so that nothing else can come to have its id.
_stand_ins: dict[int, tuple[Any, Callable[..., Any]]] = {}


def stands_in(stand_in: Callable[..., Any], fun: Any) -> None:
    """From now on `stand_in` is what a transform runs that is given `fun`."""
    _stand_ins[id(fun)] = fun, stand_in


def standing_in(fun: Callable[..., R]) -> Callable[..., R]:
    """What a transform calls that is given `fun`: one of MLX's functions has a stand-in."""
    found = _stand_ins.get(id(fun))
    if found is not None:
        return found[1]
    if isinstance(fun, functools.partial) and id(fun.func) in _stand_ins:
        return functools.partial(standing_in(fun.func), *fun.args, **fun.keywords)
    return fun


def active() -> list[Kind]:
    """The kinds of the active levels of this thread, outermost first. Not to be changed."""
    return _levels.stack


def is_kept() -> bool:
    """Whether the graph that is traced in this thread is for more than one evaluation.

    Then the trace may take longer for a graph that is shorter.
    """
    vmaps = _levels.vmaps
    return bool(vmaps) and vmaps[0].kept


def shared(key: Hashable, make: Callable[[], mx.array]) -> mx.array:
    """What `make` makes of constants alone, once in each trace of a vmap.

    Of nodes that are the same `mx.compile` makes one, and raises `_Map_base::at` where three or
    more were put in another order than they are computed in (docs/mlx-issues.md).
    """
    vmaps = _levels.vmaps
    if not vmaps:
        return make()
    constants = vmaps[0].constants
    found = constants.get(key)
    if found is None:
        found = constants[key] = make()
    return found


def differentiates() -> bool:
    """Whether a derivative is among the active levels of this thread."""
    stack = _levels.stack
    return "grad" in stack or "jvp" in stack


def vmaps() -> list[VmapLevel]:
    """The active vmap levels of this thread, outermost first. Not to be changed."""
    return _levels.vmaps


def sizes() -> tuple[int, ...]:
    """The sizes of the active vmap levels of this thread, outermost first."""
    vmaps = _levels.vmaps
    return tuple([level.size for level in vmaps]) if vmaps else ()


_OUTSIDE = (0, 0, 0, 0)


def place() -> tuple[int, int, int, int]:
    """How deep this thread is in levels."""
    local = _levels.here
    if not (local.stack or local.calls or local.running or local.vmaps):
        return _OUTSIDE
    return len(local.stack), len(local.vmaps), len(local.calls), local.running


def back_to(place: tuple[int, int, int, int]) -> None:
    """Clear away the levels that an interrupt, which may come between any two steps, has left."""
    local = _levels.here
    if place is _OUTSIDE and not (local.stack or local.calls or local.running or local.vmaps):
        if not local.hidden:
            local.unmarked = False
        return
    stack, vmaps, calls, running = place
    if len(local.stack) != stack or len(local.vmaps) != vmaps or len(local.calls) != calls:
        del local.stack[stack:], local.vmaps[vmaps:], local.calls[calls:]
    if not stack and not local.hidden:
        local.unmarked = False
    if local.running != running:
        if not running:
            compilation.switch_back()
        local.running = running


def is_abstract() -> bool:
    """Whether what is traced will never be evaluated: no loop has to run for its end."""
    return _levels.here.abstract


@contextlib.contextmanager
def abstract() -> Iterator[None]:
    """Within it, arrays are traced for their shapes and for what they depend on alone."""
    local = _levels.here
    before, local.abstract = local.abstract, True
    try:
        yield
    finally:
        local.abstract = before


@contextlib.contextmanager
def as_in_rule() -> Iterator[None]:
    """Within it the levels are those that a batching rule of the innermost vmap will see."""
    local = _levels
    cut = len(local.stack) - 1 - local.stack[::-1].index("vmap")
    stack, vmaps = local.stack[cut:], local.vmaps[-1:]
    del local.stack[cut:], local.vmaps[-1:]
    try:
        yield
    finally:
        local.stack += stack
        local.vmaps += vmaps


@contextlib.contextmanager
def one_derivative_less() -> Iterator[None]:
    """Within it the innermost derivative is none: what runs is seen by those around it alone."""
    stack, here = _levels.stack, _levels.here
    at = next(i for i in reversed(range(len(stack))) if stack[i] != "vmap")
    kind = stack.pop(at)
    here.hidden += 1
    try:
        yield
    finally:
        stack.insert(at, kind)
        here.hidden -= 1


def unmarked() -> bool:
    """Whether a tracer of an active level may look like an array that nothing traces.

    A derivative takes the mark from all that its function has to do with, a tracer of a level
    around it that the function captured included (mlx/transforms.cpp, `vjp` and `jvp`).
    """
    return _levels.here.unmarked


def unmark() -> None:
    """Said when MLX has differentiated a function of ours, or is about to."""
    here = _levels.here
    here.unmarked = bool(here.stack) or here.hidden > 0
    if here.unmarked:
        for prepare in _preparations:
            prepare()


#: What has to be done before the user goes on with tracers that may have lost their mark.
_preparations: list[Callable[[], None]] = []


def when_unmarked(prepare: Callable[[], None]) -> None:
    _preparations.append(prepare)


def at_level(kind: Kind, fun: Callable[..., R]) -> Callable[..., R]:
    """`fun`, run one level of `kind` deeper; the level is popped on every way out."""
    fun = standing_in(fun)

    # Bare on purpose: this runs at every trace, and nobody but a transform sees it.
    def traced(*args: object, **kwargs: object) -> R:
        stack = _levels.stack
        stack.append(kind)
        try:
            return fun(*args, **kwargs)
        finally:
            stack.pop()
            unmark()

    return traced


def at_vmap(level: VmapLevel, fun: Callable[..., R]) -> Callable[..., R]:
    """`fun`, run inside one more vmap, whose first argument is a mapped tracer."""
    return functools.partial(in_vmap, level, standing_in(fun))


def in_vmap(
    level: VmapLevel, fun: Callable[..., R], mapped: mx.array, /, *args: object, **kwargs: object
) -> R:
    """`fun(*args, **kwargs)` inside one more vmap, of which `mapped` is a tracer."""
    local = _levels.here
    vmaps, calls, running = local.vmaps, local.calls, local.running
    level.mapped, level.depth = mapped, len(vmaps)
    # Left in place for MLX's part, unless nobody would clear it away.
    stays = calls and not calls[-1]
    if stays:
        calls[-1] = True
    local.running = running + 1
    if not running:
        compilation.switch_off(level.compiles)
        level.compiles = False  # known for once: the function may turn the switch
    local.stack.append("vmap")
    vmaps.append(level)
    try:
        return fun(*args, **kwargs)
    finally:
        level.mapped = None
        if not running:
            compilation.switch_back()
        local.running = running
        if not stays:
            local.stack.pop()
            vmaps.pop()


def call_mapped(mapped: Callable[..., R], /, *args: object, **kwargs: object) -> R:
    """A call of `mapped`, which `mx.vmap` made; what level its function leaves is cleared away."""
    local = _levels.here
    stack, vmaps = local.stack, local.vmaps
    depth, outer = len(stack), len(vmaps)
    local.calls.append(False)
    try:
        return mapped(*args, **kwargs)
    finally:
        local.calls.pop()
        del stack[depth:], vmaps[outer:]
        if not depth and not local.hidden:
            local.unmarked = False


def mapping(mapped: Callable[..., R]) -> Callable[..., R]:
    """`mapped`, as `call_mapped` calls it."""
    return functools.partial(call_mapped, mapped)


def further_out(rule: Callable[..., R]) -> Callable[..., R]:
    """A batching rule, run among the levels around the vmap it serves."""

    def outside(*args: object) -> R:
        local = _levels.here
        if not local.vmaps or local.vmaps[-1].mapped is not None or local.stack[-1] != "vmap":
            return rule(*args)
        level = local.vmaps.pop()
        local.stack.pop()
        try:
            return rule(*args)
        finally:
            local.stack.append("vmap")
            local.vmaps.append(level)

    return outside
