"""vmap: a function of one sample, made a function of a batch."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import mlx.core as mx
from typing_extensions import ParamSpec

from ..core import trees
from ..core.interception import intercepted
from ..core.levels import at_level

P = ParamSpec("P")
R = TypeVar("R")


def vmap(fun: Callable[P, R], in_axes: Any = 0, out_axes: Any = 0) -> Callable[P, R]:
    """Map `fun` over an axis of its arguments: `vmap(f)(xs)` is `stack([f(x) for x in xs])`.

    Args:
        fun: A function of arrays, or of trees (lists, tuples, dicts, `nn.Module`s) with arrays in
            them, that returns an array or a tree of arrays (None where there is nothing). Leaves
            that are no arrays are handed through to every sample as they are.
        in_axes: Which axis of each positional argument is mapped: an int (negative ones count from
            the end), None for an argument that all samples share, or a tree of those that is a
            prefix of the arguments. For a function of one argument either the argument's own tree
            of axes or a tuple of one. Keyword arguments are mapped over axis 0.
        out_axes: Where the mapped axis goes in each output: an int, or a prefix of the output.
            None for an output that does not depend on the sample, which is returned once.

    Returns:
        A function that takes each mapped argument with one more axis than `fun` does, of the same
        size for all, and returns each output with one more axis.

    Raises:
        ValueError: an axis specification that does not fit, an axis out of range, mapped axes of
            different sizes, nothing mapped, an output that is no array.

    Example:
        >>> import mlx.core as mx
        >>> from mlxshim import vmap
        >>> xs = mx.array([[1.0, 2.0], [3.0, 4.0]])
        >>> vmap(lambda x, y: (x * y).sum(), in_axes=(0, None))(xs, mx.array([1.0, 10.0]))
        array([21, 43], dtype=float32)

    Semantics after `jax.vmap`; the trace underneath is MLX's (mlx/transforms.cpp, `vmap_trace`).
    """
    _check_spec(in_axes, "in_axes")
    _check_spec(out_axes, "out_axes")
    body = at_level("vmap", fun)

    @functools.wraps(fun, updated=())
    @intercepted
    def mapped(*args: P.args, **kwargs: P.kwargs) -> R:
        outputs = _Outputs(out_axes)
        axes = None if kwargs else _plain(args, in_axes)
        if axes is not None:  # every argument is a mapped array: the trace is ours to keep short
            results = mx.vmap(lambda *xs: outputs.take(body(*xs)), axes, outputs.axes)(*args)
            return outputs.give(results)
        inputs = _Inputs(fun, args, kwargs, in_axes)

        def per_sample(*samples: mx.array) -> Any:
            call_args, call_kwargs = inputs.fill(samples)
            return outputs.take(body(*call_args, **call_kwargs))

        axes = tuple(inputs.axes) if len(inputs.axes) > 1 else inputs.axes[0]
        return outputs.give(mx.vmap(per_sample, axes, outputs.axes)(*inputs.arrays))

    return mapped


def _plain(args: tuple[Any, ...], in_axes: Any) -> Any:
    """The axes as MLX takes them if all arguments are arrays mapped over the same valid axis."""
    if type(in_axes) is not int or not args:
        return None
    size = -1
    for x in args:
        if type(x) is not mx.array or not -x.ndim <= in_axes < x.ndim:
            return None
        if x.shape[in_axes] != size:
            if size != -1:
                return None
            size = x.shape[in_axes]
    return in_axes


def _check_spec(spec: Any, name: str) -> None:
    for _, axis in trees.leaves(spec):
        if axis is not None and (not isinstance(axis, int) or isinstance(axis, bool)):
            raise ValueError(
                f"[vmap] {name} must be an int, None or a tree of those, found {axis!r} of type "
                f"{type(axis).__name__}."
            )


class _Slot:
    """The place of a mapped array among the arguments."""

    __slots__ = ("index",)

    def __init__(self, index: int) -> None:
        self.index = index


class _Inputs:
    """The arguments of one call, taken apart into mapped arrays and everything else."""

    def __init__(
        self, fun: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], in_axes: Any
    ) -> None:
        self.fun = fun
        self.arrays: list[mx.array] = []
        self.axes: list[int] = []
        self.paths: list[trees.Path] = []
        self.args = args
        self.kwargs = kwargs
        specs = _specs(args, in_axes, self._name)
        # Plain arrays, the common case, need no walk.
        self.args = tuple(
            self._mapped(arg, spec, (i,))
            if isinstance(arg, mx.array) and (spec is None or type(spec) is int)
            else self._walk(arg, spec, (i,))
            for i, (arg, spec) in enumerate(zip(args, specs))
        )
        self.kwargs = {key: self._walk(arg, 0, (key,)) for key, arg in kwargs.items()}
        self._check_sizes()

    def _walk(self, arg: Any, spec: Any, path: trees.Path) -> Any:
        try:
            return trees.map_with_prefix(self._mapped, arg, spec, path)
        except trees.PrefixError as e:
            raise ValueError(
                f"[vmap] in_axes does not fit argument {self._name(e.path)}: the axes are "
                f"{e.spec!r}, the argument is {_describe(e.node)}."
            ) from None

    def _mapped(self, leaf: Any, axis: int | None, path: trees.Path) -> Any:
        if axis is None:
            return leaf
        if not isinstance(leaf, mx.array):
            if type(leaf).__module__ != "numpy" or not getattr(leaf, "ndim", 0):
                return leaf
            leaf = mx.array(leaf)
        ndim = leaf.ndim
        if not -ndim <= axis < ndim:
            scalar = " A scalar has no axis to map: give it in_axes=None." if ndim == 0 else ""
            raise ValueError(
                f"[vmap] in_axes maps axis {axis} of argument {self._name(path)}, which has shape "
                f"{tuple(leaf.shape)} and so only {ndim} axes.{scalar}"
            )
        self.arrays.append(leaf)
        self.axes.append(axis + ndim if axis < 0 else axis)
        self.paths.append(path)
        return _Slot(len(self.arrays) - 1)

    def _check_sizes(self) -> None:
        arrays, axes = self.arrays, self.axes
        if not arrays:
            raise ValueError(
                "[vmap] Nothing is mapped: at least one of in_axes must be non-None for an "
                "argument that holds an array."
            )
        size = arrays[0].shape[axes[0]]
        if any(x.shape[a] != size for x, a in zip(arrays, axes)):
            sizes = "".join(
                f"\n  {self._name(path)}: shape {tuple(x.shape)}, axis {a}, size {x.shape[a]}"
                for x, a, path in zip(arrays, axes, self.paths)
            )
            raise ValueError(f"[vmap] Inconsistent axis sizes of the mapped arguments:{sizes}")

    def fill(self, samples: tuple[mx.array, ...]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        def fill(leaf: Any) -> Any:
            return samples[leaf.index] if type(leaf) is _Slot else leaf

        args = tuple(
            samples[arg.index] if type(arg) is _Slot else trees.map_leaves(fill, arg)
            for arg in self.args
        )
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
        return "".join([f"{first}", *(f"[{key!r}]" for key in keys)])


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
    raise ValueError(
        f"[vmap] in_axes must be an int, None, or one entry for each of the {len(args)} positional "
        f"arguments, found {in_axes!r}."
    )


class _Outputs:
    """The outputs of one call: flat arrays for MLX, and the tree they came in."""

    def __init__(self, out_axes: Any) -> None:
        self.spec = out_axes
        # MLX reads the list of axes after the trace, when `take` has filled it.
        self.axes: Any = out_axes if type(out_axes) is int else []
        self.tree: Any = None
        self.shared: dict[int, mx.array] = {}

    def take(self, tree: Any) -> Any:
        if isinstance(tree, mx.array) and type(self.spec) is int:
            self._check_axis(tree, self.spec, ())
            self.tree = _Slot(0)
            return tree
        if tree is None:
            raise ValueError("[vmap] The function returned None: it must return arrays.")
        arrays: list[mx.array] = []
        axes: list[int] = []

        def take(leaf: Any, axis: int | None, path: trees.Path) -> Any:
            if leaf is None:
                return None
            if not isinstance(leaf, mx.array):
                where = _path(path)
                raise ValueError(
                    f"[vmap] The function must return arrays; its output{where} is {leaf!r} of "
                    f"type {type(leaf).__name__}."
                )
            if axis is None:
                self.shared[len(arrays)] = leaf
                leaf, axis = _unmapped(leaf, path), 0
            self._check_axis(leaf, axis, path)
            arrays.append(leaf)
            axes.append(axis)
            return _Slot(len(arrays) - 1)

        try:
            self.tree = trees.map_with_prefix(take, tree, self.spec)
        except trees.PrefixError as e:
            raise ValueError(
                f"[vmap] out_axes does not fit the output{_path(e.path)}: the axes are {e.spec!r}, "
                f"the output is {_describe(e.node)}."
            ) from None
        if not arrays:
            raise ValueError("[vmap] The function returned no array.")
        if type(self.axes) is not int:
            self.axes[:] = axes
        return arrays

    def _check_axis(self, leaf: mx.array, axis: int, path: trees.Path) -> None:
        if not -leaf.ndim - 1 <= axis <= leaf.ndim:
            raise ValueError(
                f"[vmap] out_axes puts the mapped axis at {axis} of output{_path(path)}, whose "
                f"shape for one sample is {tuple(leaf.shape)}."
            )

    def give(self, results: Any) -> Any:
        if isinstance(results, mx.array):
            results = [results]
        if type(self.tree) is _Slot:
            return self.shared.get(0, results[0])
        shared = self.shared
        return trees.map_leaves(
            lambda s: shared.get(s.index, results[s.index]) if type(s) is _Slot else s, self.tree
        )


def _unmapped(x: mx.array, path: trees.Path) -> Any:
    """`x` as a node whose batching rule, reached only if `x` is mapped, refuses."""

    def refuse(_: Any, axis: Any) -> Any:
        raise ValueError(
            f"[vmap] out_axes is None for output{_path(path)}, but that output depends on a mapped "
            "argument: give it an axis."
        )

    node = mx.custom_function(lambda y: y)
    node.vmap(refuse)
    return node(x)


def _path(path: trees.Path) -> str:
    return "".join(f"[{key!r}]" for key in path)


def _describe(node: Any) -> str:
    if isinstance(node, mx.array):
        return f"an array of shape {tuple(node.shape)}"
    if isinstance(node, dict):
        return f"a {type(node).__name__} with keys {list(node)}"
    if isinstance(node, (list, tuple)):
        return f"a {type(node).__name__} of {len(node)}"
    return repr(node)
