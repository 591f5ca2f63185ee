"""Samples spread over processes: each has some, all get the result (`mx.distributed`).

Every rank calls the same function on samples of its own, as many as it has. Before anything is
exchanged the ranks tell each other whether that succeeded, so that an error on one is an error on
all, and nobody waits for a gradient that will not come.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from ..rules._dtypes import HALVES

Kind = Literal["samples", "sum", "own"]

#: Small arrays travel together, in messages of about this many entries.
MESSAGE = 8 * 2**20

#: What not every backend sends (NCCL has no such types), as what it travels.
_CARRIERS = {mx.bool_: mx.uint8, mx.int16: mx.int32, mx.uint16: mx.int32}


class RankFailed(RuntimeError):
    """Another rank's step ended with an error, and so does this one's.

    Example:
        >>> from mlxshim.nn import RankFailed
        >>> def train(step, batches):
        ...     done = 0
        ...     for batch in batches:
        ...         try:
        ...             done += step(batch)
        ...         except RankFailed:  # all ranks have left this step: they go on with the next
        ...             continue
        ...     return done
        >>> def step(batch):
        ...     if batch == 2:
        ...         raise RankFailed("rank 1 failed")
        ...     return 1
        >>> train(step, [1, 2, 3])
        2
    """


def across_ranks(
    fun: Callable[..., Any], outputs: Sequence[Kind], group: Any = None
) -> Callable[..., Any]:
    """`fun` on every rank's samples, with the results of all.

    Args:
        fun: Called on each rank with that rank's samples. Returns a tuple. It may be compiled;
            the result of `across_ranks` may not.
        outputs: What becomes of each entry of the tuple, a tree of arrays: "samples", which has a
            leading axis of samples, is concatenated in the order of ranks, which may have
            different numbers of samples; "sum" is added up, in float32 if it is in half
            precision; "own" stays each rank's. For `clipped_grad` they are
            ("samples", "sum", "samples"); for `per_sample_norms` ("samples", "samples"); for
            `per_sample_value_and_grad` too, or ("samples", "own") if the gradients may stay where
            they are.
        group: An `mx.distributed.Group`. Default: the one of `mx.distributed.init()`.

    Returns:
        A function with `fun`'s arguments that evaluates its results on every rank, exchanges them
        and returns the tuple, the same on all ranks but for what is "own".

    Raises:
        RankFailed: on each rank whose own call succeeded when that of another did not. The rank
            that failed raises its own error. All of them have left the step then, and can go on
            with the next one or stop.
        ValueError: `outputs` does not fit what `fun` returns, or it is called inside a transform.

    A rank that dies does not get to tell: MLX's ring then raises on the others, and other
    backends leave it to the launcher to end them.

    Example:
        >>> import mlx.core as mx
        >>> import mlx.nn as nn
        >>> from mlxshim.nn import across_ranks, clipped_grad
        >>> model = nn.Linear(2, 1, bias=False)
        >>> clip = clipped_grad(model, lambda model, x: model(x).sum(), 1.0)
        >>> step = across_ranks(clip, ("samples", "sum", "samples"))
        >>> losses, grads, norms = step(model, mx.array([[3.0, 4.0], [0.0, 1.0]]))
        >>> grads
        {'weight': array([[0.6, 1.8]], dtype=float32)}

    Launched with `mlx.launch -n 2 --python python3 train.py`, each process with its share of the
    samples.
    """
    kinds = tuple(outputs)
    wrong = [kind for kind in kinds if kind not in ("samples", "sum", "own")]
    if wrong:
        raise ValueError(
            f'[across_ranks] outputs must be of "samples", "sum" and "own", found {wrong[0]!r}.'
        )

    @functools.wraps(fun, updated=())
    def step(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
        ranks = mx.distributed.init() if group is None else group
        results, count, error = _attempt(fun, args, kwargs, kinds)
        failed, counts = _exchange(ranks, error is not None, count)
        if error is not None:
            raise error
        if failed:
            who = ", ".join(map(str, failed))
            raise RankFailed(
                f"[across_ranks] Rank {who} of {ranks.size()} failed: see what it reports."
            )
        if ranks.size() == 1:
            return tuple(results)
        done = tuple(_combine(r, kind, counts, ranks) for r, kind in zip(results, kinds))
        mx.eval(done)
        return done

    return step


def _attempt(
    fun: Callable[..., Any], args: Any, kwargs: Any, kinds: tuple[Kind, ...]
) -> tuple[tuple[Any, ...], int, BaseException | None]:
    """(results, number of samples, error), with everything that can fail behind it."""
    try:
        results = fun(*args, **kwargs)
        if not isinstance(results, (tuple, list)) or len(results) != len(kinds):
            found = f"{len(results)}" if isinstance(results, (tuple, list)) else type(results)
            raise ValueError(
                f"[across_ranks] outputs has {len(kinds)} entries, the function returned {found}."
            )
        with_samples = [result for result, kind in zip(results, kinds) if kind == "samples"]
        flat: Any = tree_flatten(with_samples)
        counts = {len(x) if x.ndim else -1 for _, x in flat}
        if -1 in counts or len(counts) > 1:
            raise ValueError(
                '[across_ranks] Outputs of kind "samples" must have one leading axis of samples.'
            )
        mx.eval(results)
        return tuple(results), counts.pop() if counts else 0, None
    except BaseException as error:
        return (), 0, error


def _exchange(ranks: Any, failed: bool, count: int) -> tuple[list[int], list[int]]:
    """(the ranks that failed, the number of samples of each)."""
    size, me = ranks.size(), ranks.rank()
    mine = [0] * (2 * size)
    mine[me], mine[size + me] = int(failed), count
    every: Any = mx.distributed.all_sum(mx.array(mine, mx.int32), group=ranks).tolist()
    return [rank for rank in range(size) if every[rank]], every[size:]


def _combine(tree: Any, kind: Kind, counts: list[int], ranks: Any) -> Any:
    if kind == "sum":
        return _sum(tree, ranks)
    if kind == "samples":
        return tree_map(lambda x: _concatenate(x, counts, ranks), tree)
    return tree


def _concatenate(x: mx.array, counts: list[int], ranks: Any) -> mx.array:
    """All ranks' arrays, each padded to the longest on its way."""
    longest = max(counts)
    if not longest:
        return x
    if x.dtype == mx.complex64:
        real, imaginary = (_concatenate(part, counts, ranks) for part in (mx.real(x), mx.imag(x)))
        return _complex(real, imaginary)
    if x.dtype in _CARRIERS:
        return _concatenate(x.astype(_CARRIERS[x.dtype]), counts, ranks).astype(x.dtype)
    if len(x) < longest:
        x = mx.concatenate([x, mx.zeros((longest - len(x), *x.shape[1:]), x.dtype)])
    every = mx.distributed.all_gather(mx.contiguous(x), group=ranks)
    if min(counts) == longest:
        return every
    return mx.concatenate(
        [every[i * longest : i * longest + count] for i, count in enumerate(counts)]
    )


