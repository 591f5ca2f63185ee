"""vjp, jvp, linearize, linear_transpose: the linear map of a function at one point, transposed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar, overload

import mlx.core as mx

from ..core import native
from ..core.errors import ArgumentError
from ..core.fronted import fronted_gradients
from ..core.interception import intercepted
from ..core.levels import at_level, standing_in
from ..core.primitive import Node
from ..core.replay import same_draws
from ._products import Traced, check_complex, copies, pull, push
from ._structure import Parts, argument_namer, describe, name_of, no_reduce_axes
from .vmap import vmap

R = TypeVar("R")
A = TypeVar("A")
Pullback = Callable[[Any], "tuple[Any, ...]"]
Arrays = list[mx.array]


@overload
def vjp(
    fun: Callable[..., Any], primals: list[mx.array], cotangents: list[mx.array]
) -> tuple[Arrays, Arrays]: ...
@overload
def vjp(
    fun: Callable[..., Any], primals: Sequence[mx.array], *, cotangents: Sequence[mx.array]
) -> tuple[Arrays, Arrays]: ...
@overload
def vjp(
    fun: Callable[..., R],
    *primals: Any,
    has_aux: Literal[False] = False,
    reduce_axes: tuple[()] = (),
) -> tuple[R, Pullback]: ...
@overload
def vjp(
    fun: Callable[..., tuple[R, A]],
    *primals: Any,
    has_aux: Literal[True],
    reduce_axes: tuple[()] = (),
) -> tuple[R, Pullback, A]: ...
def vjp(
    fun: Callable[..., Any],
    *primals: Any,
    has_aux: bool = False,
    reduce_axes: tuple[()] = (),
    **mlx: Any,
) -> Any:
    """The vector-Jacobian product: a function's value and its pullback, or MLX's two lists.

    `vjp(fun, *primals)` is JAX's form. `vjp(fun, primals, cotangents)` with two *lists of arrays*
    (or with `cotangents` by name) is MLX's. Whoever means two lists as two tree arguments of `fun`
    gives `has_aux`, or tuples.

    Args:
        fun: A function of as many arguments as there are primals. JAX's form takes trees and
            returns a tree of arrays, MLX's takes arrays and returns one or several.
        primals: Where to differentiate: arrays, numbers, or trees of them.
        has_aux: `fun` returns a pair (output, aux), and only the output is differentiated.
        reduce_axes: Empty: JAX takes no other any more.

    Returns:
        JAX's form: `(output, pullback)`, with `has_aux` `(output, pullback, aux)`. The pullback
        takes a cotangent, a tree like the output with each array's shape and dtype (None for
        an integer), and returns a tuple with a gradient for every primal, of its shape and dtype
        (zeros for integers, where JAX has float0). It runs `fun` again, for MLX cannot replay a
        graph: on the primals as they were, with the random draws of the first run. MLX's form:
        `(outputs, gradients)`, two lists.

        For complex arrays the pullback of JAX's form is the transpose J^T c, as in JAX. MLX's form
        answers J^H c, as `mx.vjp` does.

    Raises:
        ArgumentError: a primal or an output that is no array, a cotangent that does not go with
            the output. (It is a ValueError, as MLX's, and a TypeError, as JAX's.)

    Example:
        >>> import mlx.core as mx
        >>> from mlxshim import vjp
        >>> output, pullback = vjp(lambda x, y: {"product": x * y}, mx.array(2.0), mx.array(3.0))
        >>> pullback({"product": mx.array(10.0)})
        (array(30, dtype=float32), array(20, dtype=float32))
        >>> vjp(lambda x: 2 * x, [mx.array(1.0)], [mx.array(10.0)])
        ([array(2, dtype=float32)], [array(20, dtype=float32)])

    Source: `jax.vjp`, `torch.func.vjp`; mlx/transforms.cpp, `vjp`.
    """
    no_reduce_axes("vjp", reduce_axes)
    if mlx:
        return _vjp_by_name(fun, primals, **mlx)
    if not has_aux and _are_lists(primals):
        return _vjp_of_lists(fun, *primals)
    return _vjp_of_trees(fun, primals, has_aux)


def _vjp_by_name(fun: Any, given: tuple[Any, ...], **names: Any) -> Any:
    names = dict(zip(("primals", "cotangents"), given), **names)
    if set(names) != {"primals", "cotangents"}:
        raise ArgumentError(
            f"[vjp] MLX's form takes primals and cotangents, found {sorted(names)}."
        )
    return _vjp_of_lists(fun, names["primals"], names["cotangents"])


@intercepted
def _vjp_of_lists(
    fun: Callable[..., Any], primals: Sequence[mx.array], cotangents: Sequence[mx.array]
) -> tuple[Arrays, Arrays]:
    check_complex((*primals, *cotangents), "vjp")
    fun = standing_in(fun)
    outputs: Arrays = []

    def body(*arrays: mx.array) -> Arrays:
        result = fun(*arrays)
        outputs[:] = [result] if isinstance(result, mx.array) else result
        if len(outputs) != len(cotangents):
            return []
        for y, c in zip(outputs, cotangents):
            if y.shape != c.shape:
                raise ArgumentError(
                    f"[vjp] An output has shape {tuple(y.shape)}, but its cotangent has shape "
                    f"{tuple(c.shape)}."
                )
        # One that is a stop_gradient would get no cotangent, and the next one that of this.
        return [mx.expand_dims(y, 0) for y in outputs]

    seeds = [mx.expand_dims(c, 0) for c in cotangents]
    pulled = native.vjp(at_level("grad", body), list(primals), seeds)[1]
    if len(outputs) != len(cotangents):
        # MLX wants no cotangent for an output that is a stop_gradient.
        return native.vjp(at_level("grad", fun), list(primals), list(cotangents))
    return outputs, fronted_gradients(pulled)


@intercepted
def _vjp_of_trees(fun: Callable[..., Any], primals: tuple[Any, ...], has_aux: bool) -> Any:
    inputs = Parts(primals, argument_namer("vjp", fun))
    inputs.arrays = copies(inputs.arrays)
    traced = Traced(fun, inputs, "vjp", has_aux)
    value = traced.value()
    outputs: Parts = traced.outputs
    outputs.arrays = copies(outputs.arrays)

    @intercepted
    def pullback(cotangents: Any) -> tuple[Any, ...]:
        return inputs.derivatives(traced.pull(outputs.match(cotangents, "cotangent")))

    return (value, pullback, traced.aux) if has_aux else (value, pullback)


@overload
def jvp(
    fun: Callable[..., Any], primals: list[mx.array], tangents: list[mx.array]
) -> tuple[Arrays, Arrays]: ...
@overload
def jvp(
    fun: Callable[..., R],
    primals: Sequence[Any],
    tangents: Sequence[Any],
    has_aux: Literal[False] = False,
) -> tuple[R, R]: ...
@overload
def jvp(
    fun: Callable[..., tuple[R, A]],
    primals: Sequence[Any],
    tangents: Sequence[Any],
    has_aux: Literal[True],
) -> tuple[R, R, A]: ...
@intercepted
def jvp(fun: Callable[..., Any], primals: Any, tangents: Any, has_aux: bool = False) -> Any:
    """The Jacobian-vector product: a function's value and its derivative along the tangents.

    Given tuples, JAX's form; given two *lists of arrays* and no `has_aux`, MLX's.

    Args:
        fun: A function of as many arguments as there are primals. JAX's form takes trees and
            returns a tree of arrays, MLX's takes arrays and returns one or several.
        primals: A tuple: where to differentiate.
        tangents: A tuple of trees like the primals, with each array's shape and dtype; None for
            an integer.
        has_aux: `fun` returns a pair (output, aux), and only the output is differentiated.

    Returns:
        JAX's form: `(output, tangent)`, two trees alike, with `has_aux` `(output, tangent, aux)`.
        MLX's form: `(outputs, tangents)`, two lists.

    Raises:
        ArgumentError: primals and tangents that do not go together, an output that is no array.

    Example:
        >>> import mlx.core as mx
        >>> from mlxshim import jvp
        >>> jvp(lambda x: x * x, (mx.array(3.0),), (mx.array(1.0),))
        (array(9, dtype=float32), array(6, dtype=float32))
        >>> jvp(lambda x: x * x, [mx.array(3.0)], [mx.array(1.0)])
        ([array(9, dtype=float32)], [array(6, dtype=float32)])

    Source: `jax.jvp`, `torch.func.jvp`; mlx/transforms.cpp, `jvp`.
    """
    if not has_aux and _are_lists((primals, tangents)):
        return _jvp_of_lists(fun, primals, tangents)
    inputs, flat = _along(fun, primals, tangents, "jvp")
    traced = Traced(fun, inputs, "jvp", has_aux)
    arrays, pushed = traced.push(flat)
    output, tangent = traced.outputs.fill(arrays), traced.outputs.derivatives(pushed)
    return (output, tangent, traced.aux) if has_aux else (output, tangent)


def _jvp_of_lists(
    fun: Callable[..., Any], primals: list[mx.array], tangents: list[mx.array]
) -> tuple[Arrays, Arrays]:
    if len(primals) != len(tangents):
        raise ArgumentError(
            f"[jvp] There are {len(primals)} primals and {len(tangents)} tangents: each primal "
            "needs one."
        )
    for n, (x, t) in enumerate(zip(primals, tangents)):
        if x.shape != t.shape:
            raise ArgumentError(
                f"[jvp] Tangent {n} has shape {tuple(t.shape)}, but its primal has shape "
                f"{tuple(x.shape)}."
            )

    fun = standing_in(fun)

    def run(*arrays: mx.array) -> Arrays:
        result = fun(*arrays)
        return [result] if isinstance(result, mx.array) else result

    return push(same_draws(run), primals, tangents)


def _along(
    fun: Callable[..., Any], primals: Any, tangents: Any, tag: str
) -> tuple[Parts, list[mx.array]]:
    for name, given in (("primals", primals), ("tangents", tangents)):
        if not isinstance(given, (tuple, list)):
            raise ArgumentError(
                f"[{tag}] {name} must be a tuple with one entry for each argument, found "
                f"{describe(given)}. Write ({name[:-1]},) for one argument."
            )
    inputs = Parts(tuple(primals), argument_namer(tag, fun))
    return inputs, inputs.match(tuple(tangents), "tangent")


def _are_lists(given: tuple[Any, ...]) -> bool:
    """Whether these are two lists of arrays: MLX's form."""
    return len(given) == 2 and all(
        type(x) is list and x and all(isinstance(y, mx.array) for y in x) for x in given
    )


