"""The arguments and outputs of one mapped call: trees taken apart into arrays, and put together."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx

from ..core import trees
from ..core.errors import ArgumentError
from ..core.opaque import once_each
from ..core.primitive import Node
from ._flat import Slot, is_number, is_numpy
from ._structure import describe


def check_spec(spec: Any, name: str) -> None:
    for _, axis in trees.leaves(spec):
        if axis is not None and (not isinstance(axis, int) or isinstance(axis, bool)):
            raise ArgumentError(
                f"[vmap] {name} must be an int, None or a tree of those, found {axis!r} of type "
                f"{type(axis).__name__}."
            )


class Inputs:
    """The arguments of one call, taken apart into mapped arrays and everything else."""

    def __init__(
        self,
        fun: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        in_axes: Any,
        axis_size: int | None = None,
    ) -> None:
        self.fun = fun
        self.arrays: list[mx.array] = []
        self.axes: list[int] = []
        self.paths: list[trees.Path] = []
        self.args = args
        self.kwargs = kwargs
        specs = _specs(args, in_axes, self._name)
        # The common cases need no walk: plain arrays, and what all samples share.
        self.args = tuple(
            arg
            if spec is None
            else self._mapped(arg, spec, (i,))
            if type(arg) is mx.array and type(spec) is int
            else self._walk(arg, spec, (i,))
            for i, (arg, spec) in enumerate(zip(args, specs))
        )
        self.kwargs = {key: self._walk(arg, 0, (key,)) for key, arg in kwargs.items()}
        if not self.arrays and axis_size is not None:
            # Something has to be mapped for MLX to map: an array that nobody asks for.
            self.arrays, self.axes = [mx.zeros((axis_size,), mx.bool_)], [0]
            self.size = axis_size
        else:
            self.size = self._common_size(axis_size)

    def _walk(self, arg: Any, spec: Any, path: trees.Path) -> Any:
        try:
            return trees.map_with_prefix(self._mapped, arg, spec, path)
        except trees.PrefixError as e:
            raise ArgumentError(
                f"[vmap] in_axes does not fit argument {self._name(e.path)}: the axes are "
                f"{e.spec!r}, the argument is {describe(e.node)}. Give one int or None for all of "
                "it, or containers like its own."
            ) from None

    def _mapped(self, leaf: Any, axis: int | None, path: trees.Path) -> Any:
        if axis is None:
            return leaf
        if not isinstance(leaf, mx.array):
            if not is_numpy(leaf) or not leaf.ndim:
                self._check_is_no_tree(leaf, path)
                return leaf
            leaf = mx.array(leaf)
        ndim = leaf.ndim
        if not -ndim <= axis < ndim:
            raise ArgumentError(
                f"[vmap] in_axes maps axis {axis} of argument {self._name(path)}, which has shape "
                f"{tuple(leaf.shape)}: "
                + (
                    f"its axes are {-ndim} to {ndim - 1}."
                    if ndim
                    else "a scalar has no axis to map, give it in_axes=None."
                )
            )
        self.arrays.append(leaf)
        self.axes.append(axis + ndim if axis < 0 else axis)
        self.paths.append(path)
        return Slot(len(self.arrays) - 1)

    def _check_is_no_tree(self, leaf: Any, path: trees.Path) -> None:
        """A dataclass is handed through, so that what is mapped in it would not be."""
        for field in getattr(type(leaf), "__dataclass_fields__", ()):
            held = trees.leaves(getattr(leaf, field, None))
            if any(isinstance(x, mx.array) for _, x in held):
                raise ArgumentError(
                    f"[vmap] Argument {self._name(path)} is a dataclass, {type(leaf).__name__}, "
                    f"whose {field} holds arrays, and vmap does not look into it: pass a dict or "
                    "a named tuple, or give it in_axes=None if all samples share it."
                )

    def _common_size(self, axis_size: int | None) -> int:
        arrays, axes = self.arrays, self.axes
        if not arrays:
            raise ArgumentError(
                "[vmap] Nothing is mapped: at least one of in_axes must be non-None for an "
                "argument that holds an array, or axis_size must say how many samples there are."
            )
        size = arrays[0].shape[axes[0]]
        if any(x.shape[a] != size for x, a in zip(arrays, axes)):
            sizes = "".join(
                f"\n  {self._name(path)}: shape {tuple(x.shape)}, axis {a}, size {x.shape[a]}"
                for x, a, path in zip(arrays, axes, self.paths)
            )
            raise ArgumentError(
                f"[vmap] Inconsistent axis sizes of the mapped arguments:{sizes}\n"
                "Name another axis of one in in_axes, or None for what all samples share."
            )
        if axis_size not in (None, size):
            raise ArgumentError(
                f"[vmap] axis_size is {axis_size}, but the mapped axis of "
                f"{self._name(self.paths[0])}, of shape {tuple(arrays[0].shape)}, has size {size}: "
                "leave axis_size out where an argument is mapped."
            )
        return size

    def part(self, start: int, stop: int) -> list[mx.array]:
        """The mapped arrays of some of the samples."""
        return [
            x[(slice(None),) * a + (slice(start, stop),)] for x, a in zip(self.arrays, self.axes)
        ]

    def nothing(self) -> list[mx.array]:
        """One sample of zeros, in the place of none."""
        return [
            mx.zeros((*x.shape[:a], 1, *x.shape[a + 1 :]), x.dtype)
            for x, a in zip(self.arrays, self.axes)
        ]

    def fill(self, samples: tuple[mx.array, ...]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        def fill(leaf: Any) -> Any:
            if type(leaf) is Slot:
                return samples[leaf.index]
            # What the function does to an array in place is not done to the caller's: another
            # array object of the same memory. mx.array(leaf) would copy it, from 0.32 on.
            return leaf.__copy__() if isinstance(leaf, mx.array) else leaf

        args = tuple(
            samples[arg.index] if type(arg) is Slot else trees.map_leaves(fill, arg)
            for arg in self.args
        )
        if not self.kwargs:
            return args, {}
        return args, {key: trees.map_leaves(fill, arg) for key, arg in self.kwargs.items()}

    def _name(self, path: trees.Path) -> str:
        """An argument as the caller knows it: the parameter's name, then keys."""
        first, *keys = path
        if isinstance(first, int):
            try:
                names = list(inspect.signature(self.fun).bind(*self.args, **self.kwargs).arguments)
                first = names[first] if first < len(names) else f"number {first}"
            except (TypeError, ValueError):
                first = f"number {first}"
        return f"{first}{trees.written(tuple(keys))}"


