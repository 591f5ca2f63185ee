"""grad, value_and_grad, grad_and_value: the gradient of a scalar function.

MLX's `value_and_grad` gives whatever a function returns besides the value a derivative of zero
further out: here it keeps its own.

Source: mlx/transforms.cpp (`value_and_grad`), python/src/transforms.cpp; `argnums` tuples,
`has_aux`, `holomorphic` and `allow_int` after `jax.grad`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar, overload

import mlx.core as mx
from typing_extensions import ParamSpec

from ..core import native, trees
from ..core.errors import ArgumentError
from ..core.fronted import fronted_gradients
from ..core.interception import intercepted
from ..core.levels import at_level, standing_in
from ._products import check_complex, pair
from ._products import conjugate as conjugated
from ._structure import REAL, Parts, as_array, describe, name_of, no_reduce_axes, parameter, plain

P = ParamSpec("P")
R = TypeVar("R")
A = TypeVar("A")
Argnums = int | Sequence[int] | None
Argnames = str | Sequence[str]


@overload
def value_and_grad(
    fun: Callable[P, tuple[R, A]],
    argnums: Argnums = None,
    argnames: Argnames = (),
    *,
    has_aux: Literal[True],
    holomorphic: bool = False,
    allow_int: bool = False,
    reduce_axes: tuple[()] = (),
    conjugate: bool | None = None,
) -> Callable[P, tuple[tuple[R, A], Any]]: ...
@overload
def value_and_grad(
    fun: Callable[P, R],
    argnums: Argnums = None,
    argnames: Argnames | bool = (),
    has_aux: bool = False,
    holomorphic: bool = False,
    allow_int: bool = False,
    *,
    reduce_axes: tuple[()] = (),
    conjugate: bool | None = None,
) -> Callable[P, tuple[R, Any]]: ...
def value_and_grad(
    fun: Callable[..., Any],
    argnums: Argnums = None,
    argnames: Argnames | bool = (),
    has_aux: bool = False,
    holomorphic: bool = False,
    allow_int: bool = False,
    *,
    reduce_axes: tuple[()] = (),
    conjugate: bool | None = None,
) -> Callable[..., tuple[Any, Any]]:
    """The value of a scalar function and its gradient.

    Args:
        fun: Returns a scalar array, or a tuple that begins with one, as MLX has it.
        argnums: Which positional arguments to differentiate with respect to: an int, or several.
            Default: the first, unless `argnames` is given. A tuple is answered by a tuple of
            gradients in its own order, as in JAX; a list as MLX does (one gradient for a list of
            one). Negative numbers count from the last argument.
        argnames: Which keyword arguments: a name, or several.
        has_aux: Insist that `fun` returns a pair (value, anything). (JAX has it in third place:
            a bool there is understood.)
        holomorphic: `fun` is a holomorphic function of complex arguments, with a complex value:
            the gradient is df/dz.
        allow_int: Integer arguments get zeros, where JAX has float0, and are not refused.
        reduce_axes: Empty: JAX takes no other any more.
        conjugate: For a real function of a complex argument z = x + iy: True for the gradient
            df/dx + i df/dy of MLX and PyTorch, False for the df/dx - i df/dy of JAX. As they
            differ, None refuses complex arguments.

    Returns:
        A function with `fun`'s arguments that returns (what `fun` returned, gradients); each
        gradient is a tree like its argument, with the shapes and dtypes of its arrays. (In an
        `nn.Module`, None stands for what has no gradient.) With `argnames` the gradients are
        (positional gradients, dict by name), as MLX's.

    Raises:
        ArgumentError: no scalar value, an argument that has no derivative, an argument number out
            of range or named twice. (It is a ValueError, as MLX's, and a TypeError, as JAX's.)

    Example:
        >>> import mlx.core as mx
        >>> from mlxshim import value_and_grad
        >>> value_and_grad(lambda x, y: (x * y).sum(), argnums=(1, 0))(mx.array(3.0), mx.array(4.0))
        (array(12, dtype=float32), (array(3, dtype=float32), array(4, dtype=float32)))

    Source: mlx/transforms.cpp, `value_and_grad`; `jax.value_and_grad`.
    """
    if isinstance(argnames, bool):
        argnames, has_aux = (), argnames or has_aux
    no_reduce_axes("value_and_grad", reduce_axes)
    g = _Gradient(
        "value_and_grad", fun, argnums, argnames, has_aux, holomorphic, allow_int, conjugate
    )
    quick = g.quick_with_value() or g.value_and_grad
    return functools.wraps(fun, updated=())(intercepted(quick))


@overload
def grad(
    fun: Callable[P, tuple[Any, A]],
    argnums: Argnums = None,
    argnames: Argnames = (),
    *,
    has_aux: Literal[True],
    holomorphic: bool = False,
    allow_int: bool = False,
    reduce_axes: tuple[()] = (),
    conjugate: bool | None = None,
) -> Callable[P, tuple[Any, A]]: ...
@overload
def grad(
    fun: Callable[P, Any],
    argnums: Argnums = None,
    argnames: Argnames | bool = (),
    has_aux: bool = False,
    holomorphic: bool = False,
    allow_int: bool = False,
    *,
    reduce_axes: tuple[()] = (),
    conjugate: bool | None = None,
) -> Callable[P, Any]: ...
def grad(
    fun: Callable[..., Any],
    argnums: Argnums = None,
    argnames: Argnames | bool = (),
    has_aux: bool = False,
    holomorphic: bool = False,
    allow_int: bool = False,
    *,
    reduce_axes: tuple[()] = (),
    conjugate: bool | None = None,
) -> Callable[..., Any]:
    """The gradient of a scalar function; arguments as those of `value_and_grad`.

    Returns:
        A function with `fun`'s arguments that returns the gradients; with `has_aux`, the pair
        (gradients, aux) for a `fun` that returns (value, aux).

    Raises:
        ArgumentError: `fun` returns no scalar array, or without `has_aux` more than that; and as
            `value_and_grad`.

    Example:
        >>> import mlx.core as mx
        >>> from mlxshim import grad
        >>> grad(lambda x: x**3)(mx.array(2.0))
        array(12, dtype=float32)

    Source: mlx/transforms.cpp, `value_and_grad`; `jax.grad`, `torch.func.grad`.
    """
    if isinstance(argnames, bool):
        argnames, has_aux = (), argnames or has_aux
    no_reduce_axes("grad", reduce_axes)
    g = _Gradient("grad", fun, argnums, argnames, has_aux, holomorphic, allow_int, conjugate)
    return functools.wraps(fun, updated=())(intercepted(g.quick() or g.grad))


@overload
def grad_and_value(
    fun: Callable[P, tuple[R, A]],
    argnums: Argnums = None,
    has_aux: Literal[True] = ...,
    *,
    argnames: Argnames = (),
    conjugate: bool | None = None,
) -> Callable[P, tuple[Any, tuple[R, A]]]: ...
@overload
def grad_and_value(
    fun: Callable[P, R],
    argnums: Argnums = None,
    has_aux: bool = False,
    *,
    argnames: Argnames = (),
    conjugate: bool | None = None,
) -> Callable[P, tuple[Any, R]]: ...
def grad_and_value(
    fun: Callable[..., Any],
    argnums: Argnums = None,
    has_aux: bool = False,
    *,
    argnames: Argnames = (),
    conjugate: bool | None = None,
) -> Callable[..., tuple[Any, Any]]:
    """`value_and_grad` with its two results in the order of `torch.func.grad_and_value`.

    Arguments are those of `value_and_grad`.

    Returns:
        A function with `fun`'s arguments that returns (gradients, value), and with `has_aux`
        (gradients, (value, aux)).

    Raises:
        ArgumentError: as `value_and_grad`.

    Example:
        >>> import mlx.core as mx
        >>> from mlxshim import grad_and_value
        >>> grad_and_value(lambda x: x**3)(mx.array(2.0))
        (array(12, dtype=float32), array(8, dtype=float32))

    Source: `torch.func.grad_and_value`.
    """
    g = _Gradient("grad_and_value", fun, argnums, argnames, has_aux, False, False, conjugate)

    @functools.wraps(fun, updated=())
    @intercepted
    def differentiated(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
        value, grads = g.value_and_grad(*args, **kwargs)
        return grads, value

    return differentiated


def value_and_gradients(tag: str, fun: Callable[..., Any], count: int) -> Callable[..., Any]:
    """`value_and_grad` for the first arguments, which complains in the name of `tag`."""
    g = _Gradient(tag, fun, tuple(range(count)), (), False, False, False, None)
    return intercepted(g.value_and_grad)


class _Gradient:
    """The options of one gradient, and the calls of it."""

    def __init__(
        self,
        tag: str,
        fun: Callable[..., Any],
        argnums: Argnums,
        argnames: Argnames,
        has_aux: bool,
        holomorphic: bool,
        allow_int: bool,
        conjugate: bool | None,
    ) -> None:
        if not callable(fun):
            raise ArgumentError(f"[{tag}] fun must be callable, found {describe(fun)}.")
        self.names = (argnames,) if isinstance(argnames, str) else tuple(argnames)
        self.argnums = 0 if argnums is None and not self.names else argnums
        check_argnums(self.argnums, tag)
        self.tag, self.fun, self.has_aux = tag, standing_in(fun), has_aux
        self.holomorphic, self.allow_int, self.conjugate = holomorphic, allow_int, conjugate

    def _one_number(self) -> int | None:
        """The argument's number in the case that is asked for most: one, and no more options."""
        n = self.argnums
        if type(n) is not int or n < 0 or self.names or self.has_aux or self.holomorphic:
            return None
        return n

    def quick(self) -> Callable[..., Any] | None:
        """`grad` of one real argument."""
        n, fun = self._one_number(), self.fun
        if n is None:
            return None

        def scalar(*args: Any, **kwargs: Any) -> mx.array:
            y = fun(*args, **kwargs)
            if type(y) is mx.array and y.ndim == 0 and y.dtype in REAL:
                return y
            return self._scalar(y)

        mlx_grad = native.grad(at_level("grad", scalar), n)

        def quick(*args: Any, **kwargs: Any) -> Any:
            if n < len(args):
                x = args[n]
                if (type(x) is mx.array and x.dtype in REAL) or plain(x):
                    return fronted_gradients(mlx_grad(*args, **kwargs))
            return self.grad(*args, **kwargs)

        return quick

    def quick_with_value(self) -> Callable[..., Any] | None:
        """`value_and_grad` of one real argument."""
        n = self._one_number()
        if n is None:
            return None

        def quick(*args: Any, **kwargs: Any) -> Any:
            if n < len(args):
                x = args[n]
                if (type(x) is mx.array and x.dtype in REAL) or plain(x):
                    return self._real(args, kwargs, n)
            return self.value_and_grad(*args, **kwargs)

        return quick

    def _real(self, args: tuple[Any, ...], kwargs: dict[str, Any], *which: Any) -> tuple[Any, Any]:
        """The value, and MLX's own gradient with respect to real arguments."""
        fun, results = self.fun, []

        def body(*args: Any, **kwargs: Any) -> mx.array:
            return self._value(fun(*args, **kwargs), results)

        grads = native.grad(at_level("grad", body), *which)(*args, **kwargs)
        return results[0], fronted_gradients(grads)

    def grad(self, *args: Any, **kwargs: Any) -> Any:
        value, grads = self.value_and_grad(*args, **kwargs)
        if self.has_aux:
            return grads, value[1]
        if isinstance(value, tuple):
            raise ArgumentError(
                f"[{self.tag}] The function must return a scalar array, found {describe(value)}: "
                "with has_aux=True it may return a pair (value, aux)."
            )
        return grads

    def value_and_grad(self, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        numbers = self._numbers(len(args))
        for name in self.names:
            if name not in kwargs:
                raise ArgumentError(
                    f"[{self.tag}] argnames has {name!r}, but the call has no keyword argument of "
                    f"that name: it has {list(kwargs)}."
                )
        chosen = [args[n] for n in numbers], {name: kwargs[name] for name in self.names}
        if not self.holomorphic and plain(chosen[0]) and plain(chosen[1]):
            # MLX wants ascending numbers, and has one gradient for one number.
            ordered = sorted(numbers)
            names = [*self.names]
            value, grads = self._real(args, kwargs, ordered, names)
            positional, named = grads if names else (grads, {})
            positional = (positional,) if len(ordered) == 1 else positional
            found = tuple(positional[ordered.index(n)] for n in numbers)
            return value, self._answer(found, named)

        parts = Parts(chosen, self._namer(numbers))
        self._check(parts)
        results: list[Any] = []

        def of_arrays(arrays: list[mx.array]) -> mx.array:
            positional, named = parts.fill(arrays)
            full = list(args)
            for n, x in zip(numbers, positional):
                full[n] = x
            return self._value(self.fun(*full, **{**kwargs, **named}), results)

        if parts.arrays:
            grads = fronted_gradients(native.grad(at_level("grad", of_arrays))(parts.arrays))
            if self.holomorphic or self.conjugate is False:
                grads = [conjugated(g) for g in grads]
        else:
            of_arrays([])
            grads = []
        positional, named = parts.derivatives(grads)
        return results[0], self._answer(tuple(positional), named)

    def _answer(self, positional: tuple[Any, ...], named: dict[str, Any]) -> Any:
        argnums: Any = self.argnums
        grads: Any = positional
        if argnums is None:
            grads = None
        elif isinstance(argnums, int) or (type(argnums) is not tuple and len(argnums) == 1):
            grads = positional[0]
        return (grads, named) if self.names else grads

    def _numbers(self, count: int) -> list[int]:
        if self.argnums is None:
            return []
        numbers = positions(self.argnums, count, self.tag)
        # MLX answers a list in the order of the arguments.
        return sorted(numbers) if isinstance(self.argnums, list) else numbers

    def _namer(self, numbers: Sequence[int]) -> Callable[[trees.Path], tuple[str, str]]:
        def name(path: trees.Path) -> tuple[str, str]:
            kind, which, *keys = path
            which = which if kind else parameter(self.fun, numbers[which])
            return self.tag, f"argument {which}{trees.written(tuple(keys))}"

        return name

    def _check(self, parts: Parts) -> None:
        if parts.integers and not self.allow_int:
            path, x = parts.first(lambda x: x.dtype not in REAL and x.dtype != mx.complex64)  # pyright: ignore
            raise ArgumentError(
                f"{parts.what(path)} is {name_of(x.dtype)}, which has no derivative: make it a "
                "floating array, leave it out of argnums, or get zeros with allow_int=True."
            )
        if self.holomorphic:
            found = parts.first(lambda x: x.dtype != mx.complex64)
            if found is not None:
                raise ArgumentError(
                    f"{parts.what(found[0])} is {name_of(found[1].dtype)}: with holomorphic=True "
                    "it must be complex."
                )
        elif parts.complex and self.conjugate is None:
            path, x = parts.first(lambda x: x.dtype == mx.complex64)  # pyright: ignore
            raise ArgumentError(
                f"{parts.what(path)} is complex64. MLX's gradient of a real function with respect "
                "to x + iy is df/dx + i df/dy, and JAX's df/dx - i df/dy: choose conjugate=True "
                "for MLX's or conjugate=False for JAX's. Of a holomorphic function, "
                "holomorphic=True gives the derivative."
            )
        check_complex(parts.arrays, self.tag)

    def _value(self, result: Any, results: list[Any]) -> mx.array:
        """The scalar to differentiate; what the function returned is kept in `results`."""
        if self.has_aux:
            value, aux = pair(result, self.tag)
            scalar = self._scalar(value)
            results.append((scalar, aux))
        elif type(result) is mx.array and result.ndim == 0 and result.dtype in REAL:
            scalar = result
            results.append(result)
        elif type(result) is tuple and result:
            scalar = self._scalar(result[0])
            results.append((scalar, *result[1:]))
        else:
            scalar = self._scalar(result)
            results.append(scalar)
        return scalar

    def _scalar(self, value: Any) -> mx.array:
        y = as_array(value)
        if y is None:
            hint = (
                " With has_aux=True it may return a pair (value, aux)."
                if isinstance(value, (tuple, list)) and not self.has_aux
                else ""
            )
            raise ArgumentError(
                f"[{self.tag}] The function must return a scalar array, found {describe(value)}."
                + hint
            )
        if y.ndim:
            raise ArgumentError(
                f"[{self.tag}] The function must return a scalar, but its value has shape "
                f"{tuple(y.shape)}: sum it, or use jacrev or vjp."
            )
        if self.holomorphic:
            if y.dtype != mx.complex64:
                raise ArgumentError(
                    f"[{self.tag}] With holomorphic=True the function's value must be complex, "
                    f"found {name_of(y.dtype)}."
                )
        elif y.dtype not in REAL:
            hint = (
                ". Take its real part, or say holomorphic=True if it is a holomorphic function."
                if y.dtype == mx.complex64
                else ", which has no derivative: return a floating number."
            )
            raise ArgumentError(
                f"[{self.tag}] The function's value must be real and floating, found "
                f"{name_of(y.dtype)}{hint}"
            )
        return y


def check_argnums(argnums: Any, tag: str) -> None:
    several = argnums if isinstance(argnums, (tuple, list)) else (argnums,)
    if argnums is not None and not (several and all(type(n) is int for n in several)):
        raise ArgumentError(
            f"[{tag}] argnums must be an int or a tuple of ints, found {argnums!r}. "
            "(A keyword argument is chosen by argnames.)"
        )


def positions(argnums: int | Sequence[int], count: int, tag: str) -> list[int]:
    """argnums as numbers of positional arguments in a call with `count` of them."""
    several = (argnums,) if isinstance(argnums, int) else argnums
    numbers = [n + count if n < 0 else n for n in several]
    for n in numbers:
        if not 0 <= n < count:
            raise ArgumentError(
                f"[{tag}] argnums {argnums!r} is out of range for a call with {count} positional "
                "arguments. (A keyword argument is chosen by argnames.)"
            )
    if len(set(numbers)) != len(numbers):
        raise ArgumentError(f"[{tag}] argnums {argnums!r} names an argument twice.")
    return numbers
