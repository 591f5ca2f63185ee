"""Scoped interception: MLX's own functions are replaced while a transform runs, and only then.

Library code (`mlx.nn`, mlx-lm, …) looks an operation up by attribute at call time, so replacing
the attribute for the length of a transform reaches it. The replacement is visible to every thread,
but takes over only in a thread that is tracing; in any other it is a plain call of the original.

Modules are exchanged whole, in a microsecond, and put back on every way out of a transform. A type
(`mx.array`) is slow to change, a microsecond for each method: its replacements stay behind when the
last transform ends, and the first call of any of them outside a transform puts all of them back.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from operator import itemgetter
from types import ModuleType
from typing import Any, TypeVar

from . import levels

F = TypeVar("F", bound=Callable[..., Any])


class Interception:
    """One attribute of an MLX module or type, and what stands in for it while a transform runs."""

    def __init__(
        self, owner: Any, name: str, handler: Callable[..., Any], outside: bool = False
    ) -> None:
        self.owner, self.name, self.handler, self.outside = owner, name, handler, outside
        self.original: Any = getattr(owner, name)
        self.stand_in = self._new_stand_in()
        levels.stands_in(self.stand_in, self.original)

    def _new_stand_in(self) -> Any:
        of_property = isinstance(self.original, property)
        original: Any = self.original.fget if of_property else self.original
        handler, active = self.handler, levels.active
        outside = self.outside
        on_type = not isinstance(self.owner, ModuleType)

        # MLX's getters have no names.
        @functools.wraps(original, ("__doc__",) if of_property else functools.WRAPPER_ASSIGNMENTS)
        def stand_in(*args: Any, **kwargs: Any) -> Any:
            # One that somebody has wrapped and put back is out of date, and stands aside.
            if (active() or outside) and self.call is stand_in:
                return handler(*args, **kwargs)
            if on_type and not _users:
                _restore_types()
            return original(*args, **kwargs)

        self.call = stand_in
        return property(stand_in) if of_property else stand_in

    def refresh(self, current: Any) -> None:
        """Stand in for `current`: somebody may have replaced the function before we came."""
        if current is not self.original:
            self.original = current
            self.stand_in = self._new_stand_in()
            levels.stands_in(self.stand_in, current)


class _Module:
    """All that is intercepted in one module; its dictionary is updated in one go."""

    def __init__(self, owner: ModuleType) -> None:
        self.namespace = vars(owner)
        self.entries: list[Interception] = []

    def put_in(self) -> None:
        names = [e.name for e in self.entries]
        self._current: Any = itemgetter(*names, names[0])
        self.originals = {e.name: e.original for e in self.entries}
        self.stand_ins = {e.name: e.stand_in for e in self.entries}
        self._expected = self._current(self.originals)
        self._placed = self._current(self.stand_ins)
        # From now on only what has changed is looked at.
        self.put_in = self._put_in
        self._put_in()

    def _put_in(self) -> None:
        if self._current(self.namespace) != self._expected:
            for entry in self.entries:
                entry.refresh(self.namespace[entry.name])
            del self.put_in
            self.put_in()
            return
        self.namespace.update(self.stand_ins)

    def take_out(self) -> None:
        if self._current(self.namespace) == self._placed:
            self.namespace.update(self.originals)
            return
        # What was put over ours meanwhile belongs to somebody else.
        for entry in self.entries:
            if self.namespace[entry.name] is entry.stand_in:
                self.namespace[entry.name] = entry.original


_table: dict[tuple[Any, str], Interception] = {}
_modules: dict[Any, _Module] = {}
_on_types: list[Interception] = []
_lock = threading.RLock()
_users = 0
_types_replaced = False


def intercept(owner: Any, name: str, *, outside: bool = False) -> Callable[[F], F]:
    """Register the decorated function to stand in for `owner.name` inside transforms.

    The handler gets the caller's arguments as they were written; a property's gets the object.
    Inside it, `original(owner, name)` is MLX's own function (or property). With `outside` it is
    called while interception is in place and no function is traced, too.
    """

    def register(handler: F) -> F:
        assert (owner, name) not in _table, f"{name} of {owner} has a handler"
        with _lock:
            entry = _table[owner, name] = Interception(owner, name, handler, outside)
            if isinstance(owner, ModuleType):
                module = _modules.setdefault(owner, _Module(owner))
                module.entries.append(entry)
                module.__dict__.pop("put_in", None)
            else:
                _restore_types()
                _on_types.append(entry)
        return handler

    return register


def original(owner: Any, name: str) -> Any:
    """The function, or the property, that `owner.name` is outside every transform."""
    entry = _table.get((owner, name))
    if entry is not None and _users:
        return entry.original
    current = getattr(owner, name)
    return current if entry is None or current is not entry.stand_in else entry.original


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
            for module in _modules.values():
                module.put_in()
            if not _types_replaced:
                _replace_types()
        _users += 1


def _leave() -> None:
    global _users
    with _lock:
        _users -= 1
        if _users == 0:
            for module in _modules.values():
                module.take_out()


def _replace_types() -> None:
    global _types_replaced
    for entry in _on_types:
        entry.refresh(getattr(entry.owner, entry.name))
        setattr(entry.owner, entry.name, entry.stand_in)
    _types_replaced = True


def _restore_types() -> None:
    global _types_replaced
    with _lock:
        if _users == 0 and _types_replaced:
            _types_replaced = False
            for entry in _on_types:
                if getattr(entry.owner, entry.name) is entry.stand_in:
                    setattr(entry.owner, entry.name, entry.original)
