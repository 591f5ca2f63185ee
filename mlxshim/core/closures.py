"""What a function has captured, taken out of it, so that it can be called later with other arrays.

A batching rule runs after the traced function has returned. A user's function that such a rule
calls must not read what it captured from there: a mapped array is a placeholder that is dead by
then, and a variable of the enclosing function may have changed since. So the function is copied
when it is handed over: its cells, its defaults, the arguments of a `functools.partial`, the object
of a bound method, the containers in them, and in turn the functions found there; arrays become
arguments. What cannot be copied is remembered, and a change of it is found out.
"""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from . import trees
from .errors import NoBatchingRule


class Closure:
    """`functions`, with every captured array an argument.

    `arrays` has what they captured; `call(arrays, use)` is `use(*functions)` with the same
    functions around others.

    Raises `NoBatchingRule`, which makes vmap a loop, where the functions are not what they seem:
    one assigns a captured variable, changes a captured container or object, or something has
    changed one since. With `logs`, a function may append to a list that it captured: that is for
    functions that are to run as often as they are called.
    """

    def __init__(self, functions: Sequence[Any], logs: bool = False) -> None:
        self.arrays: list[mx.array] = []
        #: Whether something was met that may hold arrays, and was not taken apart.
        self.hides = False
        #: Whether an array was met in something that cannot be taken apart.
        self.loses = False
        self._plans: dict[int, Any] = {}
        self._kept: dict[int, Kept] = {}
        self._alive: list[Any] = []  # an id is good only as long as its object lives
        self._logs = logs
        self._functions = [self._planned(f) for f in functions]

    def call(self, arrays: Sequence[mx.array], use: Callable[..., Any]) -> Any:
        self._check("has been changed since", "pass what it reads as an argument, or change a copy")
        made = _Made(arrays)
        try:
            result = use(*(made.of(plan) for plan in self._functions))
            made.check()
            self._check("is changed by it", _RETURN)
        finally:
            # What a trace has put there is of no use to anybody.
            for kept in self._kept.values():
                if kept.changed(self._logs):
                    kept.restore()
        return result

    def _check(self, what: str, remedy: str) -> None:
        for kept in self._kept.values():
            if kept.changed(self._logs):
                kind = type(kept.thing).__name__
                raise _refusal(f"a {kind} that a function has captured {what}", remedy)

    # What to make of a value: itself, or a `_Plan` of a copy.

    def _planned(self, value: Any) -> Any:
        known = self._plans.get(id(value))
        if known is None:
            self._alive.append(value)
            known = self._plans[id(value)] = self._plan(value)
        return known

    def _plan(self, value: Any) -> Any:
        if isinstance(value, mx.array):
            self.arrays.append(value)
            return _Slot(len(self.arrays) - 1)
        if isinstance(value, types.FunctionType):
            if value.__globals__.get("__name__", "").startswith("mlxshim."):
                # A transform is not taken apart, only what it transforms remembered.
                wrapped = self._planned(getattr(value, "__wrapped__", None))
                self.hides = True
                self.loses = self.loses or isinstance(wrapped, _Plan)
                return value
            if not (value.__closure__ or value.__defaults__ or value.__kwdefaults__):
                return value
            plan = self._plans[id(value)] = _Function(value)  # it may contain itself
            plan.cells = [self._cell(cell) for cell in value.__closure__ or ()]
            plan.defaults = self._planned(value.__defaults__)
            plan.kwdefaults = self._planned(value.__kwdefaults__)
            return plan
        if isinstance(value, types.MethodType):
            return _Call(
                types.MethodType, [self._planned(value.__func__), self._planned(value.__self__)]
            )
        if type(value) is functools.partial:
            parts = (value.func, value.args, value.keywords)
            return _Call(_partial, [self._planned(part) for part in parts])
        names = getattr(type(value), "holds_functions", ())
        if names:
            plan = self._plans[id(value)] = _Object(value)
            plan.attributes = {name: self._planned(getattr(value, name)) for name in names}
            return plan
        below = trees.children(value)
        if below is not None:
            planned = [self._planned(child) for _, child in below]
            if any(isinstance(plan, _Plan) for plan in planned):
                return _Container(value, planned)
            if isinstance(value, (list, dict)):
                self._kept[id(value)] = Kept(value)
        elif hasattr(value, "__dict__") and not isinstance(value, _CONSTANT):
            self._kept[id(value)] = Kept(value)
            self.hides = True
            held = trees.leaves(dict(vars(value)))
            self.loses = self.loses or any(isinstance(x, mx.array) for _, x in held)
        elif not isinstance(value, _HARMLESS):
            self.hides = True
        return value

    def _cell(self, cell: types.CellType) -> Any:
        try:
            return self._planned(cell.cell_contents)
        except ValueError:  # a variable that is assigned further down
            return _EMPTY