def _specs(args: tuple[Any, ...], in_axes: Any, name: Callable[[trees.Path], str]) -> Any:
    """One axis specification for each positional argument."""
    if in_axes is None or isinstance(in_axes, int):
        return (in_axes,) * len(args)
    if len(args) == 1:
        # MLX's form is the argument's own tree of axes; JAX's is a tuple of one.
        if isinstance(in_axes, tuple) and len(in_axes) == 1:
            return in_axes
        return (in_axes,)
    if isinstance(in_axes, (list, tuple)) and len(in_axes) == len(args):
        return in_axes
    raise ArgumentError(
        f"[vmap] in_axes must be an int, None, or one entry for each of the {len(args)} positional "
        f"arguments, found {in_axes!r}."
    )


class MappedOutputError(ArgumentError):
    """An output that `out_axes` calls unmapped, and is not."""


class Outputs:
    """The outputs of one call: flat arrays for MLX, and the tree they came in."""

    __slots__ = ("axes", "first", "named", "shared", "spec", "taken", "tree")

    def __init__(self, out_axes: Any, named: bool = False) -> None:
        self.spec = out_axes
        #: Collectives can make an output the same for all samples while it stays mapped.
        self.named = named
        # MLX reads the list of axes after the trace, when `take` has filled it.
        self.axes: Any = out_axes if type(out_axes) is int else []
        self.tree: Any = None
        self.shared: dict[int, mx.array] = {}
        #: What a loop's first sample returned, its tree and its arrays.
        self.first: tuple[Any, Any, list[mx.array]] | None = None
        #: Whether the function has returned, and returned what it may.
        self.taken = False

    def take(self, tree: Any, mapped: mx.array) -> list[mx.array]:
        """The outputs of a trace, of which `mapped` is a tracer, as MLX wants them."""
        arrays, axes = self._flatten(tree, self._unmapped)
        if type(self.axes) is not int:
            self.axes[:] = axes
        self.taken = True
        return once_each(arrays, mapped)

    def take_plain(self, tree: Any, mapped: mx.array) -> Any:
        """The outputs of a trace, in the tree of the function where MLX takes that as it is."""
        if type(self.spec) is int:
            arrays: list[mx.array] = []
            if _is_plain(tree, self.spec, arrays):
                plain = tree
                apart = once_each(arrays, mapped)
                if apart is not arrays:
                    plain = _with_leaves(tree, iter(apart))
                self.tree, self.taken = _AS_IT_IS, True
                return plain
        return self.take(tree, mapped)

    def take_sample(self, tree: Any) -> list[mx.array]:
        """The outputs of one sample of a loop."""
        arrays, axes = self._flatten(tree, lambda leaf, path: leaf)
        self.axes = axes
        if self.first is None:
            self.first = tree, self.tree, arrays
        else:
            self._check_goes_with(tree, arrays, *self.first)
        return arrays

    def _check_goes_with(
        self, tree: Any, arrays: list[mx.array], other: Any, slots: Any, others: list[mx.array]
    ) -> None:
        """Only a loop can come to outputs that are not alike: it reads values."""
        places = [(path, type(leaf)) for path, leaf in trees.leaves(slots)]
        if places != [(path, type(leaf)) for path, leaf in trees.leaves(self.tree)]:
            raise ArgumentError(
                f"[vmap] The function must return the same tree for all samples; it is "
                f"{describe(other)} for one and {describe(tree)} for another."
            )
        for path, leaf in trees.leaves(self.tree):
            if type(leaf) is not Slot:
                continue
            x, y = others[leaf.index], arrays[leaf.index]
            if x.shape != y.shape:
                raise ArgumentError(
                    f"[vmap] The function must return arrays of the same shape for all samples; "
                    f"its output{trees.written(path)} has shape {tuple(x.shape)} for one and "
                    f"{tuple(y.shape)} for another: pad it."
                )
            if leaf.index in self.shared and not mx.array_equal(x, y, equal_nan=True):
                raise _mapped_error(path)

    def stack(self, samples: list[list[mx.array]]) -> list[mx.array]:
        return [mx.stack(list(xs), axis=a) for xs, a in zip(zip(*samples), self.axes)]

    def concatenate(self, parts: list[list[mx.array]]) -> list[mx.array]:
        axes = [self.axes] * len(parts[0]) if type(self.axes) is int else self.axes
        return [mx.concatenate(list(xs), axis=a) for xs, a in zip(zip(*parts), axes)]

    def none_of(self, part: list[mx.array]) -> list[mx.array]:
        """No sample of one part, of which nothing is computed."""
        axes = [self.axes] * len(part) if type(self.axes) is int else self.axes
        shapes = [list(x.shape) for x in part]
        for shape, axis in zip(shapes, axes):
            shape[axis] = 0
        return [mx.zeros(shape, x.dtype) for x, shape in zip(part, shapes)]

    def _flatten(
        self, tree: Any, share: Callable[[mx.array, trees.Path], mx.array]
    ) -> tuple[list[mx.array], list[int]]:
        if tree is None:
            raise ArgumentError("[vmap] The function returned None: it must return arrays.")
        arrays: list[mx.array] = []
        axes: list[int] = []

        def take(leaf: Any, axis: int | None, path: trees.Path) -> Any:
            if leaf is None:
                return None
            if is_number(leaf):
                leaf = mx.array(leaf)
            if not isinstance(leaf, mx.array):
                where = trees.written(path)
                raise ArgumentError(
                    f"[vmap] The function must return arrays; its output{where} is "
                    f"{describe(leaf)}."
                )
            if axis is None:
                self.shared[len(arrays)] = leaf
                leaf, axis = share(leaf, path), 0
            self._check_axis(leaf, axis, path)
            arrays.append(leaf)
            axes.append(axis)
            return Slot(len(arrays) - 1)

        try:
            self.tree = trees.map_with_prefix(take, tree, self.spec)
        except trees.PrefixError as e:
            raise ArgumentError(
                f"[vmap] out_axes does not fit the output{trees.written(e.path)}: the axes "
                f"are {e.spec!r}, the output is {describe(e.node)}. Give one int or None for all "
                "of it, or containers like its own."
            ) from None
        if not arrays:
            raise ArgumentError("[vmap] The function returned no array: it must return one.")
        return arrays, axes

    def _unmapped(self, x: mx.array, path: trees.Path) -> Any:
        """`x` as a node whose batching rule, reached only if `x` is mapped, refuses."""
        place = len(self.shared) - 1

        def rule(y: mx.array, axis: int) -> Any:
            first = mx.take(y, 0, axis=axis)
            if not self.named or not _all_equal(y, mx.expand_dims(first, axis)):
                raise _mapped_error(path)
            self.shared[list(self.shared)[place]] = first
            return y, axis

        node = Node(lambda y: y)
        node.vmap(rule)
        return node(x)

    def _check_axis(self, leaf: mx.array, axis: int, path: trees.Path) -> None:
        if not -leaf.ndim - 1 <= axis <= leaf.ndim:
            raise ArgumentError(
                f"[vmap] out_axes puts the mapped axis at {axis} of the output"
                f"{trees.written(path)}, whose shape for one sample is {tuple(leaf.shape)}: it may "
                f"be from {-leaf.ndim - 1} to {leaf.ndim}."
            )

    def give(self, results: Any) -> Any:
        """The results in the tree of the function."""
        if self.tree is _AS_IT_IS:
            return results
        shared = self.shared
        return trees.map_leaves(
            lambda s: shared.get(s.index, results[s.index]) if type(s) is Slot else s, self.tree
        )


