"""vmap: a function of one sample, made a function of a batch."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Hashable
from typing import Any, Literal, TypeVar

import mlx.core as mx
from typing_extensions import ParamSpec

from ..core import levels, native
from ..core.errors import (
    ArgumentError,
    ConcretizationError,
    NoBatchingRule,
    PerformanceWarning,
    no_rule,
)
from ..core.interception import intercepted
from ..core.levels import VmapLevel, at_vmap, in_vmap, standing_in
from ..core.plans import Plans
from ..core.tangents import lacks_a_mapped_tangent, tying
from ..core.tracers import look_around
from . import _chunks
from ._mapping import Inputs, MappedOutputError, Outputs, check_spec
from ._plain import plain_axes, reach
from ._structure import describe

P = ParamSpec("P")
R = TypeVar("R")
Randomness = Literal["different", "same", "error"]
Fallback = Literal["loop", "error"]


def vmap(
    fun: Callable[P, R],
    in_axes: Any = 0,
    out_axes: Any = 0,
    axis_name: Hashable = None,
    axis_size: int | None = None,
    *,
    randomness: Randomness = "different",
    chunk_size: int | None = None,
    fallback: Fallback = "loop",
) -> Callable[P, R]:
    """Map `fun` over an axis of its arguments: `vmap(f)(xs)` is `stack([f(x) for x in xs])`.

    Args:
        fun: A function of arrays, or of trees (lists, tuples, dicts, `nn.Module`s) with arrays in
            them, that returns an array or a tree of arrays (None where there is nothing). Leaves
            that are no arrays are handed through to every sample as they are.
        in_axes: Which axis of each positional argument is mapped: an int (negative ones count from
            the end), None for an argument that all samples share, or a tree of those that is a
            prefix of the arguments. For a function of one argument either the argument's own tree
            of axes or a tuple of one. Keyword arguments are mapped over axis 0.
        out_axes: Where the mapped axis goes in each output: an int, or a prefix of the output.
            None for an output that does not depend on the sample, which is returned once. With
            an axis_name, an output that collectives made the same for all is one of those; that it
            is the same is checked by its values.
        axis_name: A name by which collectives inside `fun` know the mapped axis.
        axis_size: The size of the mapped axis. Needed only where no argument is mapped.
        randomness: What `mx.random` functions without a key draw: something "different" for each
            sample, as in a loop; the "same" for all; or "error", to refuse.
        chunk_size: At most this many samples are in memory at a time; the others wait. `fun` is
            traced once for each chunk, while the one before is computed.
        fallback: What becomes of an operation that has no batching rule: a "loop" over the samples
            with a `PerformanceWarning`, or an "error".

    Returns:
        A function that takes each mapped argument with one more axis than `fun` does, of the same
        size for all, and returns each output with one more axis (a number, once for each sample).

    Raises:
        ArgumentError: an axis specification that does not fit, an axis out of range, mapped axes of
            different sizes, nothing mapped, an output that is no array or number. (It is a
            ValueError, as MLX's, and a TypeError, as JAX's.)
        NoBatchingRule: with `fallback="error"`, naming the operation; a value is read in a named
            axis.
        ConcretizationError: `fun` reads a value, and `mx.compile` is around.

    Example:
        >>> import mlx.core as mx
        >>> from mlxshim import vmap
        >>> xs = mx.array([[1.0, 2.0], [3.0, 4.0]])
        >>> vmap(lambda x, y: (x * y).sum(), in_axes=(0, None))(xs, mx.array([1.0, 10.0]))
        array([21, 43], dtype=float32)

    Semantics after `jax.vmap`; randomness and chunk_size after `torch.func.vmap`. The trace
    underneath is MLX's (mlx/transforms.cpp, `vmap_trace`).
    """
    if not callable(fun):
        raise ArgumentError(f"[vmap] fun must be callable, found {describe(fun)}.")
    check_spec(in_axes, "in_axes")
    check_spec(out_axes, "out_axes")
    _check_options(axis_name, axis_size, randomness, chunk_size, fallback)

    plans = Plans()
    named = axis_name is not None

    @functools.wraps(fun, updated=())
    @intercepted
    def mapped(*args: P.args, **kwargs: P.kwargs) -> R:
        loop = False
        if not kwargs and chunk_size is None and (found := plain_axes(args, in_axes)) is not None:
            size, path, axes = found
            if size > 0 and (axis_size is None or axis_size == size):
                # MLX takes these arguments as they are: the trace is ours to keep short.
                outputs = Outputs(out_axes, named)
                plan = plans.of((reach(args, path).shape, levels.sizes()))
                level, run = VmapLevel(axis_name, size, randomness, plan), standing_in(fun)
                look_around(level, reach(args, path))

                def traced(*xs: Any) -> Any:
                    first = reach(xs, path)
                    return outputs.take_plain(in_vmap(level, run, first, *xs), first)

                try:
                    return outputs.give(native.call_vmap(traced, axes, outputs.axes, args))
                except Exception as e:
                    if not lacks_a_mapped_tangent(e):
                        level = VmapLevel(axis_name, size, randomness)
                        _chunks.rule_out(
                            e, lambda: native.call_vmap(traced, axes, outputs.axes, args)
                        )
                        _loop_or_raise(e, outputs, fallback, axis_name)
                        loop = True
        inputs = Inputs(fun, args, kwargs, in_axes, axis_size)
        outputs = Outputs(out_axes, named)
        # Much of MLX divides by the extent of an axis: instead of none, one of zeros is traced.
        count = max(inputs.size, 1)
        chunk = chunk_size or count
        parts: list[list[mx.array]] = []
        with _chunks.OneAtATime():
            for start in range(0, count, chunk):
                size = min(chunk, count - start)
                arrays = inputs.arrays if size == inputs.size else inputs.part(start, start + size)
                if not inputs.size:
                    arrays = inputs.nothing()
                if not loop:
                    plan = plans.of((arrays[0].shape, len(arrays), levels.sizes()))
                    level = VmapLevel(axis_name, size, randomness, plan)
                    look_around(level, arrays[0])
                    outputs.taken = False
                    try:
                        parts.append(_batched(fun, inputs, arrays, outputs, level))
                    except Exception as e:
                        level = VmapLevel(axis_name, size, randomness)
                        trace = functools.partial(_batched, fun, inputs, arrays, outputs, level)
                        _chunks.rule_out(e, trace)
                        _loop_or_raise(e, outputs, fallback, axis_name)
                        loop = True
                if loop:
                    parts.append(_looped(fun, inputs, arrays, outputs, size))
                if size < inputs.size:
                    _chunks.compute(parts[-1])
        if not inputs.size:
            return outputs.give(outputs.none_of(parts[0]))
        return outputs.give(outputs.concatenate(parts) if len(parts) > 1 else parts[0])

    return mapped


def _batched(
    fun: Callable[..., Any],
    inputs: Inputs,
    arrays: list[mx.array],
    outputs: Outputs,
    level: VmapLevel,
) -> list[mx.array]:
    body = at_vmap(level, fun)

    def per_sample(*samples: mx.array) -> Any:
        args, kwargs = inputs.fill(samples)
        return outputs.take(body(samples[0], *args, **kwargs), samples[0])

    axes = tuple(inputs.axes) if len(inputs.axes) > 1 else inputs.axes[0]
    run: Any = native.vmap(per_sample, axes, outputs.axes)
    results = tying(level, lambda: run(*arrays))
    return [results] if isinstance(results, mx.array) else list(results)


# The loop --------------------------------------------------------------------------------------


def _looped(
    fun: Callable[..., Any],
    inputs: Inputs,
    arrays: list[mx.array],
    outputs: Outputs,
    size: int,
) -> list[mx.array]:
    """One call for each sample, and the results stacked: what vmap means."""
    _chunks.wait()  # the function reads values
    columns: list[list[mx.array]] = []
    for i in range(size):
        samples = tuple(x[(slice(None),) * a + (i,)] for x, a in zip(arrays, inputs.axes))
        args, kwargs = inputs.fill(samples)
        try:
            columns.append(outputs.take_sample(fun(*args, **kwargs)))
        except ValueError as e:
            if levels.vmaps() or not _reads(e):
                raise
            raise ConcretizationError(
                "[vmap] The function reads the value of an array that has none, for mx.compile or "
                "mx.vmap is around: take mx.where or mlxshim.cond, or compile what reads nothing."
            ) from e
    return outputs.stack(columns)


def _loop_or_raise(
    error: Exception, outputs: Outputs, fallback: Fallback, axis_name: Hashable
) -> None:
    """Warn that a loop follows, or raise: the caller's own error, or that there is no rule."""
    reason = _why_loop(error, outputs)
    if reason is not None and axis_name is not None and _reads(error):
        reason += ", which is a loop over the samples, and with an axis_name there can be none"
        raise NoBatchingRule(f"[vmap] {reason}") from error
    if reason is None or axis_name is not None:
        raise error
    if fallback == "error":
        raise NoBatchingRule(f"[vmap] {reason}") from error
    warnings.warn(
        f"[vmap] The function runs sample by sample, for {reason}",
        PerformanceWarning,
        stacklevel=4,  # above `mapped`, `scoped`: the caller
    )


