"""Scoped interception: MLX's own functions are replaced while a transform runs, and only then.

Library code (`mlx.nn`, mlx-lm, …) looks an operation up by attribute at call time, so replacing
the attribute for the length of a transform reaches it. The replacement is visible to every thread,
but takes over only in a thread that is tracing; in any other it is a plain call of the original.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from . import levels

F = TypeVar("F", bound=Callable[..., Any])


@dataclass
class Interception:
    """One attribute of one MLX namespace, and what stands in for it while a transform runs."""

    owner: Any
    name: str
    handler: Callable[..., Any]
    original: Callable[..., Any]
    stand_in: Callable[..., Any] = field(init=False)

    def __post_init__(self) -> None:
        handler, active = self.handler, levels.active

        @functools.wraps(self.original)
        def stand_in(*args: Any, **kwargs: Any) -> Any:
            if active():
                return handler(*args, **kwargs)
            return self.original(*args, **kwargs)

        self.stand_in = stand_in

    def put_in(self) -> None:
        # Read anew each time: somebody may have replaced the function before we came.
        self.original = getattr(self.owner, self.name)
        setattr(self.owner, self.name, self.stand_in)

    def take_out(self) -> None:
        # What was put over ours meanwhile belongs to somebody else.
        if getattr(self.owner, self.name) is self.stand_in:
            setattr(self.owner, self.name, self.original)


_table: list[Interception] = []
_lock = threading.Lock()
_users = 0


def intercept(owner: Any, name: str) -> Callable[[F], F]:
    """Register the decorated function to stand in for `owner.name` inside transforms.

    The handler gets the caller's arguments as they were written. Inside it, `original(owner,
    name)` is MLX's own function.
    """

    def register(handler: F) -> F:
        _table.append(Interception(owner, name, handler, getattr(owner, name)))
        return handler

    return register


def original(owner: Any, name: str) -> Callable[..., Any]:
    """The function that `owner.name` is outside every transform."""
    for entry in _table:
        if entry.owner is owner and entry.name == name:
            current = getattr(owner, name)
            return entry.original if current is entry.stand_in else current
    return getattr(owner, name)


def in_place() -> bool:
    """Whether interception is in place now, in any thread."""
    return _users > 0


def intercepted(fun: Callable[..., Any]) -> Callable[..., Any]:
    """`fun`, run with every registered interception in place; undone on every way out."""

    def scoped(*args: Any, **kwargs: Any) -> Any:
        _enter()
        try:
            return fun(*args, **kwargs)
        finally:
            _leave()

    # mx.grad(f) is a callable of MLX's without a name: then there is nothing to copy.
    return functools.update_wrapper(scoped, fun, updated=())


def _enter() -> None:
    global _users
    with _lock:
        if _users == 0:
            for entry in _table:
                entry.put_in()
        _users += 1


def _leave() -> None:
    global _users
    with _lock:
        _users -= 1
        if _users == 0:
            for entry in _table:
                entry.take_out()
