"""The diagonal of the Fisher information, and the Laplace approximation that it makes."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from ..transforms import _chunks
from ._samples import Samples, Traces
from .gradients import arrays_of, joined

Tree = Any


def fisher_diagonal(
    model: nn.Module,
    loss_fn: Callable[..., Any],
    in_axes: Any = 0,
    *,
    chunk_size: int | None = 32,
    keepdims: bool = False,
) -> Callable[..., tuple[Any, Tree]]:
    """The mean over samples of each sample's squared gradient.

    With the labels that the data has this is the *empirical* Fisher information; with labels drawn
    from the model's own predictions it is an unbiased estimate of the Fisher information itself
    (Kunstner et al. 2019, "Limitations of the empirical Fisher approximation").

    Args:
        model: Its trainable parameters are the ones meant. It is left as it was.
        loss_fn: The loss of one sample, a negative log likelihood: a scalar array.
        in_axes: As `per_sample_value_and_grad`'s.
        chunk_size: The gradients of so many samples are in memory at a time; None for all.
        keepdims: As `per_sample_value_and_grad`'s.

    Returns:
        A function with `loss_fn`'s arguments that returns (losses, fisher): the losses of all
        samples, (samples,), and a tree such as `model.trainable_parameters()`, in float32.

    Raises:
        ValueError: a loss that is no scalar, axes that do not fit, no samples, nothing trainable.

    Example:
        >>> import mlx.core as mx
        >>> import mlx.nn as nn
        >>> from mlxshim.nn import fisher_diagonal
        >>> model = nn.Linear(1, 1, bias=False)
        >>> of = fisher_diagonal(model, lambda m, x: m(x).sum())
        >>> losses, fisher = of(model, mx.array([[1.0], [3.0]]))
        >>> fisher
        {'weight': array([[5]], dtype=float32)}
    """

    traces = Traces()

    @functools.wraps(loss_fn, updated=())
    def of(*args: Any, **kwargs: Any) -> tuple[Any, Tree]:
        samples = Samples(model, loss_fn, args, kwargs, in_axes, keepdims, traces)
        if not samples.size:
            raise ValueError("[fisher_diagonal] There are no samples to take the mean of.")
        sums: list[mx.array] | None = None
        losses = []
        with _chunks.OneAtATime():
            for start, stop in samples.chunks(chunk_size):
                run = samples.run(start, stop)
                squares = [mx.sum(mx.square(g.astype(mx.float32)), axis=0) for g in run.gradients()]
                sums = squares if sums is None else [a + b for a, b in zip(sums, squares)]
                losses.append(run.results)
                _chunks.compute([*sums, *arrays_of(run.results)])
        assert sums is not None
        return joined(losses), samples.places.tree_of([s / samples.size for s in sums])

    return of


class Laplace(NamedTuple):
    """A normal distribution over parameters, its covariance diagonal; made by `laplace`.

    Example:
        >>> import mlx.core as mx
        >>> from mlxshim.nn import Laplace
        >>> posterior = Laplace({"w": mx.zeros(2)}, {"w": mx.ones(2)}, prior_precision=1.0)
        >>> posterior.sample(5)["w"].shape
        (5, 2)
    """

    #: Trees such as `model.trainable_parameters()`.
    mean: Tree
    precision: Tree
    prior_precision: float

    def sample(self, size: int, *, key: mx.array | None = None) -> Tree:
        """`size` draws of the parameters: the tree with a leading axis, for `functional_call`
        under `vmap(…, in_axes=0)`."""
        own = key

        def draw(mean: mx.array, precision: mx.array) -> mx.array:
            nonlocal own
            used = own
            if own is not None:
                own, used = mx.random.split(own)
            noise = mx.random.normal((size, *mean.shape), key=used)
            return mean + (noise * mx.rsqrt(precision)).astype(mean.dtype)

        return tree_map(draw, self.mean, self.precision)

    def log_evidence(self, loss: mx.array) -> mx.array:
        """An estimate of the log marginal likelihood, to choose the prior or the model by.

        Args:
            loss: The negative log likelihood of all the data, summed, at the mean.

        Returns:
            A scalar, float32 (MacKay 1992, "A practical Bayesian framework for backpropagation
            networks").
        """
        total = -loss.astype(mx.float32)
        for mean, precision in zip(arrays_of(self.mean), arrays_of(self.precision)):
            total = total - 0.5 * self.prior_precision * mx.sum(mx.square(mean.astype(mx.float32)))
            total = total + 0.5 * mean.size * math.log(self.prior_precision)
            total = total - 0.5 * mx.sum(mx.log(precision))
        return total


def laplace(
    model: nn.Module, fisher: Tree, samples: int, *, prior_precision: float = 1.0
) -> Laplace:
    """The posterior of the trainable parameters as a normal distribution around them.

    Args:
        model: Trained: its parameters are the mean.
        fisher: What `fisher_diagonal` returned for its negative log likelihood.
        samples: How many samples there are; the curvature is that many times the fisher.
        prior_precision: One over the variance of the normal prior, which is the weight decay of the
            summed loss.

    Returns:
        A `Laplace` with `mean`, `precision` and the methods `sample` and `log_evidence`.

    Raises:
        ValueError: a prior precision or number of samples that is not positive.

    Example:
        >>> import mlx.core as mx
        >>> import mlx.nn as nn
        >>> from mlxshim import vmap
        >>> from mlxshim.nn import fisher_diagonal, functional_call, laplace
        >>> model = nn.Linear(2, 1)
        >>> x, y = mx.random.normal((8, 2)), mx.random.normal((8, 1))
        >>> def loss(model, x, y):
        ...     return 0.5 * (model(x) - y).square().sum()
        >>> losses, fisher = fisher_diagonal(model, loss)(model, x, y)
        >>> posterior = laplace(model, fisher, 8)
        >>> def predict(parameters, x):
        ...     return functional_call(model, parameters, x)
        >>> vmap(predict, in_axes=(0, None))(posterior.sample(16), x).shape
        (16, 8, 1)

    Source: Daxberger et al. 2021, "Laplace redux"; Ritter et al. 2018.
    """
    if not prior_precision > 0 or samples < 1:
        raise ValueError(
            "[laplace] prior_precision and samples must be positive, found "
            f"{prior_precision!r} and {samples!r}."
        )
    precision = tree_map(lambda f: samples * f + prior_precision, fisher)
    return Laplace(model.trainable_parameters(), precision, prior_precision)