def _why_loop(error: Exception, outputs: Outputs) -> str | None:
    """What a loop would mend, in words; None for an error that is the caller's."""
    if isinstance(error, (MappedOutputError, TypeError)):
        return None  # a TypeError is a call that no loop would accept either
    said = str(error)
    if isinstance(error, NoBatchingRule):
        return said
    if outputs.taken:  # the function is through: what failed is a batching rule
        return no_rule(said)
    if _reads(error):
        return "the function reads the value of an array that is mapped"
    return None


def _reads(error: Exception) -> bool:
    return "Attempting to eval an array during function transformations" in str(error)


def _check_options(
    axis_name: Hashable, axis_size: Any, randomness: Any, chunk_size: Any, fallback: Any
) -> None:
    for name, value in (("axis_size", axis_size), ("chunk_size", chunk_size)):
        if value is not None and (type(value) is not int or value < 1):
            raise ArgumentError(f"[vmap] {name} must be a positive int or None, found {value!r}.")
    if axis_name is not None and chunk_size is not None:
        raise ArgumentError(
            "[vmap] A named axis cannot be processed in chunks: a collective needs all samples at "
            "once. Give axis_name or chunk_size, not both."
        )
    if randomness not in ("different", "same", "error"):
        raise ArgumentError(
            f'[vmap] randomness must be "different", "same" or "error", found {randomness!r}.'
        )
    if fallback not in ("loop", "error"):
        raise ArgumentError(f'[vmap] fallback must be "loop" or "error", found {fallback!r}.')
