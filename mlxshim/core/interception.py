"""Scoped interception: MLX's own functions are replaced while a transform runs, and only then.

Library code (`mlx.nn`, mlx-lm, …) looks an operation up by attribute at call time, so replacing
the attribute for the length of a transform reaches it. The replacement is visible to every thread,
but takes over only in a thread that is tracing; in any other it is a plain call of the original.

A module is of another class while a transform runs, and of its own on every way out. A type
(`mx.array`) is changed method by method: its replacements stay behind when the last transform ends.
A call of one outside a transform goes on to MLX's own; some of those in a row put all of them back,
as an exception does, and whoever asks for `names_in_place`. A program that calls a transform, looks
at the result, and calls it again has the methods in place all along.

MLX's own transforms are replaced for the length of a *block* (`patched()`), too, where the thread
that is inside it sees ours and every other one MLX's.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any, TypeVar

from . import compilation, levels

F = TypeVar("F", bound=Callable[..., Any])


class Interception:
    """One attribute of an MLX module or type, and what stands in for it while a transform runs."""

    def __init__(
        self,
        owner: Any,
        name: str,
        handler: Callable[..., Any],
        outside: bool = False,
        patched: bool = False,
        late: bool = False,
    ) -> None:
        self.owner, self.name, self.handler = owner, name, handler
        self.outside, self.patched, self.late = outside, patched, late
        self.original: Any = getattr(owner, name)
        self.stand_in = self._new_stand_in()
        levels.stands_in(self.stand_in, self.original)

    def _new_stand_in(self) -> Any:
        of_property = isinstance(self.original, property)
        original: Any = self.original.fget if of_property else self.original
        handler, active = self.handler, levels.active
        outside, patched = self.outside, self.patched
        on_type = not isinstance(self.owner, ModuleType)

        # MLX's getters have no names.
        @functools.wraps(original, ("__doc__",) if of_property else functools.WRAPPER_ASSIGNMENTS)
        def stand_in(*args: Any, **kwargs: Any) -> Any:
            # One that somebody has wrapped and put back is out of date, and stands aside.
            takes_over = active() or outside or (patched and in_block())
            if takes_over and self.call is stand_in:
                return handler(*args, **kwargs)
            if on_type and not _calls:
                _forwarded()
            return original(*args, **kwargs)

        self.call = stand_in
        return property(stand_in) if of_property else stand_in

    def refresh(self, current: Any) -> None:
        """Stand in for `current`: somebody may have replaced the function before we came."""
        if current is not self.original and current is not self.stand_in:
            self.original = current
            self.stand_in = self._new_stand_in()
            levels.stands_in(self.stand_in, current)


class _Module:
    """All that is intercepted in one module, which is of another class while a transform runs.

    A property of its class comes before what is in a module's dictionary: one assignment of
    `__class__` puts every replacement in place, however many there are, and the dictionary stays
    as it is.
    """

    def __init__(self, owner: ModuleType) -> None:
        self.owner, self.plain = owner, type(owner)
        self.replaced = type(f"Intercepted_{owner.__name__}", (self.plain,), self._look_up())
        #: Its class while there is a block and no transform runs.
        self.patched = self.plain

    def _look_up(self) -> dict[str, Any]:
        """The class' own way to an attribute.

        From CPython 3.14 on an instruction that has seen the module reads its dictionary without
        asking the class, unless that looks attributes up by another function than modules do.
        """
        members: dict[str, Any] = {}
        if self.plain is ModuleType:
            members["__getattribute__"] = object.__getattribute__
            if "__getattr__" in vars(self.owner):  # mlx.core.random has its state so
                members["__getattr__"] = lambda _, name: vars(self.owner)["__getattr__"](name)
        return members

    def add(self, entry: Interception) -> None:
        namespace, name = vars(self.owner), entry.name

        def get(_: Any) -> Any:
            # Looked up anew: what somebody has put into the module, before or meanwhile, is what
            # we stand in for.
            try:
                current = namespace[name]
            except KeyError:
                raise AttributeError(name) from None
            if current is not entry.original:
                entry.refresh(current)
            return entry.stand_in

        def put(_: Any, value: Any) -> None:
            namespace[name] = value

        def delete(_: Any) -> None:
            del namespace[name]

        setattr(self.replaced, name, property(get, put, delete))
        if not entry.patched:
            return
        if self.patched is self.plain:
            self.patched = type(f"Patched_{self.owner.__name__}", (self.plain,), self._look_up())

        def get_patched(module: Any) -> Any:
            return get(module) if in_block() or name not in namespace else namespace[name]

        setattr(self.patched, name, property(get_patched, put, delete))


def _take_out() -> None:
    for module in _modules.values():
        module.owner.__class__ = module.patched if _blocks else module.plain


_table: dict[tuple[Any, str], Interception] = {}
_modules: dict[Any, _Module] = {}
_on_types: list[Interception] = []
_get_ident = threading.get_ident
_lock = threading.RLock()
#: The calls of transforms that are under way, and the thread of each.
_calls: dict[object, int] = {}
#: The blocks that are open, and the thread of each; those threads.
_blocks: dict[object, int] = {}
_block_threads: frozenset[int] = frozenset()
#: Whether the methods of types are replaced, and those that only are where a mark may be lost.
_types_replaced = _late_replaced = False
#: How many calls of theirs have been forwarded since a transform ran, and how many cost what it
#: does to put all of them back and in place again.
_forwards, _ENOUGH = 0, 64


def intercept(
    owner: Any, name: str, *, outside: bool = False, patched: bool = False, late: bool = False
) -> Callable[[F], F]:
    """Register the decorated function to stand in for `owner.name` inside transforms.

    The handler gets the caller's arguments as they were written; a property's gets the object.
    Inside it, `original(owner, name)` is MLX's own function (or property). With `outside` it is
    called while interception is in place and no function is traced, too; with `patched`, which is
    for functions of modules, inside a block. With `late`, which is for methods of types, nothing
    stands in before a tracer may have lost its mark (`levels.unmark`).
    """

    def register(handler: F) -> F:
        assert (owner, name) not in _table, f"{name} of {owner} has a handler"
        with _lock:
            entry = _table[owner, name] = Interception(owner, name, handler, outside, patched, late)
            if isinstance(owner, ModuleType):
                if owner not in _modules:
                    _modules[owner] = _Module(owner)
                _modules[owner].add(entry)
            else:
                _restore_types()
                _on_types.append(entry)
        return handler

    return register


def original(owner: Any, name: str) -> Any:
    """The function, or the property, that `owner.name` is outside every transform."""
    entry = _table.get((owner, name))
    if entry is None:
        return getattr(owner, name)
    if _calls:
        return entry.original
    current = vars(owner)[name] if isinstance(owner, ModuleType) else getattr(owner, name)
    return current if current is not entry.stand_in else entry.original


def in_place() -> bool:
    """Whether interception is in place now, in any thread."""
    return bool(_calls)


def names_in_place() -> list[str]:
    """The names of MLX that are not MLX's own now, such as "mlx.core.array.sum".

    Empty outside transforms: what the last one has left in place is put back first.

    Example:
        >>> import mlx.core as mx
        >>> from mlxshim import intercepted, vmap
        >>> intercepted()
        []
        >>> def f(x):
        ...     assert "mlx.core.fast.rms_norm" in intercepted()
        ...     return x
        >>> vmap(f)(mx.array([1, 2]))
        array([1, 2], dtype=int32)
    """
    _restore_types()
    with _lock:
        return [
            f"{_name_of(e.owner)}.{e.name}"
            for e in _table.values()
            if getattr(e.owner, e.name) is e.stand_in
        ]


def _name_of(owner: Any) -> str:
    if isinstance(owner, ModuleType):
        return owner.__name__
    return f"{owner.__module__}.{owner.__name__}"


def intercepted(fun: Callable[..., Any]) -> Callable[..., Any]:
    """`fun`, run with every registered interception in place; undone on every way out."""

    def scoped(*args: Any, **kwargs: Any) -> Any:
        call, place = object(), levels.place()
        try:
            _enter(call)
            return fun(*args, **kwargs)
        except BaseException:
            _leave(call, place)
            _restore_types()
            raise
        finally:
            try:
                _leave(call, place)
            except BaseException:  # interrupted
                _leave(call, place)
                raise

    # mx.grad(f) is a callable of MLX's without a name: then there is nothing to copy.
    return functools.update_wrapper(scoped, fun, updated=())


def _enter(call: object) -> None:
    global _forwards
    with _lock:
        first = not _calls
        _calls[call] = _get_ident()
        if first:
            _forwards = 0
            for module in _modules.values():
                module.owner.__class__ = module.replaced
            if not _types_replaced:
                _replace_types()


def _leave(call: object, place: tuple[int, int, int, int]) -> None:
    """May be called again, and goes on where it was interrupted."""
    levels.back_to(place)
    if call not in _calls:
        return
    with _lock:
        if len(_calls) == 1:
            _take_out()
        del _calls[call]


def in_block() -> bool:
    """Whether this thread is inside a block."""
    return threading.get_ident() in _block_threads


def open_block(block: object) -> None:
    """MLX's own transforms stand for ours in this thread, until this block is closed."""
    with _lock:
        _blocks[block] = threading.get_ident()
        _blocks_changed()


