"""Arguments and outputs taken apart: what has a derivative, what goes along, how it is put back.

The leaves that have a derivative are floating or complex arrays. Integer arrays have none: where
JAX has float0, zeros of the integer's own dtype stand here. None is an empty tree, as in JAX. An
`nn.Module` may hold anything: what is no floating array in it goes along as it is.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from ..core import trees
from ..core.errors import ArgumentError
from ._flat import is_number

REAL = frozenset((mx.float32, mx.float16, mx.bfloat16, mx.float64))


class Hole:
    """The place of a leaf that has a derivative."""

    __slots__ = ("index",)

    def __init__(self, index: int) -> None:
        self.index = index


class Fixed:
    """What an `nn.Module` holds besides floating arrays."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value


class Parts:
    """A tree taken apart into `arrays`, which have a derivative, and everything else.

    `names(path)` is who complains of a leaf, and the leaf's name. Python floats, complex numbers
    and NumPy arrays become arrays; what is no number is refused.
    """

    def __init__(self, tree: Any, names: Callable[[trees.Path], tuple[str, str]]) -> None:
        self.arrays: list[mx.array] = []
        self.names = names
        self.integers = False
        self.tree = self._walk(tree, (), False)

    def _walk(self, node: Any, path: trees.Path, module: bool) -> Any:
        if node is None:
            return None
        below = None if isinstance(node, mx.array) else trees.children(node)
        if below is None:
            return self._leaf(node, path, module)
        module = module or is_module(node)
        return trees.rebuild(node, [self._walk(x, (*path, key), module) for key, x in below])

    def _leaf(self, leaf: Any, path: trees.Path, module: bool) -> Any:
        x = leaf
        if not isinstance(x, mx.array):
            if module:
                return Fixed(leaf)
            x = as_array(leaf)
            if x is None:
                raise ArgumentError(
                    f"{self.what(path)} is {describe(leaf)}: it must be an array or a number."
                )
        if x.dtype in REAL or x.dtype == mx.complex64:
            self.arrays.append(x)
            return Hole(len(self.arrays) - 1)
        self.integers = self.integers or not module
        return Fixed(x) if module else x

    def what(self, path: trees.Path) -> str:
        """A leaf as the beginning of a sentence."""
        tag, name = self.names(path)
        return f"[{tag}] {name[:1].upper()}{name[1:]}"

    def _of(self, what: str, path: trees.Path) -> str:
        tag, name = self.names(path)
        return f"[{tag}] The {what} of {name}"

    @property
    def complex(self) -> bool:
        return any(x.dtype == mx.complex64 for x in self.arrays)

    def fill(self, arrays: Sequence[mx.array]) -> Any:
        """The tree around other arrays."""

        def leaf(x: Any) -> Any:
            if type(x) is Hole:
                return arrays[x.index]
            return x.value if type(x) is Fixed else x

        return trees.map_leaves(leaf, self.tree)

    def derivatives(self, arrays: Sequence[Any]) -> Any:
        """The tree around gradients or tangents: zeros for integers, None for what is fixed."""
        return self.map_holes(lambda n: arrays[n])

    def map_holes(
        self, fun: Callable[[int], Any], integer: Callable[[mx.array], Any] = mx.zeros_like
    ) -> Any:
        def leaf(x: Any) -> Any:
            if type(x) is Hole:
                return fun(x.index)
            return integer(x) if isinstance(x, mx.array) else None

        return trees.map_leaves(leaf, self.tree)

    def first(self, wanted: Callable[[mx.array], bool]) -> tuple[trees.Path, mx.array] | None:
        """The first leaf with a property, and its path."""
        for path, leaf in trees.leaves(self.tree):
            x = self.arrays[leaf.index] if type(leaf) is Hole else leaf
            if isinstance(x, mx.array) and wanted(x):
                return path, x
        return None

    def match(self, tree: Any, what: str) -> list[mx.array]:
        """The arrays of a `tree` of tangents or cotangents that goes with this one."""
        found: list[Any] = [None] * len(self.arrays)
        self._match(self.tree, tree, (), what, found)
        return found

    def _match(self, node: Any, other: Any, path: trees.Path, what: str, found: list[Any]) -> None:
        kind = type(node)
        if kind is Hole:
            found[node.index] = self._one(self.arrays[node.index], other, path, what)
            return
        if kind is Fixed:
            return
        if isinstance(node, mx.array):
            if other is None or (
                isinstance(other, mx.array)
                and other.dtype == node.dtype
                and other.shape == node.shape
            ):
                return
            raise ArgumentError(
                f"{self._of(what, path)}, which is {node.dtype}, must be None or zeros of "
                f"its shape and dtype, found {describe(other)}: integers have no derivative."
            )
        below, others = trees.children(node), trees.children(other)
        if below is None:
            if other is not None:
                raise ArgumentError(
                    f"{self._of(what, path)}, which is {node!r}, must be None, found "
                    f"{describe(other)}."
                )
            return
        same_kind = type(other) is kind or (is_module(node) and isinstance(other, dict))
        if others is None or not same_kind or len(others) != len(below):
            raise ArgumentError(
                f"{self._of(what, path)} must be a tree like it, {describe(node)}: found "
                f"{describe(other)}."
            )
        if isinstance(node, dict):
            if set(node) != set(other):
                raise ArgumentError(
                    f"{self._of(what, path)} must be a tree like it, with keys {list(node)}: found "
                    f"{list(other)}."
                )
            others = [(key, other[key]) for key, _ in below]
        for (key, child), (_, its) in zip(below, others):
            self._match(child, its, (*path, key), what, found)

    def _one(self, x: mx.array, other: Any, path: trees.Path, what: str) -> mx.array:
        if isinstance(other, float) or (isinstance(other, complex) and x.dtype == mx.complex64):
            other = mx.array(other, x.dtype)
        y = as_array(other)
        if y is None or y.shape != x.shape or y.dtype != x.dtype:
            raise ArgumentError(
                f"{self._of(what, path)} must have its shape {tuple(x.shape)} and dtype "
                f"{name_of(x.dtype)}, found {describe(other if y is None else y)}."
            )
        return y


