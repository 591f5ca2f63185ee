"""Differentially private training (DP-SGD): batches, noise, and what they promise.

A step of DP-SGD (Abadi et al. 2016, https://arxiv.org/abs/1607.00133) takes each sample with the
same probability, clips the gradient of each to a norm, adds up, and adds noise in proportion to
that norm: `poisson_batches`, `clipped_grad`, `noisy`. What n such steps promise is computed by
Google's `dp-accounting` (`pip install "mlxshim[privacy]"`), by privacy loss distributions.

Noise comes from MLX's generator, which is not a cryptographic one.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from .clipping import clipped_grad
from .gradients import Loss

#: The grid of privacy losses: half of it, twice the time.
GRID = 1e-4

#: How much of the epsilon that was asked for may be left over, relative to it.
PRECISION = 1e-3


class Batch(NamedTuple):
    """Samples of one step: their numbers, and which are there (False where padded)."""

    indices: mx.array
    present: mx.array


def poisson_batches(
    size: int, rate: float, steps: int, *, key: mx.array, multiple: int = 1
) -> Iterator[Batch]:
    """Batches in which each of `size` samples is present with probability `rate`, independently.

    Args:
        size: How many samples there are.
        rate: The probability of each, in (0, 1]. A batch has `rate * size` samples on average.
        steps: How many batches.
        key: From `mx.random.key`.
        multiple: Pad each batch to a multiple of this many samples, at least one multiple, so that
            a compiled step sees few different shapes. A padded place has index 0 and is not
            present: let the loss be multiplied by `present`, and its gradient is zero.

    Yields:
        (indices, present): int32 and bool, of shape (samples,). Without padding there may be none.

    Raises:
        ValueError: a rate that is no probability, or sizes that are not positive.

    Example:
        >>> import mlx.core as mx
        >>> from mlxshim.nn.privacy import poisson_batches
        >>> batches = list(poisson_batches(100, 0.1, 3, key=mx.random.key(0), multiple=16))
        >>> [len(batch.indices) % 16 for batch in batches]
        [0, 0, 0]
    """
    if not 0 < rate <= 1:
        raise ValueError(f"[poisson_batches] rate must be in (0, 1], found {rate!r}.")
    for name, value in (("size", size), ("multiple", multiple)):
        if value < 1:
            raise ValueError(f"[poisson_batches] {name} must be positive, found {value!r}.")
    return _batches(size, rate, steps, key, multiple)


def _batches(size: int, rate: float, steps: int, key: mx.array, multiple: int) -> Iterator[Batch]:
    for _ in range(steps):
        key, own = mx.random.split(key)
        drawn = mx.random.uniform(shape=(size,), key=own)
        count = int((drawn < rate).sum()) if rate < 1 else size
        indices = mx.argsort(drawn)[:count].astype(mx.int32)
        padding = (-count) % multiple or (multiple if not count and multiple > 1 else 0)
        if padding:
            indices = mx.concatenate([indices, mx.zeros((padding,), mx.int32)])
        yield Batch(indices, mx.arange(count + padding) < count)


def noisy(gradients: Any, standard_deviation: Any, key: mx.array) -> Any:
    """A tree of gradients, normal noise added to every entry.

    Args:
        gradients: A tree of arrays.
        standard_deviation: Of the noise: a float, or an array with one number.
        key: From `mx.random.key`. Every array gets its own.

    Returns:
        The tree; the sum is taken in float32 and has the gradients' dtypes.
    """
    flat: Any = tree_flatten(gradients)
    if not flat:
        return gradients
    keys = mx.random.split(key, len(flat))
    return tree_unflatten(
        [
            (
                name,
                (
                    g.astype(mx.float32)
                    + standard_deviation * mx.random.normal(g.shape, mx.float32, key=keys[i])
                ).astype(g.dtype),
            )
            for i, (name, g) in enumerate(flat)
        ]
    )


def private_grad(
    model: nn.Module,
    loss_fn: Loss,
    max_norm: float,
    noise_multiplier: float,
    expected_samples: float,
    in_axes: Any = 0,
    *,
    chunk_size: int | None = None,
    keepdims: bool = False,
) -> Callable[..., tuple[Any, Any, Any]]:
    """The gradient of one step of DP-SGD: clipped for each sample, summed, noise added, averaged.

    Args:
        model: As in `clipped_grad`, and so are `loss_fn`, `max_norm`, `in_axes`, `chunk_size` and
            `keepdims`.
        loss_fn: The loss of one sample.
        max_norm: What each sample's gradient is clipped to.
        noise_multiplier: The noise has this times `max_norm` as its standard deviation.
        expected_samples: What the sum is divided by: the average size of a batch. The size of the
            batch at hand is private.
        in_axes: Where the samples are.
        chunk_size: At most this many samples at a time.
        keepdims: Each sample keeps its axis.

    Returns:
        A function of `loss_fn`'s arguments and `key` (from `mx.random.key`) that returns (losses,
        gradients, norms) as `clipped_grad`'s does. Losses and norms are not private.

    Example:
        >>> import mlx.core as mx
        >>> import mlx.nn as nn
        >>> from mlxshim.nn.privacy import private_grad
        >>> model = nn.Linear(2, 1)
        >>> loss = lambda model, x: model(x).square().sum()
        >>> step = private_grad(model, loss, 1.0, 0.8, expected_samples=4)
        >>> grads = step(model, mx.ones((5, 2)), key=mx.random.key(0))[1]
        >>> grads["weight"].shape
        (1, 2)
    """
    clip = clipped_grad(model, loss_fn, max_norm, in_axes, chunk_size=chunk_size, keepdims=keepdims)

    @functools.wraps(loss_fn, updated=())
    def differentiated(*args: Any, key: mx.array, **kwargs: Any) -> tuple[Any, Any, Any]:
        losses, gradients, norms = clip(*args, **kwargs)
        gradients = noisy(gradients, noise_multiplier * max_norm, key)
        flat: Any = tree_flatten(gradients)
        return losses, tree_unflatten([(n, g / expected_samples) for n, g in flat]), norms

    return differentiated


# What it promises ------------------------------------------------------------------------------


def epsilon(noise_multiplier: float, rate: float, steps: int, delta: float) -> float:
    """The epsilon of (epsilon, delta)-differential privacy after these steps of DP-SGD.

    Args:
        noise_multiplier: Standard deviation of the noise over the clipping norm.
        rate: The probability of each sample to be in a batch (`poisson_batches`).
        steps: How many steps.
        delta: The other half of the promise, well below one over the number of samples.

    Raises:
        ImportError: `dp-accounting` is not installed.
    """
    accountant = _accountant(GRID)
    accountant.compose(_event(noise_multiplier, rate, steps))
    return float(accountant.get_epsilon(delta))


def noise_multiplier_for(target_epsilon: float, rate: float, steps: int, delta: float) -> float:
    """The least noise (over the clipping norm) with which these steps keep to an epsilon.

    Arguments as `epsilon`'s. What it returns does keep to it, and uses it up but for a thousandth.
    """
    accounting = _accounting()
    # A coarser grid errs towards more noise, and comes near at a tenth of the price.
    coarse = accounting.calibrate_dp_mechanism(
        lambda: _accountant(10 * GRID),
        lambda noise: _event(noise, rate, steps),
        target_epsilon,
        delta,
        accounting.LowerEndpointAndGuess(0.0, 1.0),
        tol=1e-2,
    )
    # From there by secants of log epsilon over log noise; what is returned has been tried.
    noise, best, slope = float(coarse), float(coarse), -2.0
    tried: list[tuple[float, float]] = []
    for _ in range(8):
        spent = epsilon(noise, rate, steps, delta)
        if spent <= target_epsilon:
            best = min(best, noise)
            if spent >= (1 - PRECISION) * target_epsilon:
                break
        tried.append((math.log(noise), math.log(max(spent, 1e-12))))
        if len(tried) > 1:
            (x0, y0), (x1, y1) = tried[-2:]
            slope = min((y1 - y0) / (x1 - x0) if x1 != x0 else slope, -0.1)
        wanted = math.log((1 - PRECISION / 2) * target_epsilon)
        noise = math.exp(tried[-1][0] + (wanted - tried[-1][1]) / slope)
    return best


def _accountant(grid: float) -> Any:
    return _accounting().pld.PLDAccountant(value_discretization_interval=grid)


def _event(noise_multiplier: float, rate: float, steps: int) -> Any:
    accounting = _accounting()
    step = accounting.PoissonSampledDpEvent(rate, accounting.GaussianDpEvent(noise_multiplier))
    return accounting.SelfComposedDpEvent(step, steps)


def _accounting() -> Any:
    try:
        import dp_accounting  # pyright: ignore[reportMissingImports]
        import dp_accounting.pld  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError(
            'The accounting is done by dp-accounting: pip install "mlxshim[privacy]".'
        ) from error
    return dp_accounting