#: The tree of outputs that MLX takes, and gives back, as they are.
_AS_IT_IS = object()


def _is_plain(tree: Any, axis: int, arrays: list[mx.array]) -> bool:
    """Whether there is nothing in `tree` but `arrays` that have a place for the mapped axis."""
    kind = type(tree)
    if kind is mx.array:
        arrays.append(tree)
        ndim = tree.ndim
        return -ndim - 1 <= axis <= ndim
    if kind is dict:
        tree = tree.values()
    elif kind is not list and kind is not tuple:
        return False
    return bool(tree) and all(_is_plain(child, axis, arrays) for child in tree)


def _with_leaves(tree: Any, leaves: Iterator[mx.array]) -> Any:
    """A plain tree around other arrays."""
    kind = type(tree)
    if kind is mx.array:
        return next(leaves)
    children = tree.values() if kind is dict else tree
    return trees.rebuild(tree, [_with_leaves(child, leaves) for child in children])


def _all_equal(x: mx.array, y: mx.array) -> bool:
    try:
        return bool(mx.all(x == y))
    except ValueError:
        raise MappedOutputError(
            "[vmap] Whether an output with out_axes=None is the same for all samples cannot be "
            "seen inside another vmap or mx.compile: give it an axis there."
        ) from None


def _mapped_error(path: trees.Path) -> MappedOutputError:
    return MappedOutputError(
        f"[vmap] out_axes is None for the output{trees.written(path)}, but that output "
        "depends on a mapped argument: give it an axis."
    )
