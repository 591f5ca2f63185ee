"""The arrays of a module: where they are, others put in their place, and all of it put back.

Everything here works on the caller's own module and puts it back on every way out, so that what
reaches the module another way (a loss that closes over it, a bound method it keeps) sees the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn


class Location:
    """One place of an array: `owner[key]`, in a module or in a container inside one."""

    __slots__ = ("key", "name", "owner")

    def __init__(self, owner: Any, key: Any, name: str) -> None:
        self.owner, self.key, self.name = owner, key, name

    def get(self) -> mx.array:
        return self.owner[self.key]

    def put(self, value: mx.array) -> None:
        self.owner[self.key] = value


class Locations:
    """The places of the arrays of `tree`, a tree such as `model.trainable_parameters()`.

    A module that the model has twice is there twice in the tree, but is one place: `unique` has
    it once, under the last of its names, the one that `nn.Module.update` lets win.
    """

    def __init__(self, model: nn.Module, tree: Any) -> None:
        self.all: list[Location] = []
        self.tree = self._find(model, tree, "")
        places = {(id(at.owner), at.key): at for at in self.all}
        self.unique: list[Location] = list(places.values())
        numbers = {key: i for i, key in enumerate(places)}
        #: Which of `unique` each place is, by the identities of `all`, and if under that name.
        self._index: dict[int, tuple[int, bool]] = {}
        for at in self.all:
            i = numbers[id(at.owner), at.key]
            self._index[id(at)] = i, self.unique[i] is at

    def _find(self, owner: Any, tree: Any, name: str) -> Any:
        pairs = tree.items() if isinstance(tree, dict) else enumerate(tree)
        found = []
        for key, child in pairs:
            path = f"{name}.{key}" if name else str(key)
            if isinstance(child, mx.array):
                found.append(Location(owner, key, path))
                self.all.append(found[-1])
            elif isinstance(child, (dict, list, tuple)):
                found.append(self._find(owner[key], child, path))
            else:
                found.append(child)
        return dict(zip(tree, found)) if isinstance(tree, dict) else found

    def tree_of(self, values: Sequence[mx.array]) -> Any:
        """`values`, one for each of `unique`, in the form of the tree.

        A place that is there under several names has its value under the last, zeros elsewhere,
        as the gradients of `nn.value_and_grad` have.
        """

        return self._fill(self.tree, values)

    def _fill(self, node: Any, values: Sequence[mx.array]) -> Any:
        # No closure that calls itself: it would keep the values until the next garbage collection.
        if type(node) is Location:
            i, itself = self._index[id(node)]
            return values[i] if itself else mx.zeros_like(values[i])
        if isinstance(node, dict):
            return {key: self._fill(child, values) for key, child in node.items()}
        if isinstance(node, list):
            return [self._fill(child, values) for child in node]
        return node


def trainable(model: nn.Module) -> Locations:
    return Locations(model, model.trainable_parameters())


@contextmanager
def substituted(places: Sequence[Location], values: Sequence[mx.array]) -> Iterator[None]:
    """Other arrays in these places, for as long as it lasts."""
    before = [place.get() for place in places]
    for place, value in zip(places, values):
        place.put(value)
    try:
        yield
    finally:
        for place, value in zip(places, before):
            place.put(value)


class Layout:
    """What a model is made of, the values of its arrays apart: found once, and known again."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.places = trainable(model)
        #: The places, by their number, whose arrays are used in ways that no tape knows; None as
        #: long as nothing is known.
        self.by_copies: set[int] | None = None
        #: All modules and containers in it, each once.
        self.nodes = _containers(model)
        self._forms = [
            (
                node,
                type(node),
                list(node) if isinstance(node, dict) else None,
                [_ARRAY if isinstance(child, mx.array) else child for child in _children(node)],
                set(vars(node).get("_no_grad", ())) if isinstance(node, nn.Module) else None,
            )
            for node in self.nodes
        ]

    def fits(self) -> bool:
        """Whether the model is still made so."""
        if not _says_what_is_trainable(self.model):
            return False
        for node, kind, keys, children, frozen in self._forms:
            if type(node) is not kind:
                return False
            if keys is None:
                now = node
            elif list(node) == keys:
                now = node.values()
            else:
                return False
            if len(now) != len(children):
                return False
            for child, kept in zip(now, children):
                if child is not kept and not (kept is _ARRAY and isinstance(child, mx.array)):
                    return False
            if frozen is not None and vars(node).get("_no_grad", ()) != frozen:
                return False
        return True


_ARRAY = object()


def _says_what_is_trainable(model: nn.Module) -> bool:
    """Whether the form of the model alone does: no method of its own has a say."""
    plain = nn.Module
    return (
        getattr(model.trainable_parameters, "__func__", None) is plain.trainable_parameters
        and getattr(model.filter_and_map, "__func__", None) is plain.filter_and_map
        and model.trainable_parameter_filter is plain.trainable_parameter_filter
    )


def _children(node: Any) -> Any:
    return node.values() if isinstance(node, dict) else node


def _containers(model: nn.Module) -> list[Any]:
    """All modules, dicts and lists in it, each once."""
    found: dict[int, Any] = {}
    _look(model, found)
    return list(found.values())


def _look(node: Any, found: dict[int, Any]) -> None:
    if isinstance(node, tuple):
        for child in node:
            _look(child, found)
    elif isinstance(node, (dict, list)) and id(node) not in found:
        found[id(node)] = node
        for child in _children(node):
            if not isinstance(child, mx.array):
                _look(child, found)


class Snapshot:
    """What modules and containers hold: arrays, attributes, all."""

    def __init__(self, nodes: Sequence[Any]) -> None:
        self._saved: list[tuple[Any, Any, dict[str, Any] | None]] = []
        for node in nodes:
            own = dict(vars(node)) if isinstance(node, nn.Module) else None
            self._saved.append((node, node.copy() if isinstance(node, list) else dict(node), own))

    def restore(self) -> None:
        for node, content, own in self._saved:
            if own is not None:
                now = vars(node)
                now.clear()
                now.update(own)
            if isinstance(node, list):
                node[:] = content
            else:
                dict.clear(node)
                dict.update(node, content)


@contextmanager
def untouched(model: nn.Module | Layout) -> Iterator[Snapshot]:
    """Whatever happens inside, the model is afterwards as it was."""
    snapshot = Snapshot(model.nodes if isinstance(model, Layout) else _containers(model))
    try:
        yield snapshot
    finally:
        snapshot.restore()
