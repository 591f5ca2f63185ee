"""stop_gradient over trees, and eval_shape: what a function would return, without computing it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any, TypeVar

import mlx.core as mx

from ..core import levels, native, trees
from ..core.errors import ConcretizationError
from ..core.interception import intercepted
from . import _flat

T = TypeVar("T")


def stop_gradient(x: T) -> T:
    """`x`, an array or a tree with arrays in it, as constants for every derivative.

    Example:
        >>> import mlx.core as mx
        >>> from mlxshim import grad, stop_gradient
        >>> grad(lambda x: x * stop_gradient({"y": x})["y"])(mx.array(3.0))
        array(3, dtype=float32)
    """
    return trees.map_leaves(lambda y: mx.stop_gradient(y) if isinstance(y, mx.array) else y, x)


@dataclass(frozen=True)
class ShapeDtypeStruct:
    """The shape and dtype of an array that does not exist.

    Example:
        >>> import mlx.core as mx
        >>> from mlxshim import ShapeDtypeStruct, eval_shape
        >>> x = ShapeDtypeStruct((1000, 3), mx.float32)
        >>> eval_shape(lambda x: x @ x.T, x).shape
        (1000, 1000)
    """

    shape: tuple[int, ...]
    dtype: mx.Dtype

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return prod(self.shape)


@intercepted
def eval_shape(fun: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The shapes and dtypes of what `fun(*args, **kwargs)` returns; nothing is computed.

    Args:
        fun: A function of arrays or trees of arrays.
        *args: Its arguments; anything with a shape and a dtype stands for an array of that
            form, `ShapeDtypeStruct` among them. Other leaves are handed through.
        **kwargs: Likewise.

    Returns:
        The tree of `fun`'s outputs with a `ShapeDtypeStruct` in the place of every array.

    Raises:
        ConcretizationError: `fun` reads a value.

    Example:
        >>> import mlx.core as mx
        >>> from mlxshim import ShapeDtypeStruct, eval_shape
        >>> x = ShapeDtypeStruct((2, 3), mx.float32)
        >>> eval_shape(lambda x: {"mean": x.mean(0)}, x)
        {'mean': ShapeDtypeStruct(shape=(3,), dtype=mlx.core.float32)}

    Semantics after `jax.eval_shape`.
    """
    arrays: list[mx.array] = [mx.zeros((1,))]

    def take(leaf: Any) -> Any:
        shape, dtype = getattr(leaf, "shape", None), getattr(leaf, "dtype", None)
        if shape is None or dtype is None:
            return leaf
        if not isinstance(dtype, mx.Dtype):
            dtype = mx.array(leaf).dtype  # numpy's
        arrays.append(mx.zeros((1, *shape), dtype))
        return _flat.Slot(len(arrays) - 1)

    slots = trees.map_leaves(take, [args, kwargs])
    found: list[Any] = []

    def traced(*placeholders: mx.array) -> None:
        filled = _flat.unflatten(slots, placeholders)
        found.append(trees.map_leaves(_shape, fun(*filled[0], **filled[1])))

    body = levels.at_vmap(levels.VmapLevel(None, 1, "same"), traced)

    def probe(*placeholders: mx.array) -> mx.array:
        body(placeholders[0], *placeholders)
        return placeholders[0]  # nothing else is to be mapped

    try:
        with levels.abstract():
            native.vmap(probe, (0,) * len(arrays) if len(arrays) > 1 else 0)(*arrays)
    except ValueError as e:
        if "during function transformations" not in str(e):
            raise
        raise ConcretizationError(
            "[eval_shape] The function reads the value of an array, which eval_shape does not "
            "compute: use cond, while_loop or mx.where in it."
        ) from e
    return found[0]


def _shape(leaf: Any) -> Any:
    if _flat.is_number(leaf):
        leaf = mx.array(leaf)
    return ShapeDtypeStruct(tuple(leaf.shape), leaf.dtype) if isinstance(leaf, mx.array) else leaf


def first_carry(init: Any, step: Callable[[Any], Any]) -> Any:
    """`init` with numbers as arrays, of the dtype that `step` gives back in their place.

    A number has no dtype of its own: where JAX calls its type weak, the carry gets that of what it
    is added to.
    """
    arrays = _flat.as_arrays(init)
    numbers = [x for _, x in trees.leaves(init) if isinstance(x, (int, float, complex))]
    if all(isinstance(x, bool) for x in numbers):
        return arrays
    for start in (init, arrays):
        try:
            after = eval_shape(step, start)
        except Exception:  # whatever is wrong is wrong again where it is used, and said there
            continue
        return _typed(init, after)
    return arrays


def _typed(node: Any, after: Any) -> Any:
    below, others = trees.children(node), trees.children(after)
    if below is None:
        if (
            isinstance(node, (int, float, complex))
            and isinstance(after, ShapeDtypeStruct)
            and _flat.becomes(node, after.dtype)
        ):
            return mx.array(node, after.dtype)
        return _flat.as_arrays(node)
    by_key = dict(others or ())
    return trees.rebuild(node, [_typed(child, by_key.get(key)) for key, child in below])
