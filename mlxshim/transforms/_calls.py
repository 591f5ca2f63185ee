"""A function with rules of its own, and a call of it: arguments, and what functions captured."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Sequence
from types import FunctionType
from typing import Any, Generic, TypeVar

import mlx.core as mx
from typing_extensions import ParamSpec

from ..core import custom, levels, replay, trees
from ..core.closures import Closure
from ..core.errors import ArgumentError, NoBatchingRule
from ..core.levels import standing_in
from ..core.primitive import Arrays
from ._flat import Slot, is_numpy, unflatten
from ._structure import is_module

P = ParamSpec("P")
R = TypeVar("R")


class Signature:
    """How a function with rules of its own takes its arguments: all by position."""

    def __init__(self, kind: str, fun: Callable[..., Any]) -> None:
        self.kind, self.fun = kind, fun
        self.signature: inspect.Signature | None = None
        #: How many arguments there are, where nothing else but that has to be known.
        self.count = -1
        try:
            self.signature = inspect.signature(fun)
        except (TypeError, ValueError):
            return
        parameters = self.signature.parameters.values()
        if all(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters):
            self.count = len(parameters)

    def positional(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """The arguments by position, with defaults, as `jax.custom_vjp` resolves them."""
        if not kwargs and len(args) == self.count:
            return args
        kind, name = self.kind, name_of(self.fun)
        if self.signature is None:
            if kwargs:
                raise ArgumentError(
                    f"[{kind}] {name} has no signature: pass its arguments by position."
                )
            return args
        try:
            bound = self.signature.bind(*args, **kwargs)
        except TypeError as e:
            raise ArgumentError(f"[{kind}] The arguments do not fit {name}: {e}.") from None
        bound.apply_defaults()
        if bound.kwargs:
            raise ArgumentError(
                f"[{kind}] {name} has arguments that go by keyword only, {list(bound.kwargs)}: a "
                "function with rules of its own has them all by position."
            )
        return bound.args


def numbers(
    kind: str, fun: Callable[..., Any], argnums: Any, argnames: Any = ()
) -> tuple[int, ...]:
    """nondiff_argnums and nondiff_argnames as numbers."""
    several = (argnums,) if isinstance(argnums, int) else tuple(argnums)
    if not all(type(n) is int for n in several):
        raise ArgumentError(f"[{kind}] nondiff_argnums must be ints, found {argnums!r}.")
    names = (argnames,) if isinstance(argnames, str) else tuple(argnames)
    if names:
        known = list(inspect.signature(fun).parameters)
        for name in names:
            if name not in known:
                raise ArgumentError(
                    f"[{kind}] nondiff_argnames has {name!r}, but {name_of(fun)} has {known}."
                )
        several += tuple(known.index(name) for name in names)
    return several


def name_of(fun: Any) -> str:
    return getattr(fun, "__name__", None) or type(fun).__name__


class WithRules(Generic[P, R]):
    """A function with rules of its own: what its decorators, named as JAX's, have in common."""

    kind = ""

    def __init__(self, fun: Callable[P, R]) -> None:
        if not callable(fun):
            raise ArgumentError(f"[{self.kind}] fun must be a function, found {fun!r}.")
        functools.update_wrapper(self, fun, updated=())
        self.fun = standing_in(fun)
        self.signature = Signature(self.kind, fun)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        raise NotImplementedError

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return self if instance is None else functools.partial(self, instance)


class Arguments:
    """The positional arguments of a call: arrays, and what goes along as it is.

    Those with a number in `static` go along whole, and have no derivative.
    """

    def __init__(
        self, kind: str, fun: Callable[..., Any], args: tuple[Any, ...], static: Iterable[int]
    ) -> None:
        self.kind, self.fun = kind, fun
        several = list(static)
        for n in several:
            if not -len(args) <= n < len(args):
                raise ArgumentError(
                    f"[{kind}] nondiff_argnums has {n}, but {name_of(fun)} is called with "
                    f"{len(args)} arguments."
                )
        self.places = sorted({n % len(args) for n in several})
        self.static = [args[n] for n in self.places]
        self.dynamic = [n for n in range(len(args)) if n not in self.places]
        self.arrays: list[mx.array] = []
        #: The trees of the other arguments, with slots for arrays.
        self.slots = [self._walk(args[n], n, False) for n in self.dynamic]

    def _walk(self, node: Any, number: int, module: bool) -> Any:
        below = None if isinstance(node, mx.array) else trees.children(node)
        if below is not None:
            module = module or is_module(node)
            return trees.rebuild(node, [self._walk(x, number, module) for _, x in below])
        if is_numpy(node):
            node = mx.array(node)
        if isinstance(node, mx.array):
            self.arrays.append(node)
            return Slot(len(self.arrays) - 1)
        if node is not None and not module and not isinstance(node, (bool, int, float, complex)):
            raise ArgumentError(
                f"[{self.kind}] Argument {number} of {name_of(self.fun)} is or holds "
                f"{trees.describe(node)}, which is no array or number: name the argument in "
                "nondiff_argnums."
            )
        return node

    def differentiable(self, arrays: Arrays) -> list[Any]:
        """The arguments that are not static, around other arrays."""
        return [unflatten(slots, arrays) for slots in self.slots]

    def all(self, arrays: Arrays, static: Sequence[Any]) -> list[Any]:
        found = dict(zip(self.places, static))
        found.update(zip(self.dynamic, self.differentiable(arrays)))
        return [found[n] for n in range(len(found))]


