"""Control flow that depends on values: cond, switch, while_loop, fori_loop, after `jax.lax`.

Where the value can be read this is Python's own control flow, and only what is taken runs. Where
it cannot, for it is mapped, `cond` and `switch` compute every branch and select, and a loop runs
until every sample is done while the finished ones stand still. Either way the result and its
derivatives are those of a loop over the samples: what a sample does not use, be it NaN, does not
reach its gradient, and a loop in a branch that it does not take does not run for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import mlx.core as mx

from ..core import levels, trees
from ..core.closures import Closure
from ..core.interception import intercepted
from . import _flat, _loops
from ._select import gate, select
from .shapes import first_carry

T = TypeVar("T")
_ABSENT: Any = object()  # None is an operand


# Branches --------------------------------------------------------------------------------------


def cond(
    pred: Any,
    true_fun: Callable[..., T],
    false_fun: Callable[..., T],
    *operands: Any,
    operand: Any = _ABSENT,
) -> T:
    """`true_fun(*operands)` if `pred`, else `false_fun(*operands)`.

    Args:
        pred: A scalar: a bool, a number or an array with one entry and no axes.
        true_fun: A function of the operands.
        false_fun: Likewise. Where `pred` is mapped both must return the same tree of arrays of
            the same shapes and dtypes.
        operands: Arrays or trees of arrays. The functions may use arrays from around them too.
        operand: The one operand, by keyword.

    Returns:
        What the chosen function returned, numbers made arrays. Under a mapped `pred` (and in
        `mx.compile`, where nothing has a value) both functions are called, and the result is
        selected; what a sample does not take has no part in its gradient, NaN included.

    Raises:
        TypeError: `pred` is no scalar, a branch is no function, or the branches' outputs differ.

    Example:
        >>> import mlx.core as mx
        >>> from mlxshim import cond, vmap
        >>> vmap(lambda x: cond(x > 0, mx.sqrt, mx.abs, x))(mx.array([4.0, -3.0]))
        array([2, 3], dtype=float32)

    Semantics after `jax.lax.cond`.
    """
    operands = _operands("cond", operands, operand)
    named = {"true_fun": true_fun, "false_fun": false_fun}
    named = {
        name: _flat.callable_of(fun, "cond", name, "the operands") for name, fun in named.items()
    }
    value = _scalar(pred, "cond", "pred")
    if value is not None:
        return _flat.as_arrays(named["true_fun" if value else "false_fun"](*_flat.apart(operands)))
    pred = pred if pred.dtype == mx.bool_ else pred != 0
    return _select("cond", [pred, mx.logical_not(pred)], named, operands)


def switch(
    index: Any, branches: Sequence[Callable[..., T]], *operands: Any, operand: Any = _ABSENT
) -> T:
    """`branches[index](*operands)`; an index that is out of range is clamped into it.

    Args:
        index: An integer scalar.
        branches: Functions of the operands.
        *operands: Trees of arrays, or of anything.
        operand: The one operand, by keyword.

    Returns:
        What the chosen branch returned, numbers made arrays. Under a mapped index all branches are
        called, and the result is selected, as by `cond`.

    Raises:
        TypeError: the index is no integer scalar, a branch is no function, the branches' outputs
            differ, or operands are given in both ways.
        ValueError: no branches.

    Example:
        >>> import mlx.core as mx
        >>> from mlxshim import switch, vmap
        >>> branches = [lambda x: x, lambda x: -x, lambda x: x * x]
        >>> vmap(lambda i, x: switch(i, branches, x))(mx.array([0, 1, 7]), mx.array([3, 3, 3]))
        array([3, -3, 9], dtype=int32)

    Semantics after `jax.lax.switch`.
    """
    operands = _operands("switch", operands, operand)
    if not branches:
        raise ValueError("[switch] branches is empty: give at least one function.")
    named = {f"branches[{n}]": fun for n, fun in enumerate(branches)}
    named = {
        name: _flat.callable_of(fun, "switch", name, "the operands") for name, fun in named.items()
    }
    value = _scalar(index, "switch", "index", integer=True)
    last = len(named) - 1
    if value is not None:
        fun = list(named.values())[min(max(int(value), 0), last)]
        return _flat.as_arrays(fun(*_flat.apart(operands)))
    index = mx.clip(index, 0, last)
    return _select("switch", [index == n for n in range(last + 1)], named, operands)


def _operands(function: str, operands: tuple[Any, ...], operand: Any) -> tuple[Any, ...]:
    if operand is _ABSENT:
        return operands
    if operands:
        raise TypeError(
            f"[{function}] Give operands by position or `operand` by keyword, not both."
        )
    return (operand,)


def _scalar(x: Any, function: str, argument: str, integer: bool = False) -> Any:
    """The value of a scalar; None if it cannot be read."""
    if not isinstance(x, mx.array) and hasattr(x, "dtype"):
        x = mx.array(x)  # numpy's
    kind = "an integer" if integer else "a bool or a number"
    if isinstance(x, mx.array):
        if x.ndim:
            raise TypeError(
                f"[{function}] {argument} must be a scalar, found {_flat.describe(x)}. For one "
                f"choice for each entry use mx.where, or vmap over it."
            )
        if integer and not mx.issubdtype(x.dtype, mx.integer):
            raise TypeError(f"[{function}] {argument} must be {kind}, found {_flat.describe(x)}.")
        return _loops.read(x)
    if not isinstance(x, int if integer else (bool, int, float, complex)):
        raise TypeError(
            f"[{function}] {argument} must be {kind} scalar, found {_flat.describe(x)}."
        )
    return x


@intercepted
def _select(
    function: str,
    masks: Sequence[mx.array],
    branches: dict[str, Callable[..., Any]],
    operands: tuple[Any, ...],
) -> Any:
    """Every branch, and of their outputs those of the one whose mask is true."""
    around = _loops.mask()
    result: list[mx.array] = []
    first: Any = None
    slots: Any = None
    for mask, (name, fun) in zip(masks, branches.items()):
        taken = mask if around is None else mx.logical_and(mask, around)
        closure = Closure([fun])
        gated = [gate(taken, x) for x in closure.arrays]
        arguments = trees.map_leaves(
            lambda x, taken=taken: gate(taken, x) if isinstance(x, mx.array) else x,
            operands,
        )
        with _loops.masked(taken):
            output = closure.call(gated, lambda fun, on=arguments: fun(*on))
        if first is None:
            first = output = _flat.as_arrays(output)
            result, slots = _flat.flatten(output)
            continue
        known = first
        output = _flat.like(
            output,
            known,
            lambda difference, name=name: TypeError(
                f"[{function}] {name} and {next(iter(branches))} must return the same tree of "
                f"arrays, where the branches are selected by a mapped value; of what {name} "
                f"returned, {difference}: cast or reshape it."
            ),
        )
        arrays, _ = _flat.flatten(output)
        result = [select(mask, new, old) for new, old in zip(arrays, result)]
    return _flat.unflatten(slots, result)


# Loops -----------------------------------------------------------------------------------------


def while_loop(cond_fun: Callable[[T], Any], body_fun: Callable[[T], T], init_val: T) -> T:
    """`while cond_fun(val): val = body_fun(val)`, from `init_val`; the last `val`.

    Args:
        cond_fun: A function of the value that returns a bool scalar.
        body_fun: A function of the value that returns one of the same tree, shapes and dtypes.
        init_val: An array or a tree of arrays; numbers become arrays.

    Returns:
        The value for which `cond_fun` is false first. Where the predicate is mapped the loop runs
        until every sample is done, and leaves those alone that are.

    Raises:
        TypeError: the value changes its form, or the predicate is no scalar.
        ConcretizationError: in `mx.compile`, where no predicate has a value.

    Both functions may use arrays from around them, mapped ones too. Differentiable in both modes
    (JAX's is in forward mode only): reverse mode keeps what every round needs.

    Example:
        >>> import mlx.core as mx
        >>> from mlxshim import vmap, while_loop
        >>> grown = vmap(lambda x: while_loop(lambda x: x < 100, lambda x: x * 3, x))
        >>> grown(mx.array([1, 50, 200]))
        array([243, 150, 200], dtype=int32)

    Semantics after `jax.lax.while_loop`.
    """
    cond_fun = _flat.callable_of(cond_fun, "while_loop", "cond_fun", "the value")
    body_fun = _flat.callable_of(body_fun, "while_loop", "body_fun", "the value")
    return _while("while_loop", cond_fun, body_fun, init_val)


def _while(function: str, cond_fun: Any, body_fun: Any, init_val: Any) -> Any:
    val = first_carry(init_val, body_fun)
    around = _loops.mask()
    if not levels.is_abstract():
        while True:
            go = _predicate(function, cond_fun(val), around)
            value = _loops.read(go)
            if value is None:
                break
            if not value:
                return val
            val = _next(function, body_fun(val), val)
            _loops.settle(go, *_flat.flatten(val)[0])
        if _loops.innermost() is None:
            raise _loops.no_value(function, "the predicate")
    return _deferred(function, cond_fun, body_fun, val)


def _predicate(function: str, go: Any, around: mx.array | None) -> mx.array:
    if not isinstance(go, mx.array) and _flat.is_number(go):
        go = mx.array(go)
    if not isinstance(go, mx.array) or go.ndim or go.dtype != mx.bool_:
        raise TypeError(
            f"[{function}] cond_fun must return a bool scalar, found {_flat.describe(go)}: compare "
            "it with something, and reduce it with mx.any or mx.all."
        )
    return go if around is None else mx.logical_and(go, around)


def _next(function: str, new: Any, old: Any) -> Any:
    return _flat.like(
        new,
        old,
        lambda difference: TypeError(
            f"[{function}] body_fun must return a value of the same tree, shapes and dtypes as it "
            f"is given; of what it returned, {difference}: cast or reshape it, or start from an "
            "init_val of that form."
        ),
    )


@intercepted
def _deferred(function: str, cond_fun: Any, body_fun: Any, val: Any) -> Any:
    """The rest of a loop whose predicate cannot be read, as a node."""
    carry, slots = _flat.flatten(val)
    around = _loops.mask()
    closure = Closure([cond_fun, body_fun])
    consts = [*closure.arrays, *([] if around is None else [around])]
    count, inner = len(consts), len(closure.arrays)

    def step(go: mx.array, *arrays: mx.array) -> list[mx.array]:
        old = _flat.unflatten(slots, arrays[count:])
        mask = arrays[inner] if count > inner else None

        def once(test: Any, body: Any) -> list[mx.array]:
            new = _next(function, body(old), old)
            return [_predicate(function, test(new), mask), *_flat.flatten(new)[0]]

        return closure.call(arrays[:inner], once)

    def frozen(go: mx.array, *arrays: mx.array) -> list[mx.array]:
        with _loops.masked(go):
            new_go, *new = step(go, *(gate(go, x) for x in arrays))
        kept = [select(go, x, y) for x, y in zip(new, arrays[count:])]
        return [mx.logical_and(go, new_go), *kept]

    go = _predicate(function, cond_fun(val), around)
    loop = _loops.Loop(function, count, step, frozen)
    return _flat.unflatten(slots, loop(go, *consts, *carry))


def fori_loop(
    lower: Any,
    upper: Any,
    body_fun: Callable[[mx.array, T], T],
    init_val: T,
    *,
    unroll: int | bool | None = None,
) -> T:
    """`for i in range(lower, upper): val = body_fun(i, val)`, from `init_val`; the last `val`.

    Args:
        lower: An integer scalar.
        upper: Likewise; a mapped one gives each sample its own number of rounds.
        body_fun: A function of the index and the value. The index is an int32 scalar; an int64
            one where both bounds are mapped and int64, uint32 or uint64.
        init_val: An array or a tree of arrays, whose form `body_fun` keeps.
        unroll: Taken for JAX's sake.

    Raises:
        TypeError: a bound is no integer scalar, or the value changes its form.

    Differentiable in both modes, whatever the bounds.

    Example:
        >>> import mlx.core as mx
        >>> from mlxshim import fori_loop, vmap
        >>> vmap(lambda n: fori_loop(0, n, lambda i, val: val + i, mx.array(0)))(mx.array([3, 5]))
        array([3, 10], dtype=int32)

    Semantics after `jax.lax.fori_loop`.
    """
    body_fun = _flat.callable_of(body_fun, "fori_loop", "body_fun", "the index and the value")
    start = _scalar(lower, "fori_loop", "lower", integer=True)
    stop = _scalar(upper, "fori_loop", "upper", integer=True)
    if start is not None and stop is not None:
        val = first_carry(init_val, lambda val: body_fun(mx.array(start), val))
        for i in range(start, stop):
            val = _next("fori_loop", body_fun(mx.array(i), val), val)
        return val
    lower, upper = (x if isinstance(x, mx.array) else mx.array(x) for x in (lower, upper))
    # The index must not wrap where that of a loop, whose bounds have values, does not.
    if lower.dtype != upper.dtype or lower.dtype.size < 4:
        lower, upper = lower.astype(mx.int32), upper.astype(mx.int32)
    elif mx.issubdtype(lower.dtype, mx.unsignedinteger):
        lower, upper = lower.astype(mx.int64), upper.astype(mx.int64)

    def going(state: Any) -> mx.array:
        return state[0] < state[1]

    return _while("fori_loop", going, _Round(body_fun), (lower, upper, init_val))[2]


class _Round:
    """A round of a fori_loop, of (index, end, value); what `body_fun` captured is found in it."""

    holds_functions = ("body_fun",)

    def __init__(self, body_fun: Callable[[mx.array, Any], Any]) -> None:
        self.body_fun = body_fun

    def __call__(self, state: Any) -> Any:
        i, end, val = state
        return i + mx.array(1, i.dtype), end, self.body_fun(i, val)