@overload
def linearize(
    fun: Callable[..., R], /, *primals: Any, has_aux: Literal[False] = False
) -> tuple[R, Callable[..., R]]: ...
@overload
def linearize(
    fun: Callable[..., tuple[R, A]], /, *primals: Any, has_aux: Literal[True]
) -> tuple[R, Callable[..., R], A]: ...
@intercepted
def linearize(fun: Callable[..., Any], /, *primals: Any, has_aux: bool = False) -> Any:
    """A function's value, and its derivative as a function of the tangents.

    Args:
        fun: A function of as many arguments as there are primals, which returns a tree of arrays.
        primals: Where to differentiate: arrays, numbers, or trees of them.
        has_aux: `fun` returns a pair (output, aux), and only the output is differentiated.

    Returns:
        `(output, tangent_map)`, with `has_aux` `(output, tangent_map, aux)`. The tangent map takes
        one tangent for each primal, of its shapes and dtypes, and returns a tree like the output.
        It runs `fun` again with every call, on the primals as they were and with the random draws
        of the first run: what JAX saves by linearizing once, MLX's graph cannot.

    Raises:
        ArgumentError: a primal or an output that is no array, tangents that do not go with the
            primals.

    Example:
        >>> import mlx.core as mx
        >>> from mlxshim import linearize
        >>> output, tangent_map = linearize(lambda x: x**3, mx.array(2.0))
        >>> tangent_map(mx.array(1.0)), tangent_map(mx.array(10.0))
        (array(12, dtype=float32), array(120, dtype=float32))

    Source: `jax.linearize`, `torch.func.linearize`.
    """
    inputs = Parts(primals, argument_namer("linearize", fun))
    inputs.arrays = copies(inputs.arrays)
    traced = Traced(fun, inputs, "linearize", has_aux)
    value = traced.value()

    @intercepted
    def tangent_map(*tangents: Any) -> Any:
        pushed = traced.push(inputs.match(tangents, "tangent"))[1]
        return traced.outputs.derivatives(pushed)

    return (value, tangent_map, traced.aux) if has_aux else (value, tangent_map)


