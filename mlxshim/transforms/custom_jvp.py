"""custom_jvp: a function with a derivative of its own in both modes, after `jax.custom_jvp`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import mlx.core as mx
from typing_extensions import ParamSpec

from ..core import custom, trees
from ..core.errors import ArgumentError
from ..core.primitive import Arrays, full
from . import _flat
from ._calls import RuledCall, WithRules, name_of, numbers

P = ParamSpec("P")
R = TypeVar("R")
Rule = TypeVar("Rule", bound=Callable[..., Any])


class custom_jvp(WithRules[P, R]):  # a decorator, named as JAX's
    """A function whose derivative is what `defjvp` or `defjvps` says; reverse mode transposes it.

    Args:
        fun: A function of arrays, or of trees of arrays and numbers, that returns a tree of arrays.
        nondiff_argnums: The numbers of arguments that have no derivative, of any type: functions,
            strings, options. The rule gets them first.
        nondiff_argnames: The same by name.

    Returns:
        A function that is called like `fun`, under every transform here and `mx.compile`.

    Raises:
        AttributeError: it is called before it has a rule.
        TypeError: a rule that returns no pair, or a tangent unlike the output; a derivative with
            respect to an array that is no argument, but captured.

    A derivative of a derivative goes through the rule as it is written.

    Example:
        >>> import mlx.core as mx
        >>> from mlxshim import custom_jvp, grad, jvp
        >>> @custom_jvp
        ... def f(x, y):
        ...     return mx.sin(x) * y
        >>> @f.defjvp
        ... def f_jvp(primals, tangents):
        ...     (x, y), (dx, dy) = primals, tangents
        ...     return f(x, y), 100 * dx + dy
        >>> jvp(f, (mx.array(0.0), mx.array(1.0)), (mx.array(1.0), mx.array(2.0)))
        (array(0, dtype=float32), array(102, dtype=float32))
        >>> grad(f)(mx.array(0.0), mx.array(1.0))
        array(100, dtype=float32)
    """

    kind = "custom_jvp"
    holds_functions = ("fun", "jvp")

    def __init__(
        self,
        fun: Callable[P, R],
        nondiff_argnums: int | Sequence[int] = (),
        nondiff_argnames: str | Sequence[str] = (),
    ) -> None:
        super().__init__(fun)
        self.nondiff_argnums = numbers("custom_jvp", fun, nondiff_argnums, nondiff_argnames)
        self.jvp: Callable[..., Any] | None = None

    def defjvp(self, jvp: Rule, symbolic_zeros: bool = False) -> Rule:
        """Set the rule, and return it.

        Args:
            jvp: `jvp(*nondiff_args, primals, tangents)` returns (output, its tangent), two trees
                alike. The tangents are trees like the primals, with zeros for integers; the
                tangent of the output is linear in them.
            symbolic_zeros: Not built: NotImplementedError.
        """
        if symbolic_zeros:
            raise NotImplementedError(
                "[custom_jvp] symbolic_zeros=True is not built: the rule gets arrays of zeros."
            )
        if not callable(jvp):
            raise ArgumentError(f"[custom_jvp] jvp must be a function, found {jvp!r}.")
        self.jvp = jvp
        return jvp

    def defjvps(self, *jvps: Callable[..., Any] | None) -> None:
        """Set a rule for each argument: `jvp(tangent, output, *primals)`, or None for zero.

        Raises:
            TypeError: there are nondiff_argnums, or another number of rules than of arguments.

        Example:
            >>> import mlx.core as mx
            >>> from mlxshim import custom_jvp, grad
            >>> f = custom_jvp(lambda x, y: x * y)
            >>> f.defjvps(lambda t, out, x, y: 10 * t * y, None)
            >>> grad(f, argnums=(0, 1))(mx.array(2.0), mx.array(3.0))
            (array(30, dtype=float32), array(0, dtype=float32))
        """
        if self.nondiff_argnums:
            raise TypeError("[custom_jvp] defjvps has no form for nondiff_argnums: use defjvp.")

        def jvp(primals: Any, tangents: Any) -> Any:
            if len(jvps) != len(primals):
                raise ArgumentError(
                    f"[custom_jvp] {name_of(self.fun)} has {len(primals)} arguments and "
                    f"{len(jvps)} rules: give defjvps one, or None, for each."
                )
            output: Any = self(*primals)  # pyright: ignore[reportCallIssue]
            total = trees.map_leaves(
                lambda y: mx.zeros_like(y) if isinstance(y, mx.array) else y, output
            )
            for rule, tangent in zip(jvps, tangents):
                if rule is not None:
                    total = _sum(total, rule(tangent, output, *primals))
            return output, total

        self.jvp = jvp

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        if self.jvp is None:
            raise AttributeError(
                f"[custom_jvp] {name_of(self.fun)} has no rule: give it one with defjvp."
            )
        return _Call(self, self.signature.positional(args, kwargs)).result()


def _sum(x: Any, y: Any) -> Any:
    arrays, slots = _flat.flatten(x)
    others, _ = _flat.flatten(y)
    return _flat.unflatten(slots, [a + b for a, b in zip(arrays, others)])


def _listed(forms: Iterable[tuple[Any, mx.Dtype]]) -> str:
    return ", ".join(_flat.describe(mx.zeros(shape, dtype)) for shape, dtype in forms) or "nothing"


class _Call(RuledCall):
    def __init__(self, of: custom_jvp[..., Any], args: tuple[Any, ...]) -> None:
        super().__init__(of, args, [of.fun, of.jvp])
        #: The shapes and dtypes of the outputs. (The arrays would lead to the node, and it here.)
        self.forms: list[tuple[Any, mx.Dtype]] = []

    def result(self) -> Any:
        primals = self._primals()
        output = self._run(self.of.fun, self._constant())
        arrays, slots = _flat.flatten(output)
        self.forms = [(y.shape, y.dtype) for y in arrays]
        outputs = custom.refusing(arrays, self._captured_derivative)
        rules = custom.Custom(self._pull, self._push, self._again)
        watched = self.levels.watched(self.captured.hides, self._everything, primals)
        return _flat.unflatten(slots, rules.bind(primals, outputs, watched))

    def _ruled(self, primals: Arrays, tangents: Arrays) -> tuple[list[mx.array], list[mx.array]]:
        """The output and its tangent, by the rule."""
        (consts, arrays), (_, along) = self._split(primals), self._split(tangents)

        def use(fun: Any, rule: Any, *static: Any) -> Any:
            given = tuple(self.args.differentiable(arrays))
            by_slot = tuple(
                trees.map_leaves(lambda leaf: self._tangent(leaf, along), slots)
                for slots in self.args.slots
            )
            return self._taken(self._run(rule, (*static, given, by_slot)))

        return self.captured.call(consts, use)

    def _tangent(self, leaf: Any, along: Arrays) -> Any:
        if type(leaf) is _flat.Slot:
            return along[leaf.index]
        return mx.zeros_like(mx.array(leaf)) if _flat.is_number(leaf) else None

    def _taken(self, result: Any) -> tuple[list[mx.array], list[mx.array]]:
        if not isinstance(result, (tuple, list)) or len(result) != 2:
            raise ArgumentError(
                f"[custom_jvp] The rule of {self.name} must return a pair (output, tangent), found "
                f"{_flat.describe(result)}."
            )
        output = _flat.as_arrays(result[0])
        tangent = _flat.like(
            result[1],
            output,
            lambda difference: ArgumentError(
                f"[custom_jvp] The rule of {self.name} must return a tangent with the tree, shapes "
                f"and dtypes of the output; of the tangent, {difference}."
            ),
        )
        return _flat.flatten(output)[0], _flat.flatten(tangent)[0]

    # The rules.

    def _push(self, primals: Arrays, along: custom.Tangents) -> list[mx.array]:
        tangents = self._ruled(primals, full(primals, along))[1]
        if [(t.shape, t.dtype) for t in tangents] != self.forms:
            raise ArgumentError(
                f"[custom_jvp] The rule of {self.name} must return an output like the function's: "
                f"{_listed(self.forms)}, found {_listed((t.shape, t.dtype) for t in tangents)}."
            )
        return tangents

    def _pull(self, primals: Arrays, cotangents: Arrays, outputs: Arrays) -> list[mx.array]:
        zeros = [mx.zeros_like(x) for x in primals]
        return custom.pulled(lambda *along: self._push(primals, along), zeros, cotangents)

    def _again(self, *primals: mx.array) -> list[mx.array]:
        return self._ruled(primals, [mx.zeros_like(x) for x in primals])[0]

    def _everything(self, *primals: mx.array) -> list[mx.array]:
        outputs, tangents = self._ruled(primals, [mx.zeros_like(x) for x in primals])
        return [*outputs, *tangents]