def _sum(tree: Any, ranks: Any) -> Any:
    if isinstance(tree, mx.array):
        return _sum_of([tree], ranks)[0]
    flat: Any = tree_flatten(tree)
    if not flat:
        return tree
    sums = _sum_of([x for _, x in flat], ranks)
    return tree_unflatten([(name, x) for (name, _), x in zip(flat, sums)])


def _sum_of(arrays: list[mx.array], ranks: Any) -> list[mx.array]:
    halves = [(mx.real(x), mx.imag(x)) if x.dtype == mx.complex64 else (x,) for x in arrays]
    if any(len(parts) > 1 for parts in halves):
        found = iter(_sum_of([part for parts in halves for part in parts], ranks))
        several = [[next(found) for _ in parts] for parts in halves]
        return [_complex(*parts) if len(parts) > 1 else parts[0] for parts in several]
    sums: dict[int, mx.array] = {}
    for group in _messages(arrays):
        message = mx.concatenate([mx.reshape(_precise(arrays[i]), (-1,)) for i in group], axis=0)
        message = mx.distributed.all_sum(message, group=ranks)
        start = 0
        for i in group:
            x = arrays[i]
            part = message[start : start + x.size]
            sums[i] = mx.reshape(part, x.shape).astype(x.dtype)
            start += x.size
    return [sums[i] for i in range(len(arrays))]


def _complex(real: mx.array, imaginary: mx.array) -> mx.array:
    return mx.squeeze(mx.view(mx.stack([real, imaginary], axis=-1), mx.complex64), -1)


def _messages(arrays: list[mx.array]) -> list[list[int]]:
    """The numbers of arrays that travel together: of one dtype, and not too many entries."""
    groups: list[list[int]] = []
    filling: dict[mx.Dtype, tuple[list[int], int]] = {}
    for i, x in enumerate(arrays):
        dtype = _precise(x).dtype
        group, entries = filling.get(dtype, ([], MESSAGE))
        if entries + x.size > MESSAGE:
            group, entries = [], 0
            groups.append(group)
        group.append(i)
        filling[dtype] = group, entries + x.size
    return groups


def _precise(x: mx.array) -> mx.array:
    return x.astype(mx.float32 if x.dtype in HALVES else _CARRIERS.get(x.dtype, x.dtype))
