"""Gradients with respect to a model's trainable parameters: of a loss, and of every sample's."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..transforms import _chunks, autodiff
from . import _state
from ._samples import Samples, Traces

Loss = Callable[..., Any]


def value_and_grad(model: nn.Module, loss_fn: Loss) -> Callable[..., tuple[Any, Any]]:
    """As `mlx.nn.value_and_grad`, with every rule of mlxshim taking part.

    Args:
        model: Its trainable parameters are differentiated with respect to. Afterwards it has the
            arrays that it had, an exception or not.
        loss_fn: Returns a scalar array, or a tuple that begins with one. It reaches the model as
            an argument or as it likes.

    Returns:
        A function with `loss_fn`'s arguments that returns (what `loss_fn` returned, gradients),
        the gradients a tree such as `model.trainable_parameters()`.

    Raises:
        ArgumentError: by its call, a loss that is no scalar array.

    Example:
        >>> import mlx.core as mx
        >>> import mlx.nn as nn
        >>> from mlxshim.nn import value_and_grad
        >>> model = nn.Linear(2, 1, bias=False)
        >>> loss, grads = value_and_grad(model, lambda m, x: m(x).sum())(model, mx.ones((3, 2)))
        >>> grads
        {'weight': array([[3, 3]], dtype=float32)}
    """

    @functools.wraps(loss_fn, updated=())
    def differentiated(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
        places = _state.trainable(model)

        def inner(parameters: list[mx.array], *args: Any, **kwargs: Any) -> Any:
            with _state.substituted(places.unique, parameters):
                return loss_fn(*args, **kwargs)

        values = [place.get() for place in places.unique]
        with _state.substituted(places.unique, values):  # put back what a checkpoint leaves
            value, grads = autodiff.value_and_grad(inner)(values, *args, **kwargs)
        return value, places.tree_of(grads)

    return differentiated


def per_sample_value_and_grad(
    model: nn.Module,
    loss_fn: Loss,
    in_axes: Any = 0,
    *,
    chunk_size: int | None = None,
    keepdims: bool = False,
) -> Callable[..., tuple[Any, Any]]:
    """The loss of every sample and its gradient, as a loop of `value_and_grad` would find them.

    Args:
        model: Its trainable parameters are differentiated with respect to. It is left as it was.
        loss_fn: The loss of one sample: a scalar array, or a tuple that begins with one. It
            reaches the model as an argument or as it likes.
        in_axes: Which axis of each positional argument of `loss_fn` has the samples: an int, None
            for what all samples share, or one entry for each argument, as in `mlxshim.vmap`.
            Modules are never mapped; keyword arguments are over axis 0.
        chunk_size: At most this many samples at a time. The gradients of all are in memory in the
            end; what a chunk needs besides is not.
        keepdims: Each sample keeps its axis, of size one: for a loss or a model that is written
            for a batch.

    Returns:
        A function with `loss_fn`'s arguments that returns (losses, gradients): what `loss_fn`
        returned with a leading axis of samples, and a tree such as `model.trainable_parameters()`
        in which every gradient has one.

    Raises:
        ValueError: a loss that is no scalar, axes that do not fit, nothing trainable.

    The samples go through the model in one batch, and the backward pass is that batch's; only the
    last product of each layer, which makes the gradient of a weight, is one for every sample.

    Example:
        >>> import mlx.core as mx
        >>> import mlx.nn as nn
        >>> from mlxshim.nn import per_sample_value_and_grad
        >>> model = nn.Linear(2, 1, bias=False)
        >>> def loss(model, x, y):
        ...     return (model(x) - y).square().sum()
        >>> x, y = mx.ones((3, 2)), mx.zeros((3, 1))
        >>> losses, grads = per_sample_value_and_grad(model, loss)(model, x, y)
        >>> losses.shape, grads["weight"].shape
        ((3,), (3, 1, 2))
    """

    traces = Traces()

    @functools.wraps(loss_fn, updated=())
    def differentiated(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
        samples = Samples(model, loss_fn, args, kwargs, in_axes, keepdims, traces)
        results, parts = [], []
        with _chunks.OneAtATime():
            for start, stop in samples.chunks(chunk_size):
                run = samples.run(start, stop)
                gradients = run.gradients()
                if stop - start < samples.size:
                    _chunks.compute([*gradients, *arrays_of(run.results)])
                results.append(run.results)
                parts.append(gradients)
        gradients = [concatenated(list(part)) for part in zip(*parts)]
        return joined(results), samples.places.tree_of(gradients)

    return differentiated


def concatenated(arrays: list[mx.array]) -> mx.array:
    return mx.concatenate(arrays) if len(arrays) > 1 else arrays[0]


def joined(results: list[Any]) -> Any:
    """What chunks returned, as one."""
    first = results[0]
    if len(results) == 1 or first is None:
        return first
    if isinstance(first, mx.array):
        return mx.concatenate(results)
    if isinstance(first, dict):
        return {key: joined([r[key] for r in results]) for key in first}
    return type(first)(joined(list(column)) for column in zip(*results))


def arrays_of(tree: Any) -> list[mx.array]:
    if isinstance(tree, mx.array):
        return [tree]
    if isinstance(tree, dict):
        tree = list(tree.values())
    return (
        [x for child in tree for x in arrays_of(child)] if isinstance(tree, (list, tuple)) else []
    )
