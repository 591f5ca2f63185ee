"""custom_vjp: a function with a reverse mode of its own, after `jax.custom_vjp`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import mlx.core as mx
from typing_extensions import ParamSpec

from ..core import custom, levels, trees
from ..core.errors import ArgumentError
from ..core.primitive import Arrays
from . import _flat
from ._calls import RuledCall, WithRules, name_of, no_functions_in, numbers
from ._products import check_complex, conjugate

P = ParamSpec("P")
R = TypeVar("R")


class custom_vjp(WithRules[P, R]):  # a decorator, named as JAX's
    """A function whose reverse mode is what `defvjp` says.

    Args:
        fun: A function of arrays, or of trees of arrays and numbers, that returns a tree of arrays.
        nondiff_argnums: The numbers of arguments that have no derivative, of any type: functions,
            strings, options. `bwd` gets them first.
        nondiff_argnames: The same by name.

    Returns:
        A function that is called like `fun`, under every transform here and `mx.compile`.

    Raises:
        AttributeError: it is called before `defvjp`.
        TypeError: forward mode (`jvp`, `jacfwd`, `linearize`), which it has none of; a rule that
            returns another tree than it has to; a derivative with respect to an array that is no
            argument, but captured.
        ValueError: a cotangent of another shape than its argument.

    A derivative of a derivative goes through `fwd` and `bwd` as they are written, so `hessian` and
    `hvp` are had where those can be differentiated. Under `vmap` the three functions are mapped.

    Example:
        >>> import mlx.core as mx
        >>> from mlxshim import custom_vjp, grad, vmap
        >>> @custom_vjp
        ... def log1pexp(x):
        ...     return mx.log(1 + mx.exp(x))
        >>> def fwd(x):
        ...     return log1pexp(x), x
        >>> def bwd(x, ct):
        ...     return (ct * mx.sigmoid(x),)
        >>> log1pexp.defvjp(fwd, bwd)
        >>> vmap(grad(log1pexp))(mx.array([0.0, 1000.0]))
        array([0.5, 1], dtype=float32)
    """

    kind = "custom_vjp"
    holds_functions = ("fun", "fwd", "bwd")

    def __init__(
        self,
        fun: Callable[P, R],
        nondiff_argnums: int | Sequence[int] = (),
        nondiff_argnames: str | Sequence[str] = (),
    ) -> None:
        super().__init__(fun)
        self.nondiff_argnums = numbers("custom_vjp", fun, nondiff_argnums, nondiff_argnames)
        self.fwd: Callable[..., tuple[R, Any]] | None = None
        self.bwd: Callable[..., Any] | None = None

    def defvjp(
        self,
        fwd: Callable[..., tuple[R, Any]],
        bwd: Callable[..., Any],
        symbolic_zeros: bool = False,
        optimize_remat: bool = False,
    ) -> None:
        """Set the rules.

        Args:
            fwd: Called like `fun` in its place where a derivative will follow; returns (what `fun`
                returns, residuals: any tree).
            bwd: `bwd(*nondiff_args, residuals, cotangent)`, the cotangent a tree like the output
                (zeros for integers), returns a tuple with a cotangent for each other argument, None
                for zeros.
            symbolic_zeros: Not built: NotImplementedError.
            optimize_remat: Taken for JAX's sake.
        """
        if symbolic_zeros:
            raise NotImplementedError(
                "[custom_vjp] symbolic_zeros=True is not built: bwd gets zeros for what has no "
                "cotangent, and may return None for zeros."
            )
        for name, rule in (("fwd", fwd), ("bwd", bwd)):
            if not callable(rule):
                raise ArgumentError(f"[custom_vjp] {name} must be a function, found {rule!r}.")
        self.fwd, self.bwd = fwd, bwd

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        if self.fwd is None or self.bwd is None:
            raise AttributeError(
                f"[custom_vjp] {name_of(self.fun)} has no rule: give it one with defvjp(fwd, bwd)."
            )
        return _Call(self, self.signature.positional(args, kwargs)).result()


class _Call(RuledCall):
    def __init__(self, of: custom_vjp[..., Any], args: tuple[Any, ...]) -> None:
        super().__init__(of, args, [of.fun, of.fwd, of.bwd])
        self.output: Any = None
        self.residuals: Any = None
        self.count = 0

    def result(self) -> Any:
        primals, args = self._primals(), self._constant()
        if self.levels.differentiated:
            with levels.one_derivative_less():
                outputs = self._forward(self.of.fwd, args)
        else:
            outputs = self._taken(self._run(self.of.fun, args))
        if self.levels.outside:
            no_functions_in(self.residuals, "[custom_vjp] the residuals of fwd hold")
        outputs = custom.refusing(outputs, self._captured_derivative)
        rules = custom.Custom(self._pull, self._push, self._again)
        watched = self.levels.watched(self.captured.hides, self._everything, primals)
        found = rules.bind(primals, outputs, watched)
        return _flat.unflatten(self.output, found)

    # Outputs and residuals as flat arrays.

    def _taken(self, output: Any) -> list[mx.array]:
        arrays, slots = _flat.flatten(output)
        self.output, self.count = slots, len(arrays)
        return arrays

    def _forward(self, fwd: Any, args: list[Any]) -> list[mx.array]:
        result = self._run(fwd, args)
        if not isinstance(result, (tuple, list)) or len(result) != 2:
            raise ArgumentError(
                f"[custom_vjp] The fwd of {self.name} must return a pair (output, residuals), "
                f"found {_flat.describe(result)}."
            )
        arrays = self._taken(result[0])
        residuals, self.residuals = _flat.flatten(result[1], numbers=False)
        return [*arrays, *residuals]

    # The rules.

    def _pull(self, primals: Arrays, cotangents: Arrays, outputs: Arrays) -> list[mx.array]:
        consts, arrays = self._split(primals)

        def use(fun: Any, fwd: Any, bwd: Any, *static: Any) -> list[mx.array]:
            found = outputs
            if not self.levels.differentiated:
                # Somebody else's transform: fun has run, fwd has not.
                forward = levels.at_level("grad", self._forward)
                found = forward(fwd, self.args.all(arrays, static))
            residuals = _flat.unflatten(self.residuals, found[self.count :])
            seeds = [conjugate(c) for c in cotangents[: self.count]]
            cotangent = _flat.unflatten(self.output, seeds)
            return self._cotangents(bwd(*static, residuals, cotangent), arrays)

        check_complex((*arrays, *cotangents), "custom_vjp")
        return [*map(mx.zeros_like, consts), *self.captured.call(consts, use)]

    def _push(self, primals: Arrays, tangents: custom.Tangents) -> list[mx.array]:
        raise TypeError(
            f"[custom_vjp] {self.name} has a reverse mode and no forward mode (jvp, jacfwd, "
            "linearize): use vjp, grad or jacrev, or define it with custom_jvp, which has both."
        )

    def _again(self, *primals: mx.array) -> list[mx.array]:
        consts, arrays = self._split(primals)

        def use(fun: Any, fwd: Any, bwd: Any, *static: Any) -> list[mx.array]:
            found = self._forward(fwd, self.args.all(arrays, static))
            return found if self.levels.differentiated else found[: self.count]

        return self.captured.call(consts, use)

    def _everything(self, *primals: mx.array) -> list[mx.array]:
        outputs = self._again(*primals)
        return [*outputs, *self._pull(primals, [mx.zeros_like(x) for x in outputs], outputs)]

    def _cotangents(self, found: Any, arrays: Arrays) -> list[mx.array]:
        """One cotangent for each array of the arguments, from what bwd returned."""
        slots = self.args.slots
        if not isinstance(found, (tuple, list)) or len(found) != len(slots):
            without = " that is not in nondiff_argnums" if self.args.static else ""
            raise ArgumentError(
                f"[custom_vjp] The bwd of {self.name} must return a tuple with a cotangent for "
                f"each of its {len(slots)} arguments{without}, found {_flat.describe(found)}."
            )
        cotangents = [mx.zeros_like(x) for x in arrays]

        def take(slot: Any, given: Any, path: trees.Path) -> None:
            below = trees.children(slot)
            if given is None or (below is None and type(slot) is not _flat.Slot):
                return
            if below is not None:
                inside = None if isinstance(given, mx.array) else trees.children(given)
                by_key = dict(inside or ())
                if inside is None or set(by_key) != {key for key, _ in below}:
                    raise ArgumentError(
                        f"[custom_vjp] The bwd of {self.name} must return a cotangent with the "
                        f"tree of its argument: {self._where(path)} is {_flat.describe(given)}, "
                        f"the argument {_flat.describe(slot)}."
                    )
                for key, child in below:
                    take(child, by_key[key], (*path, key))
                return
            x = arrays[slot.index]
            if not custom.is_inexact(x):
                return
            y = mx.array(given, x.dtype) if _flat.is_number(given) else given
            if not isinstance(y, mx.array) or y.shape != x.shape:
                raise ArgumentError(
                    f"[custom_vjp] The bwd of {self.name} must return cotangents of the shapes of "
                    f"the arguments: {self._where(path)} is {_flat.describe(given)}, the argument "
                    f"{_flat.describe(x)}."
                )
            cotangents[slot.index] = conjugate(y.astype(x.dtype))

        for n, (slot, given) in enumerate(zip(slots, found)):
            take(slot, given, (n,))
        return cotangents

    def _where(self, path: trees.Path) -> str:
        first, *keys = path
        return f"number {first}{trees.written(tuple(keys))}"
