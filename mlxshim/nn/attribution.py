"""Which training samples a prediction is owed to: projected gradients, and TRAK's scores."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..transforms import _chunks
from ._samples import Samples, Traces
from .gradients import arrays_of, joined

#: Entries of the random matrix that are in memory at a time.
_BLOCK = 2**22


def random_projection(gradients: Any, dimension: int, *, seed: int = 0) -> mx.array:
    """Each sample's gradient times one random matrix of signs, which is never held whole.

    Args:
        gradients: A tree of arrays with a leading axis of samples, as
            `per_sample_value_and_grad` returns them.
        dimension: How many numbers remain of each gradient.
        seed: The same seed is the same matrix, in every call with a tree of these shapes.

    Returns:
        (samples, dimension), float32. Scalar products of two rows are those of the gradients, on
        average over seeds, with a standard deviation of about their norms over sqrt(dimension).

    Example:
        >>> import mlx.core as mx
        >>> from mlxshim.nn import random_projection
        >>> random_projection({"weight": mx.ones((3, 4, 5))}, 16).shape
        (3, 16)

    Source: Achlioptas 2003, "Database-friendly random projections".
    """
    key = mx.random.key(seed)
    total: mx.array | None = None
    for leaf in arrays_of(gradients):
        flat = mx.reshape(leaf, (leaf.shape[0], -1)).astype(mx.float32)
        step = max(1, _BLOCK // dimension)
        for start in range(0, flat.shape[1], step):
            part = flat[:, start : start + step]
            key, own = mx.random.split(key)
            signs = mx.random.bernoulli(0.5, (part.shape[1], dimension), key=own)
            found = part @ (2.0 * signs.astype(mx.float32) - 1.0)
            total = found if total is None else total + found
    if total is None:
        raise ValueError("[random_projection] There are no gradients to project.")
    return total / math.sqrt(dimension)


def gradient_features(
    model: nn.Module,
    loss_fn: Callable[..., Any],
    dimension: int,
    in_axes: Any = 0,
    *,
    seed: int = 0,
    chunk_size: int | None = 32,
    keepdims: bool = False,
) -> Callable[..., tuple[Any, mx.array]]:
    """Each sample's gradient, projected to `dimension` numbers.

    Args:
        model: Its trainable parameters are differentiated with respect to. It is left as it was.
        loss_fn: A function of one sample: a scalar array, or a tuple that begins with one. The
            loss for similarity of gradients; for TRAK the logit of the right answer's probability.
        dimension: Of the features.
        in_axes: As `per_sample_value_and_grad`'s.
        seed: Of the projection.
        chunk_size: The gradients of so many samples are in memory at a time; None for all.
        keepdims: As `per_sample_value_and_grad`'s.

    Returns:
        A function with `loss_fn`'s arguments that returns (results, features): what `loss_fn`
        returned with a leading axis of samples, and (samples, dimension), float32. Its errors are
        those of `per_sample_value_and_grad`.

    Example:
        >>> import mlx.core as mx
        >>> import mlx.nn as nn
        >>> from mlxshim.nn import gradient_features
        >>> model = nn.Linear(8, 8)
        >>> of = gradient_features(model, lambda m, x: m(x).square().sum(), 4)
        >>> losses, features = of(model, mx.random.normal((5, 8)))
        >>> features.shape
        (5, 4)
    """

    traces = Traces()

    @functools.wraps(loss_fn, updated=())
    def of(*args: Any, **kwargs: Any) -> tuple[Any, mx.array]:
        samples = Samples(model, loss_fn, args, kwargs, in_axes, keepdims, traces)
        results, parts = [], []
        with _chunks.OneAtATime():
            for start, stop in samples.chunks(chunk_size):
                run = samples.run(start, stop)
                parts.append(random_projection(run.gradients(), dimension, seed=seed))
                results.append(run.results)
                _chunks.compute([parts[-1], *arrays_of(run.results)])
        return joined(results), mx.concatenate(parts)

    return of


def trak(
    train: mx.array | Sequence[mx.array],
    test: mx.array | Sequence[mx.array],
    residuals: mx.array | Sequence[mx.array],
    *,
    ridge: float = 0.0,
) -> mx.array:
    """TRAK's scores: how much each training sample speaks for each prediction.

    Args:
        train: Features of the training samples, (samples, dimension): `gradient_features` of
            log(p / (1 - p)), p being the probability of the right answer. One array, or several
            from models trained independently, whose scores are averaged.
        test: Features of the samples to be explained, (tests, dimension), as many arrays.
        residuals: 1 - p of the training samples, (samples,), as many arrays.
        ridge: Added to the diagonal of the features' covariance, relative to its mean.

    Returns:
        (tests, samples), float32: the larger, the more a training sample raises the prediction.

    Raises:
        ValueError: not as many arrays in each, or shapes that do not go together.

    Example:
        >>> import mlx.core as mx
        >>> from mlxshim.nn import trak
        >>> train, test = mx.random.normal((32, 4)), mx.random.normal((3, 4))
        >>> trak(train, test, mx.random.uniform(shape=(32,))).shape
        (3, 32)

    Source: Park et al. 2023, "TRAK: attributing model behavior at scale", equation (17).
    """
    several = [[x] if isinstance(x, mx.array) else list(x) for x in (train, test, residuals)]
    if len({len(arrays) for arrays in several}) != 1:
        raise ValueError(
            "[trak] train, test and residuals must be as many arrays each, found "
            f"{', '.join(str(len(arrays)) for arrays in several)}."
        )
    influence = mx.array(0.0)
    weight = mx.array(0.0)
    for phi, psi, q in zip(*several):
        if phi.shape[1] != psi.shape[1] or q.shape != phi.shape[:1]:
            raise ValueError(
                f"[trak] train {tuple(phi.shape)}, test {tuple(psi.shape)} and residuals "
                f"{tuple(q.shape)} must be (samples, dimension), (tests, dimension), (samples,)."
            )
        covariance = phi.T @ phi
        size = covariance.shape[0]
        level = ridge * mx.trace(covariance) / size
        # MLX factors matrices on the CPU alone.
        solved = mx.linalg.solve(covariance + level * mx.eye(size), psi.T, stream=mx.cpu)
        influence = influence + (phi @ solved).T
        weight = weight + q
    count = len(several[0])
    return (influence / count) * (weight / count)
