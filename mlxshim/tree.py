"""Trees, as the transforms see them: lists, tuples, dicts, `nn.Module`s, and leaves.

The names and the meaning are those of `jax.tree_util`: None holds no leaf, and the leaves of a dict
come in the order of its sorted keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import mlx.core as mx

from .core import trees

IsLeaf = Callable[[Any], bool] | None


class TreeDef:
    """The structure of a tree without its leaves. Equal structures are equal, and hash alike."""

    def __init__(self, skeleton: Any, num_leaves: int) -> None:
        self._skeleton: Any = skeleton
        self.num_leaves: int = num_leaves

    def unflatten(self, leaves: Iterable[Any]) -> Any:
        """The tree with these leaves."""
        leaves = list(leaves)
        if len(leaves) != self.num_leaves:
            raise ValueError(
                f"[tree_unflatten] The tree has {self.num_leaves} leaves, found {len(leaves)}."
            )
        return _filled(self._skeleton, iter(leaves))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TreeDef) and _form(self._skeleton) == _form(other._skeleton)

    def __hash__(self) -> int:
        return hash(_form(self._skeleton))

    def __repr__(self) -> str:
        return f"TreeDef({_shown(self._skeleton)})"


class _Leaf:
    def __repr__(self) -> str:
        return "*"


_leaf = _Leaf()


def _children(node: Any) -> list[tuple[Any, Any]] | None:
    """The (key, child) pairs in the order of the leaves."""
    below = trees.children(node)
    if below is not None and isinstance(node, dict):
        try:
            return sorted(below, key=lambda pair: pair[0])
        except TypeError:  # keys that have no order keep their own
            return below
    return below


def _rebuilt(node: Any, children: dict[Any, Any]) -> Any:
    return trees.rebuild(node, [children[key] for key, _ in trees.children(node) or ()])


def _form(node: Any) -> Any:
    below = _children(node)
    if below is None:
        return node is None
    return type(node), tuple((key, _form(child)) for key, child in below)


def _shown(node: Any) -> Any:
    below = _children(node)
    if below is None:
        return "*" if node is _leaf else repr(node)
    if isinstance(node, dict):
        inside = ", ".join(f"{key!r}: {_shown(child)}" for key, child in below)
        name = "" if type(node) is dict else type(node).__name__
        return f"{name}{{{inside}}}"
    inside = ", ".join(str(_shown(child)) for _, child in below)
    return f"[{inside}]" if isinstance(node, list) else f"({inside})"


def _filled(node: Any, leaves: Any) -> Any:
    below = _children(node)
    if below is None:
        return None if node is None else next(leaves)
    return _rebuilt(node, {key: _filled(child, leaves) for key, child in below})


def tree_flatten(tree: Any, is_leaf: IsLeaf = None) -> tuple[list[Any], TreeDef]:
    """(leaves, structure) of a tree; `tree_unflatten(structure, leaves)` is the tree again.

    Args:
        tree: Lists, tuples, dicts, `nn.Module`s, nested; everything else is a leaf, None is none.
        is_leaf: Called for every node: where it is true the node is a leaf as it is.

    Example:
        >>> from mlxshim import tree_flatten
        >>> tree_flatten({"b": 1, "a": [2, None]})
        ([2, 1], TreeDef({'a': [*, None], 'b': *}))
    """
    leaves: list[Any] = []

    def take(node: Any) -> Any:
        leaf = is_leaf is not None and is_leaf(node)
        below = None if leaf else _children(node)
        if below is not None:
            return _rebuilt(node, {key: take(child) for key, child in below})
        if node is None and not leaf:
            return None
        leaves.append(node)
        return _leaf

    skeleton = take(tree)
    return leaves, TreeDef(skeleton, len(leaves))


def tree_unflatten(treedef: TreeDef, leaves: Iterable[Any]) -> Any:
    """The tree of that structure with these leaves.

    Args:
        treedef: What `tree_structure` or `tree_flatten` returned.
        leaves: As many leaves, in the order of `tree_flatten`.

    Raises:
        ValueError: another number of leaves than the structure has.

    Example:
        >>> from mlxshim import tree_structure, tree_unflatten
        >>> tree_unflatten(tree_structure({"a": 1, "b": (2, 3)}), "xyz")
        {'a': 'x', 'b': ('y', 'z')}
    """
    return treedef.unflatten(leaves)


def tree_leaves(tree: Any, is_leaf: IsLeaf = None) -> list[Any]:
    """The leaves of a tree; arguments are those of `tree_flatten`.

    Example:
        >>> from mlxshim import tree_leaves
        >>> tree_leaves([1, (2, None), {"a": 3}])
        [1, 2, 3]
    """
    return tree_flatten(tree, is_leaf)[0]


def tree_structure(tree: Any, is_leaf: IsLeaf = None) -> TreeDef:
    """The structure of a tree; arguments are those of `tree_flatten`.

    Example:
        >>> from mlxshim import tree_structure
        >>> tree_structure([1, {"a": 2}]) == tree_structure([3, {"a": 4}])
        True
    """
    return tree_flatten(tree, is_leaf)[1]


def tree_map(f: Callable[..., Any], tree: Any, *rest: Any, is_leaf: IsLeaf = None) -> Any:
    """`tree` with `f(leaf, *leaves of the others in the same place)` for every leaf.

    Args:
        f: A function of as many leaves as there are trees.
        tree: The tree whose structure the result has.
        rest: Trees that have at least this structure; what is below its leaves goes to `f` whole.
        is_leaf: As for `tree_flatten`.

    Raises:
        ValueError: one of `rest` has another structure.

    Example:
        >>> from mlxshim import tree_map
        >>> tree_map(lambda x, y: x + y, {"a": 1, "b": [2]}, {"b": [20], "a": 10})
        {'a': 11, 'b': [22]}
    """

    def walk(node: Any, others: Sequence[Any], path: trees.Path) -> Any:
        leaf = is_leaf is not None and is_leaf(node)
        below = None if leaf else _children(node)
        if below is None:
            if node is None and not leaf:
                for n, other in enumerate(others):
                    if other is not None:
                        raise _mismatch(n, node, other, path)
                return None
            return f(node, *others)
        by_key: list[dict[Any, Any]] = []
        for n, other in enumerate(others):
            inside = trees.children(other)
            same = inside is not None and type(other) is type(node)
            if not same or {k for k, _ in inside} != {k for k, _ in below}:  # pyright: ignore
                raise _mismatch(n, node, other, path)
            by_key.append(dict(inside))  # pyright: ignore
        return _rebuilt(
            node,
            {key: walk(child, [o[key] for o in by_key], (*path, key)) for key, child in below},
        )

    return walk(tree, rest, ())


def _mismatch(number: int, node: Any, other: Any, path: trees.Path) -> ValueError:
    where = trees.written(path)
    where = f" at {where}" if where else ""
    return ValueError(
        f"[tree_map] Tree number {number + 2} does not fit the first{where}"
        f": {_shown(tree_structure(node)._skeleton)} there, "
        f"{_shown(tree_structure(other)._skeleton)} here."
    )


def ravel_pytree(pytree: Any) -> tuple[mx.array, Callable[[mx.array], Any]]:
    """All arrays of a tree as one vector, and the function that makes a tree of such a vector.

    Args:
        pytree: A tree of arrays and numbers. The vector has their common dtype.

    Returns:
        (the vector, `unravel`): `unravel(vector)` has the tree, the shapes and the dtypes.

    Raises:
        ValueError: from `unravel`, for a vector of another length.
        TypeError: a leaf is no array or number.

    Example:
        >>> import mlx.core as mx
        >>> from mlxshim import ravel_pytree
        >>> vector, unravel = ravel_pytree({"w": mx.ones((1, 2)), "b": mx.array(3.0)})
        >>> vector
        array([3, 1, 1], dtype=float32)
        >>> unravel(vector * 2)
        {'w': array([[2, 2]], dtype=float32), 'b': array(6, dtype=float32)}

    Semantics after `jax.flatten_util.ravel_pytree`.
    """
    leaves, treedef = tree_flatten(pytree)
    for leaf in leaves:
        if not isinstance(leaf, (mx.array, bool, int, float, complex)) and not hasattr(
            leaf, "__array__"
        ):
            raise TypeError(f"[ravel_pytree] The leaf, {trees.describe(leaf)}, is no array.")
    arrays = [x if isinstance(x, mx.array) else mx.array(x) for x in leaves]
    shapes, dtypes = [x.shape for x in arrays], [x.dtype for x in arrays]
    if not arrays:
        vector = mx.zeros((0,))
    else:
        vector = mx.concatenate([mx.reshape(x, (-1,)) for x in arrays])
    ends: list[int] = []
    for x in arrays:
        ends.append((ends[-1] if ends else 0) + x.size)

    def unravel(flat: mx.array) -> Any:
        if flat.shape != vector.shape:
            raise ValueError(
                f"[ravel_pytree] The tree needs a vector of shape {tuple(vector.shape)}, found "
                f"{tuple(flat.shape)}."
            )
        parts = mx.split(flat, ends[:-1]) if arrays else []
        return treedef.unflatten(
            mx.reshape(part, shape).astype(dtype)
            for part, shape, dtype in zip(parts, shapes, dtypes)
        )

    return vector, unravel