@intercepted
def linear_transpose(fun: Callable[..., Any], /, *primals: Any) -> Pullback:
    """The transpose of a linear function.

    Args:
        fun: A function that is linear in its arguments (or affine, for a constant has no part in
            the transpose), and returns a tree of arrays.
        primals: What the arguments look like: trees of floating or complex arrays, or of anything
            with a `shape` and a `dtype`. Their values are not read.

    Returns:
        A function of a cotangent, a tree like the output, that returns a tuple with one tree for
        each argument.

    Raises:
        ArgumentError: integer arguments or outputs; a function whose derivative depends on where
            it is taken, which is not linear.

    Example:
        >>> import mlx.core as mx
        >>> from mlxshim import linear_transpose
        >>> f = lambda x: mx.array([[1.0, 2.0], [3.0, 4.0]]) @ x
        >>> linear_transpose(f, mx.zeros(2))(mx.array([1.0, 10.0]))
        (array([31, 42], dtype=float32),)

    Source: `jax.linear_transpose`.
    """
    tag = "linear_transpose"
    inputs = Parts(_zeros(primals), argument_namer(tag, fun))
    _only_inexact(inputs, tag)
    traced = Traced(fun, inputs, tag)
    traced.value()
    outputs: Parts = traced.outputs
    _only_inexact(outputs, tag)
    outputs.arrays = [mx.zeros_like(y) for y in outputs.arrays]
    if inputs.arrays and outputs.arrays and _depends_on_the_point(traced):
        raise ArgumentError(
            "[linear_transpose] The function is not linear in its arguments: its derivative "
            "depends on where it is taken. vjp gives the transpose of the derivative at one point."
        )

    @intercepted
    def transposed(cotangents: Any) -> tuple[Any, ...]:
        return inputs.derivatives(traced.pull(outputs.match(cotangents, "cotangent")))

    return transposed


