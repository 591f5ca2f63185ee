"""checkpoint, also called remat: derivatives that recompute what they need, after JAX's."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import mlx.core as mx
from typing_extensions import ParamSpec

from ..core import custom, replay
from ..core.closures import Closure
from ..core.errors import ArgumentError, NoBatchingRule, PerformanceWarning
from ..core.levels import standing_in
from ..core.primitive import Arrays
from . import _flat
from ._calls import Levels, captured_derivative, captures_nothing, name_of, numbers

P = ParamSpec("P")
R = TypeVar("R")


def checkpoint(
    fun: Callable[P, R],
    *,
    prevent_cse: bool = True,
    policy: Callable[..., bool] | None = None,
    static_argnums: int | Sequence[int] = (),
    static_argnames: str | Sequence[str] = (),
    concrete: bool = False,
) -> Callable[P, R]:
    """`fun`, whose derivatives keep its arguments alone and compute the rest anew.

    Args:
        fun: A function of trees with arrays in them (`nn.Module`s too; leaves that are no arrays
            are handed through) that returns a tree of arrays. It may use arrays from around it.
        prevent_cse: Taken for JAX's sake: MLX merges no computation with its repetition that
            waits for the outputs.
        concrete: Taken for JAX's sake.
        static_argnames: Taken for JAX's sake: nothing here has to be static.
        policy: What to keep: `checkpoint_policies.nothing_saveable`, the default, or
            `checkpoint_policies.everything_saveable`, with which `fun` is returned as it is.
        static_argnums: Arguments that go along as they are, without a derivative.

    Returns:
        A function with the same values and derivatives. Under `vmap` the recomputation is mapped.
        What it draws from `mx.random` without a key, it draws again the same; integer arguments
        have no derivative, and arrays that it captured have theirs. Where it cannot run again (it
        changes what it captured, or uses arrays of an object that is no `nn.Module`) it runs as it
        is written, with a `PerformanceWarning`.

    Raises:
        NotImplementedError: another policy.
        TypeError: a derivative with respect to an array that `fun` uses and that is neither an
            argument nor captured in a variable, a container or a module.

    Example:
        >>> import mlx.core as mx
        >>> from mlxshim import checkpoint, grad, remat, vmap
        >>> block = checkpoint(lambda x: mx.square(mx.square(x)))
        >>> vmap(grad(block))(mx.array([1.0, 2.0]))
        array([4, 32], dtype=float32)
        >>> remat is checkpoint
        True

    Source: Chen et al., Training deep nets with sublinear memory cost (2016); `jax.checkpoint`;
    mlx/transforms.cpp, `checkpoint`.
    """
    if not callable(fun):
        raise ArgumentError(f"[checkpoint] fun must be a function, found {fun!r}.")
    if policy not in (None, *_POLICIES):
        raise NotImplementedError(
            "[checkpoint] policy must be checkpoint_policies.nothing_saveable or "
            "everything_saveable, for nothing here sees single operations. Checkpoint the parts "
            "of the function whose intermediates are not to be kept."
        )
    static = numbers("checkpoint", fun, static_argnums)
    keeps = policy is checkpoint_policies.everything_saveable
    return fun if keeps else _Checkpointed(fun, static)


remat = checkpoint


class checkpoint_policies:
    """What `checkpoint` keeps of a function, by JAX's names: everything, or its arguments alone.

    Example:
        >>> import mlx.core as mx
        >>> from mlxshim import checkpoint, checkpoint_policies, grad
        >>> keeping = checkpoint(mx.square, policy=checkpoint_policies.everything_saveable)
        >>> grad(keeping)(mx.array(3.0))
        array(6, dtype=float32)

    Source: `jax.checkpoint_policies`.
    """

    @staticmethod
    def everything_saveable(*_: Any, **__: Any) -> bool:
        """Nothing is computed anew, as without a checkpoint."""
        return True

    @staticmethod
    def nothing_saveable(*_: Any, **__: Any) -> bool:
        """The arguments are kept, and the rest is computed anew: the default."""
        return False


_POLICIES = (checkpoint_policies.everything_saveable, checkpoint_policies.nothing_saveable)


class _Checkpointed:
    holds_functions = ("fun",)

    def __init__(self, fun: Callable[..., Any], static: tuple[int, ...]) -> None:
        functools.update_wrapper(self, fun, updated=())
        self.fun, self.static = standing_in(fun), static

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return self if instance is None else functools.partial(self, instance)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _Call(self.fun, args, kwargs, self.static).result()


class _Call:
    def __init__(self, fun: Any, args: Any, kwargs: Any, static: Sequence[int]) -> None:
        self.fun = fun
        places = {n % len(args) for n in static if -len(args) <= n < len(args)}
        self.static = {n: args[n] for n in places}
        rest = [None if n in places else x for n, x in enumerate(args)]
        self.arrays, self.slots = _flat.flatten([rest, kwargs], numbers=False)
        self.levels = Levels()
        self.output: Any = None
        self.closure: Closure | None = None
        self.flat = replay.same_draws(self._flat)

    def result(self) -> Any:
        try:
            if not captures_nothing(self.fun) or self.static:
                self.closure = Closure([self.fun, self.static], logs=True)
                if self.closure.loses:
                    return self._as_written(
                        "it uses an array of an object, or in another transform"
                    )
            consts = self.closure.arrays if self.closure is not None else []
            primals = [*consts, *self.arrays]
            outputs = self.flat(*(mx.stop_gradient(x) for x in primals))
        except NoBatchingRule:
            return self._as_written("it changes what it has captured")
        outputs = custom.refusing(
            outputs, lambda: captured_derivative("checkpoint", name_of(self.fun))
        )
        rules = custom.Custom(self._pull, self._push)
        hides = self.closure is not None and self.closure.hides
        watched = self.levels.watched(hides, self._flat, primals)
        return _flat.unflatten(self.output, rules.bind(primals, outputs, watched))

    def _as_written(self, reason: str) -> Any:
        """The function without rules: the numbers are right, and everything is kept."""
        if self.levels.differentiated:
            warnings.warn(
                f"[checkpoint] Nothing of {name_of(self.fun)} is computed anew, for {reason}: pass "
                "it as an argument.",
                PerformanceWarning,
                stacklevel=4,
            )
        args, kwargs = self._arguments(self.arrays, self.static)
        return self.fun(*args, **kwargs)

    def _arguments(self, arrays: Arrays, static: dict[int, Any]) -> tuple[list[Any], Any]:
        args, kwargs = _flat.unflatten(self.slots, arrays)
        return [static.get(n, x) for n, x in enumerate(args)], kwargs

    def _flat(self, *primals: mx.array) -> list[mx.array]:
        count = len(self.closure.arrays) if self.closure is not None else 0

        def use(fun: Any, static: dict[int, Any]) -> list[mx.array]:
            args, kwargs = self._arguments(primals[count:], static)
            outputs, self.output = _flat.flatten(fun(*args, **kwargs), numbers=False)
            return outputs

        if self.closure is None or not count:
            return use(self.fun, self.static)
        return self.closure.call(primals[:count], use)

    def _pull(self, primals: Arrays, cotangents: Arrays, outputs: Arrays) -> list[mx.array]:
        waiting = custom.wait(primals, [*cotangents, *outputs])
        return custom.pulled(self.flat, waiting, cotangents)

    def _push(self, primals: Arrays, tangents: custom.Tangents) -> list[mx.array]:
        return custom.pushed(self.flat, primals, tangents)
