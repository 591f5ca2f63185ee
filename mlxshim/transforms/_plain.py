"""Arguments that `mx.vmap` takes as they are: arrays, and lists, tuples and dicts of nothing else.

They need not be taken apart and put together again at every call. Trees are looked through once,
for what MLX would not say in our words: everything else, errors included, is left to `_mapping`.

Source: python/src/transforms.cpp (`py_vmap`).
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

Path = tuple[Any, ...]


def plain_axes(args: tuple[Any, ...], in_axes: Any) -> tuple[int, Path, Any] | None:
    """(size, where the first mapped array is, in_axes as MLX has them); None if MLX must not."""
    count = len(args)
    if type(in_axes) is int:
        axes, specs = in_axes, (in_axes,) * count
    elif count == 1:
        one = type(in_axes) is tuple and len(in_axes) == 1
        axes = in_axes[0] if one else in_axes
        if type(axes) is tuple and len(axes) == 1:
            return None  # is it the argument's, or the arguments'?
        specs = (axes,)
    elif type(in_axes) in (tuple, list) and len(in_axes) == count:
        axes = specs = tuple(in_axes)
    else:
        return None
    size, first = -1, ()
    for n, (x, spec) in enumerate(zip(args, specs)):
        if type(x) is not mx.array:
            look = _Look(size)
            if not look.through(x, spec):
                return None
            if size < 0 <= look.size:
                first = (n, *reversed(look.keys))
            size = look.size
        elif spec is not None:
            if type(spec) is not int:
                return None
            try:
                extent = x.shape[spec]
            except IndexError:
                return None
            if extent != size:
                if size >= 0:
                    return None
                size, first = extent, (n,)
    return None if size < 0 else (size, first, axes)


class _Look:
    """A look through one argument."""

    __slots__ = ("keys", "size")

    def __init__(self, size: int) -> None:
        #: That of the mapped axis; -1 until it is known.
        self.size = size
        #: The way to the array that it was found at, last key first.
        self.keys: list[Any] = []

    def through(self, node: Any, spec: Any) -> bool:
        """Whether MLX takes `node`, mapped as `spec` says."""
        kind: Any = type(node)
        below: Any = type(spec)
        if kind is mx.array:
            if spec is None:
                return True
            shape = node.shape
            if below is not int or not -len(shape) <= spec < len(shape):
                return False
            if self.size < 0:
                self.size = shape[spec]
            return shape[spec] == self.size
        prefix = below is int or below is type(None)
        if kind is dict:
            if not prefix and (below is not dict or node.keys() != spec.keys()):
                return False
            pairs = node.items()
        elif kind is list or kind is tuple:
            if not prefix and (below is not kind or len(node) != len(spec)):
                return False
            pairs = enumerate(node)
        else:
            return False
        known = self.size >= 0
        for key, child in pairs:
            if not self.through(child, spec if prefix else spec[key]):
                return False
            if not known and self.size >= 0:
                known = True
                self.keys.append(key)
        return True


def reach(tree: Any, path: Path) -> Any:
    for key in path:
        tree = tree[key]
    return tree