_CONSTANT = (type, types.ModuleType, types.BuiltinFunctionType, types.FunctionType, type(mx.sin))
_HARMLESS = (
    *_CONSTANT,
    *(type(None), bool, int, float, complex, str, bytes, mx.Dtype, slice, range, type(...)),
)
_EMPTY = object()


_RETURN = "return the new value instead, in a loop as a part of what it carries"


def _refusal(what: str, remedy: str) -> NoBatchingRule:
    return NoBatchingRule(f"{what}, so it cannot be traced once for all samples: {remedy}")


def _partial(function: Any, args: Any, keywords: Any) -> Any:
    return functools.partial(function, *args, **keywords)


class Kept:
    """A container or an object that stays what it is, and what was in it."""

    def __init__(self, thing: Any) -> None:
        self.thing = thing
        self.before = self._now()

    def _now(self) -> list[tuple[Any, Any]]:
        children = trees.children(self.thing)
        return list(vars(self.thing).items()) if children is None else children

    def changed(self, logs: bool = False) -> bool:
        now = self._now()
        if logs and isinstance(self.thing, list):
            del now[len(self.before) :]
        return len(now) != len(self.before) or any(
            k1 != k2 or v1 is not v2 for (k1, v1), (k2, v2) in zip(now, self.before)
        )

    def restore(self, logs: bool = False) -> None:
        """With `logs`, what has been appended to a list stays."""
        if not self.changed(logs):
            return
        if isinstance(self.thing, list):
            end = len(self.before) if logs else None
            self.thing[:end] = [child for _, child in self.before]
            return
        into = self.thing if isinstance(self.thing, dict) else vars(self.thing)
        dict.clear(into)
        dict.update(into, self.before)


# Plans of copies -------------------------------------------------------------------------------


class _Plan:
    pass


class _Slot(_Plan):
    def __init__(self, index: int) -> None:
        self.index = index


class _Function(_Plan):
    def __init__(self, function: types.FunctionType) -> None:
        self.function = function
        self.cells: list[Any] = []
        self.defaults: Any = None
        self.kwdefaults: Any = None


class _Call(_Plan):
    def __init__(self, maker: Callable[..., Any], parts: list[Any]) -> None:
        self.maker, self.parts = maker, parts


class _Object(_Plan):
    """One of ours with a user's functions, in the attributes that `holds_functions` names."""

    def __init__(self, like: Any) -> None:
        self.like = like
        self.attributes: dict[str, Any] = {}


class _Container(_Plan):
    def __init__(self, like: Any, children: list[Any]) -> None:
        self.like, self.children = like, children
        self.keys = [key for key, _ in trees.children(like) or ()]


class _Made:
    """The copies for one call, around given arrays."""

    def __init__(self, arrays: Sequence[mx.array]) -> None:
        self.arrays = arrays
        self._done: dict[int, Any] = {}
        self._cells: list[tuple[types.CellType, Any]] = []
        self._containers: list[Kept] = []

    def of(self, plan: Any) -> Any:
        if not isinstance(plan, _Plan):
            return plan
        if isinstance(plan, _Slot):
            return self.arrays[plan.index]
        if id(plan) in self._done:
            return self._done[id(plan)]
        if isinstance(plan, _Function):
            return self._function(plan)
        if isinstance(plan, _Object):
            made = self._done[id(plan)] = copy.copy(plan.like)
            vars(made).update({name: self.of(x) for name, x in plan.attributes.items()})
            return made
        if isinstance(plan, _Call):
            made = plan.maker(*(self.of(part) for part in plan.parts))
        else:
            assert isinstance(plan, _Container)
            made = trees.rebuild(plan.like, [self.of(child) for child in plan.children])
            self._containers.append(Kept(made))
        self._done[id(plan)] = made
        return made

    def _function(self, plan: _Function) -> types.FunctionType:
        old = plan.function
        cells = tuple(types.CellType() for _ in plan.cells)
        new = types.FunctionType(old.__code__, old.__globals__, old.__name__, None, cells)
        self._done[id(plan)] = new
        for cell, content in zip(cells, plan.cells):
            if content is not _EMPTY:
                cell.cell_contents = self.of(content)
                self._cells.append((cell, cell.cell_contents))
        new.__defaults__ = self.of(plan.defaults)
        new.__kwdefaults__ = self.of(plan.kwdefaults)
        new.__dict__.update(old.__dict__)
        return new

    def check(self) -> None:
        if any(cell.cell_contents is not content for cell, content in self._cells):
            raise _refusal("a function assigns a variable that it has captured", _RETURN)
        if any(kept.changed() for kept in self._containers):
            raise _refusal("a function changes a container that it has captured", _RETURN)
