"""patched: code that calls MLX's transforms gets mlxshim's.

The arguments and the answers stay MLX's: gradients in ascending order of the arguments, one for
a list of one, df/dx + i df/dy for a complex argument, lists for vjp and jvp.

Source: python/src/transforms.cpp.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import mlx.core as mx
from typing_extensions import ParamSpec

from ..core import levels, native, trees
from ..core.errors import ArgumentError
from ..core.interception import (
    close_block,
    in_block,
    intercept,
    intercepted,
    open_block,
    original,
)
from ..core.levels import at_level
from . import linear
from . import vmap as mapping
from ._products import check_complex

P = ParamSpec("P")
R = TypeVar("R")


def patched() -> Patched:
    """A block in which code that calls MLX's transforms gets mlxshim's, unchanged.

    `with patched():`, or `@patched()` over a function, is for a training loop that one does not
    own. Inside it, `mx.vmap`, `mx.grad`, `mx.value_and_grad`, `mx.vjp`, `mx.jvp` and
    `mx.checkpoint` are mlxshim's, and so is what is built on them: `nn.value_and_grad`,
    `nn.utils.checkpoint`, every trainer that calls those. Arguments and answers are as MLX has
    them: several gradients come in ascending order of their arguments; that of a complex argument
    is df/dx + i df/dy; the random numbers of a mapped function are different for each sample, as
    in a loop.

    It is this thread that is inside: other threads go on with MLX's own. (So do not `await` in
    the block: other tasks of the thread would be inside, too.) Blocks nest, and an exception, an
    interrupt too, ends one as its end does.

    What counts is where a transform is *made*: a function made inside is mlxshim's for good, and
    works as well outside; one made before, `step = mx.grad(loss)`, stays MLX's when it is called
    inside. A function that `mx.compile` has traced keeps what it was traced with. Not reached is
    MLX's function under a name of one's own, as after `from mlx.core import grad`: look it up as
    `mx.grad`.

    Raises:
        ArgumentError: as a decorator of a generator or a coroutine, which run after they were
            called.

    Example:
        >>> import mlx.core as mx
        >>> import mlxshim
        >>> def somebody_elses(w, xs):
        ...     return mx.vmap(mx.grad(lambda w, x: (w * x).sum()), in_axes=(None, 0))(w, xs)
        >>> with mlxshim.patched():
        ...     print(somebody_elses(mx.ones(2), mx.array([[1.0, 2.0], [3.0, 4.0]])))
        array([[1, 2],
               [3, 4]], dtype=float32)
    """
    return Patched()


_RUNS_LATER = (
    inspect.isgeneratorfunction,
    inspect.iscoroutinefunction,
    inspect.isasyncgenfunction,
)


class Patched:
    """What `patched()` returns: a context manager, for use as often as one likes, or a decorator.

    A block that nobody closes, for an interrupt came before its first line, goes with this.
    """

    def __init__(self) -> None:
        self._open: list[tuple[int, object]] = []

    def __enter__(self) -> None:
        held = threading.get_ident(), object()
        self._open.append(held)
        try:
            open_block(held[1])
        except BaseException:
            self._close(held)
            raise

    def __exit__(self, *_: object) -> None:
        here = threading.get_ident()
        held = [one for one in self._open if one[0] == here]
        if not held:
            return
        try:
            self._close(held[-1])
        except BaseException:  # interrupted
            self._close(held[-1])
            raise

    def _close(self, held: tuple[int, object]) -> None:
        close_block(held[1])
        if held in self._open:
            self._open.remove(held)

    def __del__(self) -> None:
        for _, block in getattr(self, "_open", ()):  # it may not have come to be
            close_block(block)

    def __call__(self, fun: Callable[P, R]) -> Callable[P, R]:
        if any(is_later(fun) for is_later in _RUNS_LATER):
            raise ArgumentError(
                f"[patched] {getattr(fun, '__name__', fun)!r} is a generator or a coroutine, which "
                "runs after it has been called: write `with patched():` inside it, around code "
                "without a yield or an await."
            )

        @functools.wraps(fun)
        def inside(*args: P.args, **kwargs: P.kwargs) -> R:
            with patched():
                return fun(*args, **kwargs)

        return inside


# MLX's signatures ------------------------------------------------------------------------------


def _in_blocks(ours: Callable[..., Any]) -> Callable[..., Any]:
    name = ours.__name__
    kind: levels.Kind = "jvp" if name == "jvp" else "grad"

    @intercept(mx, name, patched=True)
    def call(*args: Any, **kwargs: Any) -> Any:
        if in_block():
            return ours(*args, **kwargs)
        # MLX's own, in a trace of ours: what is inside it is one level deeper.
        if args:
            args = (at_level(kind, args[0]), *args[1:])
        elif "fun" in kwargs:
            kwargs["fun"] = at_level(kind, kwargs["fun"])
        return original(mx, name)(*args, **kwargs)

    return ours


@_in_blocks
def grad(fun: Any, argnums: Any = None, argnames: Any = ()) -> Any:
    differentiated = _value_and_grad("grad", fun, argnums, argnames)
    return functools.wraps(fun, updated=())(lambda *args, **kw: differentiated(*args, **kw)[1])


@_in_blocks
def value_and_grad(fun: Any, argnums: Any = None, argnames: Any = ()) -> Any:
    differentiated = _value_and_grad("value_and_grad", fun, argnums, argnames)
    return functools.wraps(fun, updated=())(differentiated)


def _value_and_grad(tag: str, fun: Any, argnums: Any, argnames: Any) -> Callable[..., Any]:
    """As `autodiff.value_and_grad`; what may be differentiated is up to MLX."""
    chosen: dict[str, Any] = {"argnums": argnums, "argnames": argnames}
    mlx: Callable[..., Any] = native.grad if tag == "grad" else native.value_and_grad
    mlx(fun, **chosen)  # refuses now what it does refuse
    fun = levels.standing_in(fun)
    numbers = [0] if argnums is None and not argnames else argnums
    numbers = [numbers] if isinstance(numbers, int) else numbers or ()
    names = [argnames] if isinstance(argnames, str) else argnames

    @intercepted
    def differentiated(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
        results: list[Any] = []

        def body(*args: Any, **kwargs: Any) -> Any:
            result = fun(*args, **kwargs)
            value = result
            if tag == "value_and_grad" and isinstance(result, tuple) and result:
                value = result[0]
            results.append(result)
            return value

        trees_ = [args[n] for n in numbers if n < len(args)], [kwargs.get(n) for n in names]
        check_complex([x for _, x in trees.leaves(trees_) if isinstance(x, mx.array)], tag)
        found = mlx(at_level("grad", body), **chosen)(*args, **kwargs)
        return results[0], found if tag == "grad" else found[1]

    return differentiated


@_in_blocks
def vjp(fun: Any, primals: Sequence[mx.array], cotangents: Sequence[mx.array]) -> Any:
    return linear.vjp(fun, primals=list(primals), cotangents=list(cotangents))


@_in_blocks
def jvp(fun: Any, primals: Sequence[mx.array], tangents: Sequence[mx.array]) -> Any:
    return linear.jvp(fun, list(primals), list(tangents))


@intercept(mx, "vmap", patched=True)
def vmap(fun: Any, in_axes: Any = 0, out_axes: Any = 0) -> Any:
    if in_block():
        return mapping.vmap(fun, in_axes, out_axes)
    return levels.mapping(original(mx, "vmap")(fun, in_axes, out_axes))
