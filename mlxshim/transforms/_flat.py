"""Trees that have to keep their form: a loop's value, the outputs of branches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx

from ..core import trees
from ..core.levels import standing_in


class Slot:
    """The place of an array in a tree."""

    __slots__ = ("index",)

    def __init__(self, index: int) -> None:
        self.index = index

    def __repr__(self) -> str:
        return "*"


def is_number(leaf: Any) -> bool:
    return isinstance(leaf, (bool, int, float, complex)) or is_numpy(leaf)


def is_numpy(leaf: Any) -> bool:
    """Whether it holds numbers of NumPy's, which is not imported for that: no texts, no objects."""
    return (
        type(leaf).__module__ == "numpy"
        and hasattr(leaf, "dtype")
        and getattr(leaf.dtype, "kind", "O") not in "OSTUMm"
    )


def becomes(number: Any, dtype: mx.Dtype) -> bool:
    """Whether a Python number may be of that dtype: nothing is cut off."""
    if isinstance(number, bool):
        return dtype == mx.bool_
    if isinstance(number, int):
        return dtype != mx.bool_
    if isinstance(number, float):
        return mx.issubdtype(dtype, mx.inexact)
    return isinstance(number, complex) and mx.issubdtype(dtype, mx.complexfloating)


def as_arrays(tree: Any) -> Any:
    """`tree` with numbers made arrays, and every array one of its own.

    What is selected is a new array, and what is taken as it is has to be one too: the caller may
    write to either, and the other stays as it was.
    """
    return trees.map_leaves(
        lambda x: mx.array(x) if isinstance(x, mx.array) or is_number(x) else x, tree
    )


def apart(tree: Any) -> Any:
    """`tree` with every array one of its own, and numbers as they are."""
    return trees.map_leaves(lambda x: mx.array(x) if isinstance(x, mx.array) else x, tree)


def flatten(tree: Any, numbers: bool = True) -> tuple[list[mx.array], Any]:
    """The arrays of a tree, `numbers` among them, and the tree of slots they came from."""
    arrays: list[mx.array] = []

    def take(leaf: Any) -> Any:
        if numbers and is_number(leaf):
            leaf = mx.array(leaf)
        if not isinstance(leaf, mx.array):
            return leaf
        arrays.append(leaf)
        return Slot(len(arrays) - 1)

    return arrays, trees.map_leaves(take, tree)


def unflatten(slots: Any, arrays: Any) -> Any:
    return trees.map_leaves(lambda s: arrays[s.index] if type(s) is Slot else s, slots)


def like(
    tree: Any, example: Any, complain: Callable[[str], Exception], path: trees.Path = ()
) -> Any:
    """`tree` with its numbers as the arrays that `example` has in their place, none of them shared.

    Raises what `complain` makes of the difference if it has another structure, shape or dtype.
    """
    below, other = trees.children(tree), trees.children(example)
    if below is None and other is None:
        if isinstance(example, mx.array) or is_number(example):
            return _array_like(tree, example, complain, path)
        if isinstance(tree, mx.array) or is_number(tree) or (tree is None) != (example is None):
            raise complain(f"{_at(path)} is {describe(tree)} in place of {describe(example)}")
        return tree
    if below is None or other is None or type(tree) is not type(example):
        raise complain(f"{_at(path)} is {describe(tree)} in place of {describe(example)}")
    by_key = dict(other)
    if set(by_key) != {key for key, _ in below}:
        raise complain(f"{_at(path)} has {describe(tree)} in place of {describe(example)}")
    return trees.rebuild(
        tree, [like(child, by_key[key], complain, (*path, key)) for key, child in below]
    )


def _array_like(
    leaf: Any, example: Any, complain: Callable[[str], Exception], path: trees.Path
) -> mx.array:
    example = example if isinstance(example, mx.array) else mx.array(example)
    if is_number(leaf):
        leaf = mx.array(leaf, example.dtype if becomes(leaf, example.dtype) else None)
    if not isinstance(leaf, mx.array) or leaf.shape != example.shape or leaf.dtype != example.dtype:
        raise complain(f"{_at(path)} is {describe(leaf)} in place of {describe(example)}")
    return mx.array(leaf)


def _at(path: trees.Path) -> str:
    return "its entry " + trees.written(path) if path else "it"


def callable_of(fun: Any, function: str, argument: str, of: str) -> Callable[..., Any]:
    """`fun`, or what stands in for it, if it can be called."""
    if not callable(fun):
        raise TypeError(
            f"[{function}] {argument} must be a function of {of}, found {describe(fun)}."
        )
    return standing_in(fun)


def describe(node: Any) -> str:
    if isinstance(node, mx.array):
        return f"{str(node.dtype).removeprefix('mlx.core.')}{list(node.shape)}"
    return trees.describe(node)
