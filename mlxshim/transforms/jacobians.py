"""jacrev, jacfwd, jacobian, hessian, hvp, vhp: all of a derivative, and the products with it.

A Jacobian is a vmap over unit vectors: of the pullback for its rows (jacrev), of the tangent map
for its columns (jacfwd). A unit vector is made from its number inside the vmap, so that in chunks
no identity matrix is ever in memory. The runs inside draw no random numbers of their own: it is one
function that is differentiated.

Source: `jax.jacrev`, `jax.jacfwd`, `jax.hessian`; `chunk_size` after `torch.func.jacrev`; hvp and
vhp after `torch.autograd.functional`; Pearlmutter, "Fast exact multiplication by the Hessian"
(1994).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar, overload

import mlx.core as mx
from typing_extensions import ParamSpec

from ..core.errors import ArgumentError
from ..core.interception import intercepted
from ..core.levels import standing_in
from ._products import Traced
from ._structure import REAL, Parts, argument_namer, describe, name_of
from .autodiff import check_argnums, positions, value_and_grad, value_and_gradients
from .linear import jvp
from .vmap import vmap

P = ParamSpec("P")
A = TypeVar("A")
Argnums = int | Sequence[int]


@overload
def jacrev(
    fun: Callable[P, tuple[Any, A]],
    argnums: Argnums = 0,
    *,
    has_aux: Literal[True],
    holomorphic: bool = False,
    allow_int: bool = False,
    chunk_size: int | None = None,
) -> Callable[P, tuple[Any, A]]: ...
@overload
def jacrev(
    fun: Callable[P, Any],
    argnums: Argnums = 0,
    has_aux: bool = False,
    holomorphic: bool = False,
    allow_int: bool = False,
    *,
    chunk_size: int | None = None,
) -> Callable[P, Any]: ...
def jacrev(
    fun: Callable[..., Any],
    argnums: Argnums = 0,
    has_aux: bool = False,
    holomorphic: bool = False,
    allow_int: bool = False,
    *,
    chunk_size: int | None = None,
) -> Callable[..., Any]:
    """The Jacobian, row by row in reverse mode: for functions with fewer outputs than inputs.

    Args:
        fun: A function of trees that returns a tree of floating arrays.
        argnums: Which positional arguments to differentiate with respect to: an int, or several.
            Negative numbers count from the last argument.
        has_aux: `fun` returns a pair (output, aux), and only the output is differentiated.
        holomorphic: `fun` is a holomorphic function of complex arguments with complex outputs.
            Without it a row of complex arguments is df/dx - i df/dy, as in JAX.
        allow_int: Integer arguments get zeros, and are not refused.
        chunk_size: At most this many rows are in memory at a time; the others wait.

    Returns:
        A function with `fun`'s arguments that returns a tree like the output, with, in the place of
        each array of shape S, a tree like the argument whose arrays of shape T have become arrays
        of shape (*S, *T). Several argnums: a tuple of such trees in the place of each output array.
        With `has_aux` a pair (Jacobian, aux).

    Raises:
        ArgumentError: an argument or an output without a derivative, an argument number out of
            range or named twice.

    Example:
        >>> import mlx.core as mx
        >>> from mlxshim import jacrev
        >>> jacrev(lambda x: x * x)(mx.array([1.0, 2.0]))
        array([[2, 0],
               [0, 4]], dtype=float32)

    Source: `jax.jacrev`, `torch.func.jacrev`.
    """
    options = _Options("jacrev", fun, argnums, has_aux, holomorphic, allow_int, chunk_size)

    @functools.wraps(fun, updated=())
    @intercepted
    def jacobian(*args: Any, **kwargs: Any) -> Any:
        call = options.call(args, kwargs)
        inputs, traced = call.inputs, call.traced
        if not holomorphic:
            _check(inputs, allow_int, "jacrev", "argument", complex_too=True)
        traced.value()
        outputs: Parts = traced.outputs
        if holomorphic:
            _check_complex(inputs, "jacrev")
            _check_complex(outputs, "jacrev")
        else:
            _check(outputs, False, "jacrev", "output", complex_too=False)

        unit, offsets = _units(outputs.arrays)
        total = offsets[-1]
        rows: list[mx.array] = []
        if total and inputs.arrays:
            rows = _along_units(lambda i: traced.pull(unit(i)), total, 0, chunk_size)

        def block(n: int) -> Any:
            y, start, stop = outputs.arrays[n], offsets[n], offsets[n + 1]
            jacobians = [
                mx.reshape(rows[k][start:stop], (*y.shape, *x.shape))
                if total
                else mx.zeros((*y.shape, *x.shape), x.dtype)
                for k, x in enumerate(inputs.arrays)
            ]
            return call.answer(_beside(inputs, jacobians, y.shape))

        result = outputs.map_holes(block)
        return (result, traced.aux) if has_aux else result

    return jacobian


@overload
def jacfwd(
    fun: Callable[P, tuple[Any, A]],
    argnums: Argnums = 0,
    *,
    has_aux: Literal[True],
    holomorphic: bool = False,
    chunk_size: int | None = None,
) -> Callable[P, tuple[Any, A]]: ...
@overload
def jacfwd(
    fun: Callable[P, Any],
    argnums: Argnums = 0,
    has_aux: bool = False,
    holomorphic: bool = False,
    *,
    chunk_size: int | None = None,
) -> Callable[P, Any]: ...
def jacfwd(
    fun: Callable[..., Any],
    argnums: Argnums = 0,
    has_aux: bool = False,
    holomorphic: bool = False,
    *,
    chunk_size: int | None = None,
) -> Callable[..., Any]:
    """The Jacobian, column by column in forward mode: for functions with fewer inputs than outputs.

    Arguments, result and errors are those of `jacrev`; complex arguments need `holomorphic`, and
    integer outputs get zeros.

    Returns:
        As `jacrev`.

    Raises:
        ArgumentError: as `jacrev`.

    Example:
        >>> import mlx.core as mx
        >>> from mlxshim import jacfwd
        >>> jacfwd(lambda x: mx.stack([x, x**2, x**3]))(mx.array(2.0))
        array([1, 4, 12], dtype=float32)

    Source: `jax.jacfwd`, `torch.func.jacfwd`.
    """
    options = _Options("jacfwd", fun, argnums, has_aux, holomorphic, False, chunk_size)

    @functools.wraps(fun, updated=())
    @intercepted
    def jacobian(*args: Any, **kwargs: Any) -> Any:
        call = options.call(args, kwargs)
        inputs, traced = call.inputs, call.traced
        if holomorphic:
            _check_complex(inputs, "jacfwd")
        else:
            _check(inputs, False, "jacfwd", "argument", complex_too=False)
        # What the mapped run computes besides belongs to its vmap: aux and shapes have a run.
        traced.value()
        outputs: Parts = traced.outputs
        if holomorphic:
            _check_complex(outputs, "jacfwd")

        unit, offsets = _units(inputs.arrays)
        total = offsets[-1]
        columns: list[mx.array] = []
        if total and outputs.arrays:
            columns = _along_units(lambda i: traced.push(unit(i))[1], total, -1, chunk_size)

        def block(n: int) -> Any:
            y = outputs.arrays[n]
            jacobians = [
                mx.reshape(columns[n][..., offsets[k] : offsets[k + 1]], (*y.shape, *x.shape))
                if total
                else mx.zeros((*y.shape, *x.shape), y.dtype)
                for k, x in enumerate(inputs.arrays)
            ]
            return call.answer(_beside(inputs, jacobians, y.shape))

        def integer(y: mx.array) -> Any:
            zeros = [mx.zeros((*y.shape, *x.shape), y.dtype) for x in inputs.arrays]
            return call.answer(_beside(inputs, zeros, y.shape))

        result = outputs.map_holes(block, integer)
        return (result, traced.aux) if has_aux else result

    return jacobian


#: The Jacobian in reverse mode, as `jax.jacobian`.
jacobian = jacrev


@overload
def hessian(
    fun: Callable[P, tuple[Any, A]],
    argnums: Argnums = 0,
    *,
    has_aux: Literal[True],
    holomorphic: bool = False,
    chunk_size: int | None = None,
) -> Callable[P, tuple[Any, A]]: ...
@overload
def hessian(
    fun: Callable[P, Any],
    argnums: Argnums = 0,
    has_aux: bool = False,
    holomorphic: bool = False,
    *,
    chunk_size: int | None = None,
) -> Callable[P, Any]: ...
def hessian(
    fun: Callable[..., Any],
    argnums: Argnums = 0,
    has_aux: bool = False,
    holomorphic: bool = False,
    *,
    chunk_size: int | None = None,
) -> Callable[..., Any]:
    """All second derivatives: forward over reverse.

    Arguments and errors are those of `jacrev`; `chunk_size` bounds the columns in memory.

    Returns:
        A function with `fun`'s arguments that returns a tree like the output, in it a tree like the
        argument, and in that one once more: an output of shape S and arguments of shapes T and U
        have an array of shape (*S, *T, *U). With `has_aux` a pair (Hessian, aux).

    Raises:
        ArgumentError: as `jacrev`.

    Example:
        >>> import mlx.core as mx
        >>> from mlxshim import hessian
        >>> hessian(lambda x: (x * x.sum() ** 2).sum())(mx.array([1.0, 2.0]))
        array([[18, 18],
               [18, 18]], dtype=float32)

    Source: `jax.hessian`, `torch.func.hessian`.
    """
    rows: Any = jacrev(fun, argnums, has_aux, holomorphic)
    return jacfwd(rows, argnums, has_aux, holomorphic, chunk_size=chunk_size)


def hvp(fun: Callable[..., Any], primals: Any, tangents: Any) -> tuple[Any, Any]:
    """A scalar function's value, and its Hessian times a vector: forward over reverse.

    Args:
        fun: A function of as many arguments as there are primals, which returns a scalar array.
        primals: A tuple with the arguments, or the one argument, an array or a tree.
        tangents: The vector: like the primals, with each array's shape and dtype.

    Returns:
        `(value, product)`, the product a tree like the primals. The cost is that of a few
        gradients, whatever the size of the Hessian.

    Raises:
        ArgumentError: no scalar value, primals that have no derivative, tangents that do not go
            with them.

    Example:
        >>> import mlx.core as mx
        >>> from mlxshim import hvp
        >>> hvp(lambda x: (x**3).sum(), mx.array([1.0, 2.0]), mx.array([1.0, 10.0]))
        (array(9, dtype=float32), array([6, 120], dtype=float32))

    Source: `torch.autograd.functional.hvp`; forward over reverse as in JAX's cookbook.
    """
    points, vectors, alone = _several("hvp", primals, tangents)
    Parts(points, argument_namer("hvp", fun)).match(vectors, "tangent")
    gradient = value_and_gradients("hvp", fun, len(points))

    def both(*points: Any) -> Any:
        value, grads = gradient(*points)
        return grads, value

    _, product, value = jvp(both, points, vectors, has_aux=True)
    return value, product[0] if alone else product


def vhp(fun: Callable[..., Any], primals: Any, cotangents: Any) -> tuple[Any, Any]:
    """A scalar function's value, and a vector times its Hessian: reverse over reverse.

    The Hessian is symmetric: the numbers are those of `hvp`. This one asks no operation for its
    forward mode, and takes more memory.

    Args:
        fun: A function of as many arguments as there are primals, which returns a scalar array.
        primals: A tuple with the arguments, or the one argument, an array or a tree.
        cotangents: The vector: like the primals, with each array's shape and dtype.

    Returns:
        `(value, product)`, the product a tree like the primals.

    Raises:
        ArgumentError: as `hvp`.

    Example:
        >>> import mlx.core as mx
        >>> from mlxshim import vhp
        >>> vhp(lambda x: (x**3).sum(), mx.array([1.0, 2.0]), mx.array([1.0, 10.0]))
        (array(9, dtype=float32), array([6, 120], dtype=float32))

    Source: `torch.autograd.functional.vhp`.
    """
    points, vectors, alone = _several("vhp", primals, cotangents)
    inputs = Parts(points, argument_namer("vhp", fun))
    weights = inputs.match(vectors, "cotangent")
    gradient = value_and_gradients("vhp", fun, len(points))

    def along(*points: Any) -> Any:
        value, grads = gradient(*points)
        found = Parts(grads, argument_namer("vhp", fun)).arrays
        terms = [mx.sum(g * w) for g, w in zip(found, weights)]
        return functools.reduce(mx.add, terms, mx.array(0.0)), value

    numbers = tuple(range(len(points)))
    (_, value), product = value_and_grad(along, argnums=numbers, has_aux=True)(*points)
    return value, product[0] if alone else product


# The parts -------------------------------------------------------------------------------------


class _Options:
    def __init__(
        self,
        tag: str,
        fun: Callable[..., Any],
        argnums: Argnums,
        has_aux: bool,
        holomorphic: bool,
        allow_int: bool,
        chunk_size: int | None,
    ) -> None:
        if not callable(fun):
            raise ArgumentError(f"[{tag}] fun must be callable, found {describe(fun)}.")
        check_argnums(argnums, tag)
        if chunk_size is not None and (type(chunk_size) is not int or chunk_size < 1):
            raise ArgumentError(
                f"[{tag}] chunk_size must be a positive int or None, found {chunk_size!r}."
            )
        self.tag, self.fun, self.argnums = tag, standing_in(fun), argnums
        self.has_aux = has_aux

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call:
        return _Call(self, args, kwargs)


class _Call:
    """One call: its differentiated arguments, and the function of those."""

    def __init__(self, options: _Options, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        fun, tag = options.fun, options.tag
        numbers = positions(options.argnums, len(args), tag)
        self.alone = isinstance(options.argnums, int)
        self.inputs = Parts(tuple(args[n] for n in numbers), argument_namer(tag, fun, numbers))

        def of_chosen(*chosen: Any) -> Any:
            full = list(args)
            for n, x in zip(numbers, chosen):
                full[n] = x
            return fun(*full, **kwargs)

        self.traced = Traced(of_chosen, self.inputs, tag, options.has_aux)

    def answer(self, derivatives: tuple[Any, ...]) -> Any:
        return derivatives[0] if self.alone else derivatives


def _beside(inputs: Parts, jacobians: list[mx.array], shape: tuple[int, ...]) -> Any:
    """The tree of arguments around their Jacobians, zeros for an integer's."""
    return inputs.map_holes(lambda k: jacobians[k], lambda x: mx.zeros((*shape, *x.shape), x.dtype))


