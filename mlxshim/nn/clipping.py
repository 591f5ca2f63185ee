"""Norms of every sample's gradient, and the sum of the gradients each clipped to one.

Neither needs the gradients of all samples: the parts that one backward pass writes down (inputs of
the layers and cotangents of their outputs) give first the norms, then the weighted sum. A layer's
gradients stand for its parts where those would take more memory. See `_parts.py` for how, and
whence.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..transforms import _chunks
from . import _parts, _state
from ._samples import Samples, Traces
from .gradients import Loss, arrays_of, concatenated, joined

#: What no layer is known for has its gradients held, of so many samples at a time that they take
#: no more than this many times the memory of the trainable parameters, or this many bytes.
HELD_TIMES, HELD_BYTES = 4, 64 * 2**20


def per_sample_norms(
    model: nn.Module,
    loss_fn: Loss,
    in_axes: Any = 0,
    *,
    per_layer: bool = False,
    chunk_size: int | None = None,
    keepdims: bool = False,
) -> Callable[..., tuple[Any, Any]]:
    """The loss of every sample and the norm of its gradient, without the gradients.

    Args:
        model: As in `per_sample_value_and_grad`, and so are `loss_fn`, `in_axes` and `keepdims`.
        loss_fn: The loss of one sample.
        in_axes: Where the samples are.
        per_layer: The norms of each parameter's gradient instead of the whole gradient's.
        chunk_size: At most this many samples at a time. By default all, or fewer if layers that
            are not known (all but linear, embedding and norm layers) would need much memory.
        keepdims: Each sample keeps its axis.

    Returns:
        A function with `loss_fn`'s arguments that returns (losses, norms), norms being float32 of
        shape (samples,), or with `per_layer` a tree of those like `model.trainable_parameters()`.

    Raises:
        ValueError: as `per_sample_value_and_grad`.

    Where nothing traces, the backward pass has begun when the call returns.

    Example:
        >>> import mlx.core as mx
        >>> import mlx.nn as nn
        >>> from mlxshim.nn import per_sample_norms
        >>> model = nn.Linear(2, 1, bias=False)
        >>> x = mx.array([[3.0, 4.0], [0.0, 1.0]])
        >>> per_sample_norms(model, lambda model, x: model(x).sum())(model, x)[1]
        array([5, 1], dtype=float32)

    Source: Goodfellow 2015, Li et al. 2022 (https://arxiv.org/abs/2110.05679).
    """

    traces = Traces()

    @functools.wraps(loss_fn, updated=())
    def measured(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
        samples = Samples(model, loss_fn, args, kwargs, in_axes, keepdims, traces)
        results, parts = [], []
        with _chunks.OneAtATime():
            for run in _runs(samples, chunk_size):
                run.start()
                norms = [mx.sqrt(s) for s in run.squared_norms(per_layer)]
                run.finish_starting()
                if run.size < samples.size:
                    _chunks.compute([*norms, *arrays_of(run.results)])
                results.append(run.results)
                parts.append(norms)
        norms = [concatenated(list(part)) for part in zip(*parts)]
        return joined(results), samples.places.tree_of(norms) if per_layer else norms[0]

    return measured


def clipped_grad(
    model: nn.Module,
    loss_fn: Loss,
    max_norm: Any,
    in_axes: Any = 0,
    *,
    per_layer: bool = False,
    chunk_size: int | None = None,
    keepdims: bool = False,
) -> Callable[..., tuple[Any, Any, Any]]:
    """The sum over samples of their gradients, each scaled down to a norm of at most `max_norm`.

    Args:
        model: As in `per_sample_value_and_grad`, and so are `loss_fn`, `in_axes` and `keepdims`.
        loss_fn: The loss of one sample.
        max_norm: The bound: a float or an array with one number. With `per_layer`, each
            parameter's bound is this over the root of the number of parameters, so that the
            whole gradient keeps to it; or a tree of bounds like `model.trainable_parameters()`.
        in_axes: Where the samples are.
        per_layer: Clip the gradient of each parameter by itself.
        chunk_size: At most this many samples at a time. By default all, or fewer if layers that
            are not known (all but linear, embedding and norm layers) would need much memory.
        keepdims: Each sample keeps its axis.

    Returns:
        A function with `loss_fn`'s arguments that returns (losses, gradients, norms): what
        `loss_fn` returned, with a leading axis of samples; the sum, a tree like
        `model.trainable_parameters()`; the norms before clipping, as `per_sample_norms` has them.

    Raises:
        ValueError: a bound that is not positive, and as `per_sample_value_and_grad`.

    The norms come from the same backward pass as the sum. Until they are known, a layer's inputs
    and cotangents are kept, and multiplied twice; or its samples' gradients, where those take no
    more memory (rows * (inputs + outputs) numbers a sample, against inputs * outputs).
    Where nothing traces, the backward pass has begun when the call returns.

    Example:
        >>> import mlx.core as mx
        >>> import mlx.nn as nn
        >>> from mlxshim.nn import clipped_grad
        >>> model = nn.Linear(2, 1, bias=False)
        >>> x = mx.array([[3.0, 4.0], [0.0, 1.0]])
        >>> clipped_grad(model, lambda model, x: model(x).sum(), 1.0)(model, x)[1]
        {'weight': array([[0.6, 1.8]], dtype=float32)}

    Source: Abadi et al. 2016 (https://arxiv.org/abs/1607.00133); the way, Bu et al. 2023
    (https://arxiv.org/abs/2210.00038).
    """
    _check_bound(max_norm, per_layer)

    traces = Traces()

    @functools.wraps(loss_fn, updated=())
    def differentiated(*args: Any, **kwargs: Any) -> tuple[Any, Any, Any]:
        samples = Samples(model, loss_fn, args, kwargs, in_axes, keepdims, traces)
        bounds = _bounds(max_norm, samples.places, per_layer)
        results, parts = [], []
        total: list[mx.array] | None = None
        with _chunks.OneAtATime():
            for run in _runs(samples, chunk_size):
                run.start()
                norms = [mx.sqrt(s) for s in run.squared_norms(per_layer)]
                factors = [bound / mx.maximum(norm, bound) for norm, bound in zip(norms, bounds)]
                sums = run.weighted_sums(factors if per_layer else factors * len(run.parameters))
                run.finish_starting()
                if run.size < samples.size:
                    # Many small ones are added up: in float32.
                    sums = [s.astype(mx.float32) for s in sums]
                    total = sums if total is None else [t + s for t, s in zip(total, sums)]
                    _chunks.compute([*total, *norms, *arrays_of(run.results)])
                else:
                    total = sums
                results.append(run.results)
                parts.append(norms)
        assert total is not None
        gradients = [t.astype(at.get().dtype) for t, at in zip(total, samples.places.unique)]
        norms = [concatenated(list(part)) for part in zip(*parts)]
        return (
            joined(results),
            samples.places.tree_of(gradients),
            samples.places.tree_of(norms) if per_layer else norms[0],
        )

    return differentiated


def _runs(samples: Samples, chunk_size: int | None) -> Iterator[_parts.Run]:
    step = chunk_size
    if step is None:
        # Nothing of this one is evaluated before it is known to be small enough.
        run = samples.run()
        step = _affordable(run)
        if step >= samples.size:
            yield run
            return
        del run
    for start, stop in samples.chunks(step):
        yield samples.run(start, stop)


def _affordable(run: _parts.Run) -> int:
    """How many samples' gradients of unknown layers may be held."""
    each = sum(p.value.nbytes for p in run.parameters if p.direct is not None)
    everything = sum(p.value.nbytes for p in run.parameters)
    if not each:
        return run.size
    return max(1, max(HELD_TIMES * everything, HELD_BYTES) // each)


def _check_bound(max_norm: Any, per_layer: bool) -> None:
    bounds = [max_norm]
    if isinstance(max_norm, (dict, list)):
        if not per_layer:
            raise ValueError(
                "[clipped_grad] max_norm is a tree of bounds, one for each parameter: that needs "
                "per_layer=True."
            )
        bounds = [bound for _, bound in tree_flatten(max_norm)]
    for bound in bounds:
        if isinstance(bound, mx.array):
            if bound.size != 1:
                raise ValueError(
                    f"[clipped_grad] max_norm must be one number, found shape {tuple(bound.shape)}."
                )
        elif isinstance(bound, bool) or not isinstance(bound, (int, float)) or not bound > 0:
            raise ValueError(f"[clipped_grad] max_norm must be positive, found {bound!r}.")


def _bounds(max_norm: Any, places: _state.Locations, per_layer: bool) -> list[mx.array]:
    count = len(places.unique)
    if not isinstance(max_norm, (dict, list)):
        bound = mx.reshape(mx.array(max_norm, mx.float32), ())
        return [bound / math.sqrt(count)] * count if per_layer else [bound]
    given = dict(tree_flatten(max_norm))
    names = [at.name for at in places.unique]
    missing = [name for name in names if name not in given]
    if missing:
        raise ValueError(f"[clipped_grad] max_norm has no bound for {', '.join(missing)}.")
    return [mx.reshape(mx.array(given[name], mx.float32), ()) for name in names]
