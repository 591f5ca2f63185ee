"""Trees: nested lists, tuples and dicts (named tuples and `nn.Module`s among them) of leaves.

An axis specification is a *prefix* of a tree: an int or None where it speaks for everything below.
"""

from __future__ import annotations

import copy
import copyreg
import functools
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx

Path = tuple[Any, ...]


def written(path: Path) -> str:
    """The keys of a path as a caller writes them, `['w'][0]`."""
    return "".join(f"[{key!r}]" for key in path)


def describe(node: Any) -> str:
    """What a node that is no array is, in words."""
    if isinstance(node, dict):
        return f"a {type(node).__name__} with keys {list(node)}"
    if isinstance(node, (list, tuple)):
        return f"a {type(node).__name__} of {len(node)}"
    if node is None:
        return "None"
    # Others are not printed: that reads the arrays in them, which a trace cannot.
    printed = isinstance(node, (str, bytes, bool, int, float, complex))
    return f"{repr(node) if printed else 'an object'} of type {type(node).__name__}"


def children(node: Any) -> list[tuple[Any, Any]] | None:
    """The (key, child) pairs of a container, in the order of rebuilding; None for a leaf."""
    if isinstance(node, (list, tuple)):
        return list(enumerate(node))
    if isinstance(node, dict):
        return list(node.items())
    return None


def rebuild(node: Any, values: list[Any]) -> Any:
    """A container like `node` around other children."""
    if isinstance(node, dict):
        if type(node) is dict:
            return dict(zip(node, values))
        # An OrderedDict, a defaultdict, an nn.Module: keeps what it carries.
        if _is_entries_and_attributes(type(node)):
            new = type(node).__new__(type(node))
            vars(new).update(vars(node))
        else:
            new = copy.copy(node)
        dict.update(new, zip(node, values))  # nn.Module.update means something else
        return new
    if isinstance(node, tuple):
        return type(node)(*values) if hasattr(node, "_fields") else type(node)(values)
    return type(node)(values)


@functools.lru_cache(maxsize=512)
def _is_entries_and_attributes(kind: type) -> bool:
    """Whether a dict of this class has nothing else to copy, nor a way of its own to be copied.

    Then it need not be taken apart as for a pickle, which is what `copy.copy` does: a model has a
    module for each few of its arrays.
    """
    ours = [c for c in kind.__mro__ if c not in (dict, object)]
    own_way = ("__copy__", "__reduce__", "__reduce_ex__", "__getstate__", "__setstate__")
    own_way += ("__new__", "__slots__", "__getnewargs__", "__getnewargs_ex__")
    return kind not in copyreg.dispatch_table and all(
        c.__module__ != "collections" and not any(name in vars(c) for name in own_way) for c in ours
    )


def leaves(tree: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Every leaf with the keys that lead to it."""
    below = children(tree)
    if below is None:
        yield path, tree
        return
    for key, child in below:
        yield from leaves(child, (*path, key))


def map_leaves(fun: Callable[[Any], Any], tree: Any) -> Any:
    """`tree` with `fun(leaf)` in the place of every leaf."""
    kind = type(tree)
    if kind is dict:
        return {key: map_leaves(fun, child) for key, child in tree.items()}
    if kind is mx.array or (below := children(tree)) is None:
        return fun(tree)
    return rebuild(tree, [map_leaves(fun, child) for _, child in below])


class PrefixError(ValueError):
    """An axis specification that does not fit the tree; `path` says where."""

    def __init__(self, path: Path, spec: Any, node: Any) -> None:
        super().__init__(path, spec, node)
        self.path, self.spec, self.node = path, spec, node


def map_with_prefix(
    fun: Callable[[Any, Any, Path], Any], tree: Any, prefix: Any, path: Path = ()
) -> Any:
    """`tree` with `fun(leaf, axis, path)` for every leaf, `axis` being what the prefix says of it.

    Raises `PrefixError` where the prefix goes deeper than the tree, or branches otherwise.
    """
    if type(tree) is dict and type(prefix) is dict and tree.keys() == prefix.keys():
        return {
            key: map_with_prefix(fun, child, prefix[key], (*path, key))
            for key, child in tree.items()
        }
    if prefix is None or (isinstance(prefix, int) and not isinstance(prefix, bool)):
        if type(tree) is mx.array or (below := children(tree)) is None:
            return fun(tree, prefix, path)
        return rebuild(
            tree, [map_with_prefix(fun, child, prefix, (*path, key)) for key, child in below]
        )
    below, specs = children(tree), children(prefix)
    if below is None or specs is None:
        # MLX writes the axis of an array as (axis,) too.
        if isinstance(tree, mx.array) and isinstance(prefix, tuple) and len(prefix) == 1:
            return map_with_prefix(fun, tree, prefix[0], path)
        raise PrefixError(path, prefix, tree)
    if isinstance(tree, dict) != isinstance(prefix, dict) or len(below) != len(specs):
        raise PrefixError(path, prefix, tree)
    if isinstance(tree, dict):
        by_key = dict(specs)
        if set(tree) != set(by_key):
            raise PrefixError(path, prefix, tree)
        specs = [(key, by_key[key]) for key in tree]
    return rebuild(
        tree,
        [
            map_with_prefix(fun, child, spec, (*path, key))
            for (key, child), (_, spec) in zip(below, specs)
        ],
    )