class Captured:
    """Functions, and the arrays that they captured, which a rule must be given anew under vmap.

    `arrays` has those; `call(arrays, use)` is `use(*functions)` around others.
    """

    def __init__(self, functions: Sequence[Any]) -> None:
        self.functions = functions
        self.arrays: list[mx.array] = []
        self._closure: Closure | None = None
        if custom.innermost() is not None and not all(map(captures_nothing, functions)):
            self._closure = Closure(functions, logs=True)
            self.arrays = self._closure.arrays

    @property
    def hides(self) -> bool:
        """Whether the functions may use arrays that are not in `arrays`."""
        return self._closure is not None and self._closure.hides

    def call(self, arrays: Arrays, use: Callable[..., Any]) -> Any:
        if self._closure is None:
            return use(*self.functions)
        return self._closure.call(arrays, use)


def captures_nothing(fun: Any) -> bool:
    return type(fun) is FunctionType and not (
        fun.__closure__ or fun.__defaults__ or fun.__kwdefaults__
    )


class Levels:
    """What levels are active as a call begins."""

    def __init__(self) -> None:
        stack = levels.active()
        self.vmap = custom.innermost()
        self.differentiated = any(kind != "vmap" for kind in stack)
        #: Whether a derivative will be taken of what a vmap returns, by rules that it maps.
        self.outside = (
            self.vmap is not None
            and not levels.is_abstract()
            and custom.differentiated_from_outside()
        )

    def watched(self, hides: bool, everything: custom.Flat, arrays: Arrays) -> list[mx.array]:
        """What a rule's node has to watch, if its functions may use more than their arguments."""
        if self.vmap is None or not self.outside or not hides:
            return []
        return custom.hidden(self.vmap, everything, arrays)


class RuledCall:
    """One call of a function with a derivative of its own; `functions` are it and its rules."""

    def __init__(self, of: Any, args: tuple[Any, ...], functions: Sequence[Any]) -> None:
        self.of, self.name = of, name_of(of.fun)
        self.args = Arguments(of.kind, of.fun, args, of.nondiff_argnums)
        self.captured = Captured([*functions, *self.args.static])
        self.levels = Levels()
        self._run = replay.same_draws(lambda fun, args: fun(*args))

    def _primals(self) -> list[mx.array]:
        return [*self.captured.arrays, *self.args.arrays]

    def _constant(self) -> list[Any]:
        """The arguments for the run that no derivative sees."""
        stopped = [mx.stop_gradient(x) for x in self.args.arrays]
        return self.args.all(stopped, self.args.static)

    def _split(self, primals: Arrays) -> tuple[Arrays, Arrays]:
        """What was captured, and the arguments."""
        count = len(self.captured.arrays)
        return primals[:count], primals[count:]

    def _captured_derivative(self) -> Exception:
        return captured_derivative(self.of.kind, self.name)


def no_functions_in(tree: Any, what: str) -> None:
    """Refuse, so that vmap loops, what a rule would find in it: functions of a dead trace."""
    for _, leaf in trees.leaves(tree):
        if callable(leaf) and not isinstance(leaf, type):
            raise NoBatchingRule(f"{what} a function, whose arrays no batching rule can find")


def captured_derivative(kind: str, name: str) -> Exception:
    return ArgumentError(
        f"[{kind}] {name} is differentiated with respect to an array that it uses and that is no "
        "argument of it (captured, or in nondiff_argnums), of which its rule knows nothing: pass "
        "the array as an argument, or mx.stop_gradient(it)."
    )