def _zeros(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _zeros(x) for key, x in tree.items()}
    if isinstance(tree, (list, tuple)):
        several = [_zeros(x) for x in tree]
        return type(tree)(*several) if hasattr(tree, "_fields") else type(tree)(several)
    dtype = getattr(tree, "dtype", None)
    return mx.zeros(tree.shape, dtype) if isinstance(dtype, mx.Dtype) else tree


def _only_inexact(parts: Parts, tag: str) -> None:
    found = parts.first(lambda x: not mx.issubdtype(x.dtype, mx.inexact))
    if found is not None:
        raise ArgumentError(
            f"{parts.what(found[0])} is {name_of(found[1].dtype)}: {tag} is of floating or complex "
            "arguments and outputs."
        )


def _depends_on_the_point(traced: Traced) -> bool:
    """Whether the pullback is a function of the primals: by the trace, without any value."""
    depends: list[bool] = []

    def rule(y: mx.array, axis: int) -> tuple[mx.array, int]:
        depends.append(True)
        return y, axis

    def pulled(*points: mx.array) -> list[mx.array]:
        watched: list[mx.array] = []
        for g in pull(traced.run, points, traced.outputs.arrays):
            node: Any = Node(lambda y: y)
            node.vmap(rule)
            watched.append(node(g))
        return watched

    vmap(pulled)(*(mx.expand_dims(x, 0) for x in traced.primals.arrays))
    return bool(depends)