def close_block(block: object) -> None:
    """May be called again, and for a block whose opening was interrupted."""
    with _lock:
        _blocks.pop(block, None)
        _blocks_changed()


def _blocks_changed() -> None:
    global _block_threads
    _block_threads = frozenset(_blocks.values())
    if not _calls:
        _take_out()


def _after_fork() -> None:
    global _lock
    _lock = threading.RLock()
    compilation.after_fork()
    here = threading.get_ident()
    for call, thread in list(_calls.items()):
        if thread != here:
            _leave(call, levels.place())
    for block, thread in list(_blocks.items()):
        if thread != here:
            close_block(block)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _replace_types() -> None:
    global _types_replaced
    _types_replaced = True
    _replace(late=False)


def _replace_late() -> None:
    global _late_replaced
    if not _late_replaced:
        with _lock:
            if _types_replaced:
                _late_replaced = True
                _replace(late=True)


levels.when_unmarked(_replace_late)


def _replace(late: bool) -> None:
    for entry in _on_types:
        if entry.late == late:
            entry.refresh(getattr(entry.owner, entry.name))
            setattr(entry.owner, entry.name, entry.stand_in)


def _forwarded() -> None:
    """Said of each call of a replaced method while no transform runs."""
    global _forwards
    _forwards += 1
    if _forwards >= _ENOUGH:
        _restore_types()


def _restore_types() -> None:
    global _types_replaced, _late_replaced
    if not _types_replaced:
        return
    with _lock:
        if not _calls:
            for entry in _on_types:
                if getattr(entry.owner, entry.name) is entry.stand_in:
                    setattr(entry.owner, entry.name, entry.original)
            _types_replaced = _late_replaced = False
