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
        self._index = {key: i for i, key in enumerate(places)}

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
        if isinstance(node, dict):
            return {key: self._fill(child, values) for key, child in node.items()}
        if isinstance(node, list):
            return [self._fill(child, values) for child in node]
        if not isinstance(node, Location):
            return node
        i = self._index[id(node.owner), node.key]
        return values[i] if self.unique[i] is node else mx.zeros_like(values[i])


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


class Snapshot:
    """What modules hold: arrays, attributes, all."""

    def __init__(self, *models: nn.Module) -> None:
        self._saved: dict[int, tuple[Any, Any, Any]] = {}
        for model in models:
            self._save(model)
        #: All modules in them, each once.
        self.modules: list[nn.Module] = [
            node for node, _, own in self._saved.values() if own is not None
        ]

    def _save(self, node: Any) -> None:
        if isinstance(node, tuple):
            for child in node:
                self._save(child)
        elif isinstance(node, (dict, list)) and id(node) not in self._saved:
            own = dict(vars(node)) if isinstance(node, nn.Module) else None
            self._saved[id(node)] = node, node.copy() if isinstance(node, list) else dict(node), own
            for child in node.values() if isinstance(node, dict) else node:
                if not isinstance(child, mx.array):
                    self._save(child)

    def restore(self) -> None:
        for node, content, own in self._saved.values():
            if own is not None:
                vars(node).clear()
                vars(node).update(own)
            if isinstance(node, list):
                node[:] = content
            else:
                dict.clear(node)
                dict.update(node, content)


@contextmanager
def untouched(*models: nn.Module) -> Iterator[Snapshot]:
    """Whatever happens inside, the modules are afterwards as they were."""
    snapshot = Snapshot(*models)
    try:
        yield snapshot
    finally:
        snapshot.restore()
