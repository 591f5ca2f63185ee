"""grad, value_and_grad, vjp, jvp: MLX's derivatives, with every rule taking part."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from ..core.interception import intercepted
from ..core.levels import at_level

Argnums = int | Sequence[int] | None


def value_and_grad(
    fun: Callable[..., Any],
    argnums: Argnums = None,
    argnames: str | Sequence[str] = (),
    has_aux: bool = False,
) -> Callable[..., tuple[Any, Any]]:
    """The value of a scalar function and its gradient.

    Args:
        fun: Returns a scalar array, or a tuple that begins with one.
        argnums: Which positional arguments to differentiate with respect to: an int, or several.
            Default: the first, unless `argnames` is given. A tuple is answered by a tuple of
            gradients in its own order, as in JAX; a list as MLX does (one gradient for a list of
            one). Negative numbers count from the last argument.
        argnames: Which keyword arguments: a name, or several.
        has_aux: Insist that `fun` returns a pair (value, anything).

    Returns:
        A function with `fun`'s arguments that returns (what `fun` returned, gradients); each
        gradient has the shape and dtype of its argument. With `argnames` the gradients are
        (positional gradients, dict by name), as MLX's.

    Raises:
        ValueError: no scalar value, an argument number out of range or named twice.

    Example:
        >>> import mlx.core as mx
        >>> from mlxshim import value_and_grad
        >>> value_and_grad(lambda x, y: (x * y).sum(), argnums=(1, 0))(mx.array(3.0), mx.array(4.0))
        (array(12, dtype=float32), (array(3, dtype=float32), array(4, dtype=float32)))

    Source: mlx/transforms.cpp, `value_and_grad`; tuples of argnums and has_aux after JAX.
    """
    body = at_level("grad", _with_aux(fun) if has_aux else fun)
    if _is_mlx_form(argnums):
        return functools.wraps(fun, updated=())(
            intercepted(mx.value_and_grad(body, argnums, argnames))
        )

    @functools.wraps(fun, updated=())
    @intercepted
    def differentiated(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
        numbers, restore = _resolve(argnums, len(args))
        value, grads = mx.value_and_grad(body, numbers, argnames)(*args, **kwargs)
        return value, restore(grads)

    return differentiated


def grad(
    fun: Callable[..., Any],
    argnums: Argnums = None,
    argnames: str | Sequence[str] = (),
    has_aux: bool = False,
) -> Callable[..., Any]:
    """The gradient of a scalar function; arguments as those of `value_and_grad`.

    Returns:
        A function with `fun`'s arguments that returns the gradients; with `has_aux`, the pair
        (gradients, aux) for a `fun` that returns (value, aux).

    Raises:
        ValueError: `fun` returns no scalar array, or without `has_aux` more than that.

    Example:
        >>> import mlx.core as mx
        >>> from mlxshim import grad
        >>> grad(lambda x: x**3)(mx.array(2.0))
        array(12, dtype=float32)
    """
    body = at_level("grad", _with_aux(fun) if has_aux else fun)
    if _is_mlx_form(argnums) and not has_aux:
        return functools.wraps(fun, updated=())(intercepted(mx.grad(body, argnums, argnames)))

    @functools.wraps(fun, updated=())
    @intercepted
    def differentiated(*args: Any, **kwargs: Any) -> Any:
        numbers, restore = _resolve(argnums, len(args))
        if not has_aux:
            return restore(mx.grad(body, numbers, argnames)(*args, **kwargs))
        (_, aux), grads = mx.value_and_grad(body, numbers, argnames)(*args, **kwargs)
        return restore(grads), aux

    return differentiated


@intercepted
def vjp(
    fun: Callable[..., Any], primals: Sequence[mx.array], cotangents: Sequence[mx.array]
) -> tuple[list[mx.array], list[mx.array]]:
    """The vector-Jacobian product, in MLX's form.

    Args:
        fun: A function of as many arrays as there are primals, returning one or several arrays.
        primals: Where to differentiate.
        cotangents: One for each output, of its shape.

    Returns:
        (outputs, one gradient for each primal).

    Raises:
        ValueError: as `mx.vjp`, when numbers or shapes do not match.

    Example:
        >>> import mlx.core as mx
        >>> from mlxshim import vjp
        >>> vjp(lambda x: 2 * x, [mx.array(1.0)], [mx.array(10.0)])
        ([array(2, dtype=float32)], [array(20, dtype=float32)])
    """
    return mx.vjp(at_level("grad", fun), primals, cotangents)  # pyright: ignore


@intercepted
def jvp(
    fun: Callable[..., Any], primals: Sequence[mx.array], tangents: Sequence[mx.array]
) -> tuple[list[mx.array], list[mx.array]]:
    """The Jacobian-vector product, in MLX's form.

    Args:
        fun: A function of as many arrays as there are primals, returning one or several arrays.
        primals: Where to differentiate.
        tangents: One for each primal, of its shape.

    Returns:
        (outputs, one tangent for each output).

    Raises:
        ValueError: as `mx.jvp`, when numbers or shapes do not match.

    Example:
        >>> import mlx.core as mx
        >>> from mlxshim import jvp
        >>> jvp(lambda x: x * x, [mx.array(3.0)], [mx.array(1.0)])
        ([array(9, dtype=float32)], [array(6, dtype=float32)])
    """
    return mx.jvp(at_level("jvp", fun), primals, tangents)  # pyright: ignore


def _is_mlx_form(argnums: Argnums) -> bool:
    """Whether MLX takes and answers these argnums as they are, for any number of arguments."""
    several = (argnums,) if isinstance(argnums, int) else () if argnums is None else argnums
    if isinstance(several, str) or any(type(n) is not int for n in several):
        raise ValueError(f"[grad] argnums must be an int or several, found {argnums!r}.")
    # A list is answered as MLX answers it; a tuple is JAX's.
    return argnums is None or (not isinstance(argnums, tuple) and all(n >= 0 for n in several))


def _resolve(argnums: Argnums, count: int) -> tuple[Any, Callable[[Any], Any]]:
    """argnums as MLX takes them, and how to bring its gradients into the caller's form."""
    if argnums is None:
        return argnums, _as_they_are
    several = (argnums,) if isinstance(argnums, int) else tuple(argnums)
    numbers = [n + count if n < 0 else n for n in several]
    for n in numbers:
        if not 0 <= n < count:
            raise ValueError(
                f"[grad] argnums {argnums!r} is out of range for a call with {count} positional "
                "arguments."
            )
    if len(set(numbers)) != len(numbers):
        raise ValueError(f"[grad] argnums {argnums!r} names an argument twice.")
    if isinstance(argnums, int):
        return numbers[0], _as_they_are
    if not isinstance(argnums, tuple):
        return numbers, _as_they_are
    ordered = sorted(numbers)

    def restore(grads: Any) -> Any:
        if len(ordered) == 1:
            return (grads,)
        return tuple(grads[ordered.index(n)] for n in numbers)

    return ordered, restore


def _as_they_are(grads: Any) -> Any:
    return grads


def _with_aux(fun: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(fun, updated=())
    def checked(*args: Any, **kwargs: Any) -> Any:
        result = fun(*args, **kwargs)
        if not isinstance(result, tuple) or len(result) != 2:
            raise ValueError(
                "[grad] With has_aux=True the function must return a pair (value, aux), found "
                f"{type(result).__name__}."
            )
        return result

    return checked
