"""custom_vmap: a function with a batching rule of its own, after `jax.custom_batching`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import mlx.core as mx
from typing_extensions import ParamSpec

from ..core import custom, levels, trees
from ..core.errors import ArgumentError, NoBatchingRule
from ..core.interception import intercepted
from ..core.opaque import copies
from . import _flat
from ._calls import Arguments, Captured, WithRules, name_of
from ._loops import Deferred

P = ParamSpec("P")
R = TypeVar("R")
Rule = TypeVar("Rule", bound=Callable[..., Any])


class custom_vmap(WithRules[P, R]):  # a decorator, named as JAX's
    """A function that `vmap` maps by the rule that `def_vmap` gives.

    Args:
        fun: A function of arrays, or of trees of arrays and numbers, that returns a tree of arrays.
            What it means, and what runs where nothing is mapped.

    Returns:
        A function that is called like `fun`.

    Raises:
        AttributeError: it is called before `def_vmap`.
        ValueError: from `vmap`, for a rule that returns no pair, an output unlike `fun`'s, or
            another batch size.

    Under the outermost of several vmaps the rule's own operations are mapped. Derivatives, in both
    modes (JAX's are in forward mode only where the function is differentiated inside the vmap), are
    those of the rule where it has run, and of `fun` elsewhere.

    Example:
        >>> import mlx.core as mx
        >>> from mlxshim import custom_vmap, vmap
        >>> @custom_vmap
        ... def product(a, x):
        ...     return a @ x
        >>> @product.def_vmap
        ... def _(axis_size, in_batched, a, x):
        ...     if in_batched == [False, True]:      # one matrix: one matmul
        ...         return x @ a.T, True
        ...     a, x = (y if b else mx.broadcast_to(y, (axis_size, *y.shape))
        ...             for y, b in zip((a, x), in_batched))
        ...     return (a @ x[..., None])[..., 0], True
        >>> vmap(product, in_axes=(None, 0))(mx.eye(2), mx.array([[1.0, 2.0], [3.0, 4.0]]))
        array([[1, 2],
               [3, 4]], dtype=float32)
    """

    kind = "custom_vmap"
    holds_functions = ("fun", "rule")

    def __init__(self, fun: Callable[P, R]) -> None:
        super().__init__(fun)
        self.rule: Callable[..., Any] | None = None

    def def_vmap(self, vmap_rule: Rule) -> Rule:
        """Set the rule, and return it.

        Args:
            vmap_rule: `vmap_rule(axis_size, in_batched, *args)` returns (output, out_batched). The
                arguments that `in_batched`, a list with a tree of bools for each, says are batched
                have the mapped axis first; `out_batched`, a tree of bools like the output, says so
                of the outputs.
        """
        if not callable(vmap_rule):
            raise ArgumentError(f"[custom_vmap] vmap_rule must be a function, found {vmap_rule!r}.")
        self.rule = vmap_rule
        return vmap_rule

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        if self.rule is None:
            raise AttributeError(
                f"[custom_vmap] {name_of(self.fun)} has no batching rule: give it one with "
                "def_vmap."
            )
        given = self.signature.positional(args, kwargs)
        if custom.innermost() is None:
            return self.fun(*given)  # pyright: ignore[reportCallIssue]
        return self._mapped(given)

    @intercepted
    def _mapped(self, given: tuple[Any, ...]) -> Any:
        function = _Function(self, Arguments("custom_vmap", self.fun, given, ()))
        level = custom.innermost()
        arrays = function.primals
        watched: list[mx.array] = []
        if level is not None and function.captured.hides:
            watched = custom.hidden(level, function.call, arrays)
        found = function(*arrays, *watched)
        return _flat.unflatten(function.output, found)


class _Function(Deferred):
    def __init__(self, of: custom_vmap[..., Any], args: Arguments) -> None:
        self.of, self.args, self.name = of, args, "custom_vmap"
        self.captured = Captured([of.fun, of.rule])
        self.consts = len(self.captured.arrays)
        self.primals = [*self.captured.arrays, *args.arrays]
        self.output: Any = None

    def _parts(self, arrays: Sequence[mx.array]) -> Any:
        return arrays[: self.consts], arrays[self.consts : len(self.primals)]

    def call(self, *arrays: mx.array) -> list[mx.array]:
        consts, rest = self._parts(arrays)

        def use(fun: Any, rule: Any) -> list[mx.array]:
            outputs, self.output = _flat.flatten(fun(*self.args.differentiable(rest)))
            return outputs

        return self.captured.call(consts, use)

    def like(self, *arrays: mx.array) -> list[mx.array]:
        return custom.shaped(self.call, arrays)

    def spread(self, count: int) -> Sequence[bool]:
        return (False,) * count

    def batched(self, level: levels.VmapLevel, axes: tuple[int | None, ...]) -> Deferred:
        if any(axis is not None for axis in axes[: self.consts]):
            raise NoBatchingRule(
                f"[custom_vmap] {name_of(self.of.fun)} or its rule has captured a mapped array, of "
                "which in_batched says nothing: pass it as an argument"
            )

        def call(*arrays: mx.array) -> list[mx.array]:
            consts, rest = self._parts(arrays)
            return self.captured.call(
                consts, lambda fun, rule: self._by_rule(rule, level.size, axes[self.consts :], rest)
            )

        return _Ruled(call, self.like)

    def _by_rule(
        self, rule: Any, size: int, axes: Sequence[int | None], arrays: Sequence[mx.array]
    ) -> list[mx.array]:
        in_batched = [
            trees.map_leaves(
                lambda leaf: type(leaf) is _flat.Slot and axes[leaf.index] is not None, slots
            )
            for slots in self.args.slots
        ]
        result = rule(size, in_batched, *self.args.differentiable(arrays))
        who = f"[custom_vmap] The rule of {name_of(self.of.fun)}"
        if not isinstance(result, (tuple, list)) or len(result) != 2:
            raise ArgumentError(
                f"{who} must return a pair (output, out_batched), found {_flat.describe(result)}."
            )
        output, out_batched = result
        found: list[mx.array] = []

        def take(slot: Any, given: Any, batched: Any) -> None:
            below = trees.children(slot)
            if below is not None:
                inside, flags = trees.children(given), trees.children(batched)
                if isinstance(given, mx.array) or inside is None or len(inside) != len(below):
                    raise ArgumentError(
                        f"{who} must return an output with the tree of the function's, "
                        f"{_flat.describe(slot)}: found {_flat.describe(given)}."
                    )
                if flags is None or len(flags) != len(below):
                    raise ArgumentError(
                        f"{who} must return an out_batched with the tree of its output, "
                        f"{_flat.describe(given)}: found {_flat.describe(batched)}."
                    )
                children, bools = dict(inside), dict(flags)
                for key, child in below:
                    if key not in children or key not in bools:
                        raise ArgumentError(
                            f"{who} returned no {key!r} in its output or out_batched."
                        )
                    take(child, children[key], bools[key])
                return
            if type(slot) is not _flat.Slot:
                return
            if type(batched) is not bool:
                raise ArgumentError(
                    f"{who} must return an out_batched of bools, in the tree of its output: found "
                    f"{_flat.describe(batched)}."
                )
            x = mx.array(given) if _flat.is_number(given) else given
            if not isinstance(x, mx.array):
                raise ArgumentError(f"{who} must return arrays, found {_flat.describe(given)}.")
            if batched and (not x.ndim or x.shape[0] != size):
                raise ArgumentError(
                    f"{who} says that an output is batched, whose first axis must then have size "
                    f"{size}: found {_flat.describe(x)}."
                )
            found.append(x if batched else copies(x, size))

        take(self.output, output, out_batched)
        return found


class _Ruled(Deferred):
    """The function of a batch: what is written there is mapped and differentiated as it stands."""

    name = "custom_vmap"

    def __init__(self, call: Callable[..., list[mx.array]], like: Any) -> None:
        self._call, self._like = call, like

    def __call__(self, *arrays: mx.array) -> list[mx.array]:
        return self._call(*arrays)

    def call(self, *arrays: mx.array) -> list[mx.array]:
        return self._call(*arrays)

    def like(self, *arrays: mx.array) -> list[mx.array]:
        return custom.shaped(self._call, arrays)

    def batched(self, level: levels.VmapLevel, axes: tuple[int | None, ...]) -> Deferred:
        return _Ruled(lambda *xs: custom.mapped(level, self._call, axes, xs), None)