def as_array(leaf: Any) -> mx.array | None:
    """A number or an array of NumPy's as MLX's; None for what is neither."""
    if isinstance(leaf, mx.array):
        return leaf
    return mx.array(leaf) if is_number(leaf) else None


def is_module(node: Any) -> bool:
    return isinstance(node, dict) and hasattr(node, "trainable_parameters")


def plain(tree: Any) -> bool:
    """Whether MLX takes this tree as it is: real arrays in containers of its own kinds."""
    kind = type(tree)
    if kind is mx.array:
        return tree.dtype in REAL
    if kind is dict:
        return all(map(plain, tree.values()))
    return (kind is list or kind is tuple) and all(map(plain, tree))


def name_of(dtype: mx.Dtype) -> str:
    return str(dtype).rpartition(".")[2]


def describe(node: Any) -> str:
    if isinstance(node, mx.array):
        return f"an array of shape {tuple(node.shape)} and dtype {name_of(node.dtype)}"
    if type(node) is Hole:
        return "an array"
    return trees.describe(node)


def argument_namer(
    tag: str, fun: Callable[..., Any], numbers: Sequence[int] | None = None
) -> Callable[[trees.Path], tuple[str, str]]:
    """Names a leaf of a tuple of positional arguments as the caller knows it."""

    def name(path: trees.Path) -> tuple[str, str]:
        if not path:
            return tag, "the tuple of arguments"
        first, *keys = path
        if isinstance(first, int):
            first = parameter(fun, first if numbers is None else numbers[first])
        return tag, f"argument {first}{trees.written(tuple(keys))}"

    return name


def output_namer(tag: str) -> Callable[[trees.Path], tuple[str, str]]:
    return lambda path: (tag, "the function's output" + trees.written(path))


def parameter(fun: Callable[..., Any], number: int) -> str:
    """The name of a positional parameter; its number if it has none."""
    try:
        several = list(inspect.signature(fun).parameters.values())
    except (TypeError, ValueError):
        return f"number {number}"
    if number < len(several) and several[number].kind in (
        inspect.Parameter.POSITIONAL_ONLY,
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
    ):
        return several[number].name
    return f"number {number}"


def no_reduce_axes(tag: str, axes: Any) -> None:
    if axes:
        raise NotImplementedError(
            f"[{tag}] reduce_axes must be empty, as in JAX: sum the gradients, psum(gradients, "
            f"{axes[0]!r})."
        )
