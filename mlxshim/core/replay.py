"""A function that is run again draws the same random numbers again.

MLX's graph holds no second derivative of what was traced once: a pullback, a tangent map and a
recomputation run the function anew. The draws without a key have to be those of the first run,
or the derivative would be of another function. The second run takes its keys from a chain of its
own that starts where MLX's global state stood at the first, and leaves that state alone.

Neither is the second run one that the caller asked for. What it puts into a container that the
function captured (mlx-lm's checkpointed layers put their parameters into the module) is taken out.

Source: python/src/random.cpp (`PyKeySequence::next`).
"""

from __future__ import annotations

import functools
import threading
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import mlx.core as mx

from . import levels
from .closures import Kept

R = TypeVar("R")


class _Local(threading.local):
    def __init__(self) -> None:
        #: The state of the run that is repeated, in a list as MLX has it; None in a first run.
        self.chain: list[mx.array] | None = None


_local = _Local()


def chain() -> list[mx.array] | None:
    """The random state of a repeated run, to be moved on by who draws; None in a first run."""
    return _local.chain


def same_draws(fun: Callable[..., R], start: list[mx.array] | None = None) -> Callable[..., R]:
    """`fun`, whose later calls draw what its first call drew.

    The later calls must run inside a level, where draws are intercepted. `start` is where the
    beginning of the first call's draws is kept: an empty list, for whoever makes several of these.
    """
    start = [] if start is None else start

    def run(*args: Any, **kwargs: Any) -> R:
        outer = _local.chain
        if levels.is_abstract():
            return fun(*args, **kwargs)  # nothing is drawn
        if not start:
            start.append(outer[0] if outer is not None else mx.random.state[0])  # pyright: ignore
            return fun(*args, **kwargs)
        _local.chain = [start[0]]
        try:
            return fun(*args, **kwargs)
        finally:
            _local.chain = outer

    return run


# What a function has captured -----------------------------------------------------------------


def captured_containers(fun: Any) -> list[Any]:
    """The lists and dicts, `nn.Module`s among them, that a function has within reach."""
    found: dict[int, Any] = {}
    seen: set[int] = set()
    waiting = [fun]
    while waiting:
        thing = waiting.pop()
        if id(thing) in seen or isinstance(thing, mx.array):
            continue
        seen.add(id(thing))
        if isinstance(thing, types.FunctionType):
            waiting += [_content(cell) for cell in thing.__closure__ or ()]
            waiting += thing.__defaults__ or ()
        elif isinstance(thing, types.MethodType):
            waiting += [thing.__func__, thing.__self__]
        elif isinstance(thing, functools.partial):
            waiting += [thing.func, *thing.args, *thing.keywords.values()]
        elif isinstance(thing, tuple):
            waiting += thing
        elif isinstance(thing, (list, dict)):
            found[id(thing)] = thing
            waiting += thing.values() if isinstance(thing, dict) else thing
    return list(found.values())


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # a variable that is assigned further down
        return None


@contextmanager
def unchanged(containers: Sequence[Any]) -> Iterator[None]:
    """What is in these containers is there again afterwards; what is appended to a list stays."""
    kept = [Kept(x) for x in containers]
    try:
        yield
    finally:
        for container in kept:
            container.restore(logs=True)


def exchange(containers: Sequence[Any], by: dict[int, mx.array]) -> None:
    """Every array in these containers whose id is in `by`, for that one."""
    for container in containers:
        pairs = container.items() if isinstance(container, dict) else enumerate(container)
        for key, value in list(pairs):
            if id(value) in by:
                container[key] = by[id(value)]