def _units(
    arrays: Sequence[mx.array],
) -> tuple[Callable[[mx.array], list[mx.array]], list[int]]:
    """Unit vector number i as arrays like these, and where the numbers of each of them start."""
    offsets = [0]
    for x in arrays:
        offsets.append(offsets[-1] + math.prod(x.shape))
    numbers = [
        mx.reshape(mx.arange(start, stop, dtype=mx.int32), x.shape)
        for x, start, stop in zip(arrays, offsets, offsets[1:])
    ]
    dtypes = [x.dtype for x in arrays]

    def unit(i: mx.array) -> list[mx.array]:
        return [(n == i).astype(dtype) for n, dtype in zip(numbers, dtypes)]

    return unit, offsets


def _along_units(
    of_unit: Callable[[mx.array], list[mx.array]],
    total: int,
    out_axes: int,
    chunk_size: int | None,
) -> list[mx.array]:
    mapped = vmap(of_unit, out_axes=out_axes, randomness="same", chunk_size=chunk_size)
    return mapped(mx.arange(total, dtype=mx.int32))


def _check(parts: Parts, allow_int: bool, tag: str, what: str, complex_too: bool) -> None:
    allowed = REAL | {mx.complex64} if complex_too else REAL
    if parts.integers and not allow_int:
        found = parts.first(lambda x: x.dtype not in REAL and x.dtype != mx.complex64)
        assert found is not None
        hint = ", leave it out of argnums" if what == "argument" else ", return it as aux"
        raise ArgumentError(
            f"{parts.what(found[0])} is {name_of(found[1].dtype)}, which has no derivative: make "
            f"it a floating array{hint}."
        )
    found = parts.first(lambda x: x.dtype not in allowed and x.dtype == mx.complex64)
    if found is not None:
        raise ArgumentError(
            f"{parts.what(found[0])} is complex64: {tag} of it is defined where the function is "
            "holomorphic; say holomorphic=True then."
        )


def _check_complex(parts: Parts, tag: str) -> None:
    found = parts.first(lambda x: x.dtype != mx.complex64)
    if found is not None:
        raise ArgumentError(
            f"{parts.what(found[0])} is {name_of(found[1].dtype)}: with holomorphic=True {tag} "
            "wants complex arguments and outputs."
        )


def _several(tag: str, primals: Any, vectors: Any) -> tuple[tuple[Any, ...], tuple[Any, ...], bool]:
    """The arguments as tuples, and whether there was one without."""
    if isinstance(primals, tuple) and not hasattr(primals, "_fields"):
        if type(vectors) is not tuple or len(vectors) != len(primals):
            raise ArgumentError(
                f"[{tag}] The vector must be a tuple of {len(primals)}, like the primals: found "
                f"{describe(vectors)}."
            )
        return primals, vectors, False
    return (primals,), (vectors,), True
