"""How sure a network is: the Fisher information of each weight, and the posterior it makes.

    python examples/fisher_laplace.py [--quick] [--plot fisher_laplace.png]

A small network learns noisy points of a curve, with a gap where there are none. `fisher_diagonal`
squares each sample's own gradient, with targets drawn from the model's own prediction (each sample
its own, as in a loop), and `laplace` makes a normal distribution of the weights of it; the prior is
the one with the largest evidence. The variance of a prediction is then sum_w J(x)_w^2 var(w), J
from the per-sample gradients of the output (the linearized predictive; Immer et al. 2021).

A diagonal leaves out how weights make up for each other, and so errs on the safe side. For a model
this small the whole posterior is affordable, through the kernel of the Jacobians
(`empirical_ntk`), and is drawn beside it.

Checked: the Fisher diagonal against a loop, and the whole of it against the exact Bayesian
posterior of a linear model. The result: the model is less sure in the gap than where it has seen
data, and how many new points the 95 % intervals hold.
"""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from _common import check, parse, parser, relative_error, track
from mlx.utils import tree_flatten, tree_map

from mlxshim.nn import (
    Laplace,
    empirical_ntk,
    fisher_diagonal,
    laplace,
    per_sample_value_and_grad,
    value_and_grad,
)

NOISE = 0.15
PRIOR = 1.0


def curve(x: mx.array) -> mx.array:
    return mx.sin(2.5 * x) + 0.3 * x


def points(count: int) -> tuple[mx.array, mx.array]:
    """x in [-2, -0.5] and [0.7, 2], (count, 1), and y."""
    u = mx.random.uniform(shape=(count, 1))
    x = mx.where(u < 0.5, -2 + 3 * u, 0.7 + 2.6 * (u - 0.5))
    return x, curve(x) + NOISE * mx.random.normal(x.shape)


def nll(model: Any, x: mx.array, y: mx.array) -> mx.array:
    """The negative log likelihood of one sample (of a batch: summed)."""
    error = ((model(x) - y) / NOISE).square()
    return (0.5 * error + math.log(NOISE * math.sqrt(2 * math.pi))).sum()


def drawn_nll(model: Any, x: mx.array) -> mx.array:
    """That of a target drawn from the prediction."""
    y = mx.stop_gradient(model(x))
    return nll(model, x, y + NOISE * mx.random.normal(y.shape))


def fit(model: Any, x: mx.array, y: mx.array, steps: int, prior: float) -> None:
    """The most probable weights."""

    def loss(model: Any) -> mx.array:
        squares = sum(p.square().sum() for _, p in tree_flatten(model.parameters()))
        return (nll(model, x, y) + 0.5 * prior * squares) / len(x)

    gradient = value_and_grad(model, loss)
    optimizer = optim.Adam(learning_rate=optim.cosine_decay(1e-2, steps))
    for _ in track(range(steps), "training"):
        optimizer.update(model, gradient(model)[1])
        mx.eval(model.parameters(), optimizer.state)


def fisher_of(model: Any, x: mx.array, draws: int) -> Any:
    """The Fisher information itself, by several drawn targets for each sample."""
    return fisher_diagonal(model, drawn_nll, chunk_size=None)(model, mx.concatenate([x] * draws))[1]


def predict(model: Any, posterior: Laplace, x: mx.array) -> tuple[mx.array, mx.array]:
    """Mean and standard deviation of each prediction, without the noise of the data."""
    mean, jacobian = per_sample_value_and_grad(model, lambda m, x: m(x).sum())(model, x)
    terms = tree_map(
        lambda j, p: (j.square() / p).reshape(len(x), -1).sum(axis=1), jacobian, posterior.precision
    )
    return mean, mx.sqrt(sum(v for _, v in tree_flatten(terms)))


def predict_by_kernel(model: Any, data: mx.array, x: mx.array) -> mx.array:
    """The standard deviation under the whole covariance: that of the Gaussian process whose kernel
    is that of the Jacobians."""
    among = empirical_ntk(model, data, compute="trace") / PRIOR
    across = empirical_ntk(model, x, data, compute="trace") / PRIOR
    own = mx.diagonal(empirical_ntk(model, x, compute="trace")) / PRIOR
    noisy = among + NOISE**2 * mx.eye(len(data))
    explained = across * mx.linalg.solve(noisy, across.T, stream=mx.cpu).T
    return mx.sqrt(mx.maximum(own - explained.sum(axis=1), 0.0))


def check_linear(draws: int) -> None:
    """A line through points whose columns do not correlate has a diagonal posterior: the exact
    one is known."""
    features = mx.array([[1.0, -1.5], [1.0, -0.5], [1.0, 0.5], [1.0, 1.5]])
    line = nn.Linear(2, 1, bias=False)
    fisher = fisher_of(line, features, draws)
    posterior = laplace(line, fisher, len(features), prior_precision=2.0)
    exact = features.square().sum(axis=0) / NOISE**2 + 2.0
    # The Fisher information is an average over draws: its error goes with their root.
    check(
        "posterior of a linear model against the exact one",
        relative_error([posterior.precision["weight"][0]], [exact]),
        6 * math.sqrt(2 / draws),
    )


def check_fisher(model: Any, x: mx.array, y: mx.array) -> None:
    got = fisher_diagonal(model, nll)(model, x, y)[1]
    one = value_and_grad(model, nll)
    squares = [tree_map(mx.square, one(model, *sample)[1]) for sample in zip(x, y)]
    want = tree_map(lambda *leaves: sum(leaves) / len(x), *squares)
    check(f"Fisher diagonal of {len(x)} samples", relative_error(got, want), 1e-4)


def draw(path: str, x: mx.array, y: mx.array, model: Any, posterior: Laplace) -> None:
    import matplotlib.pyplot as plt
    import numpy as np

    grid = mx.linspace(-3, 3, 200)[:, None]
    mean, std = predict(model, posterior, grid)
    whole = predict_by_kernel(model, x, grid)
    line, mid, own, full = (np.array(a).ravel() for a in (grid, mean, std, whole))
    figure, axis = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for width, label in ((own, "mean ± 2 std, diagonal"), (full, "whole covariance")):
        axis.fill_between(line, mid - 2 * width, mid + 2 * width, alpha=0.35, label=label)
    axis.plot(line, mid, color="tab:blue")
    axis.plot(line, np.array(curve(grid)).ravel(), "k--", lw=1, label="the curve")
    axis.plot(np.array(x).ravel(), np.array(y).ravel(), ".", ms=3, color="tab:red")
    axis.set(xlabel="x", ylabel="y", ylim=(-3.5, 3.5), title="Laplace approximation")
    axis.legend(loc="lower right", fontsize=8)
    figure.savefig(path, dpi=100)


def main() -> None:
    about = parser(__doc__)
    about.add_argument("--samples", type=int, default=160)
    about.add_argument("--hidden", type=int, default=48)
    about.add_argument("--steps", type=int, default=1500)
    about.add_argument("--draws", type=int, default=32, help="of targets for each sample")
    options = parse(about, samples=60, hidden=24, steps=150, draws=8)
    check_linear(2000)

    x, y = points(options.samples)
    hidden = options.hidden
    model: Any = nn.Sequential(
        nn.Linear(1, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh(), nn.Linear(hidden, 1)
    )
    fit(model, x, y, options.steps, PRIOR)
    check_fisher(model, x[:32], y[:32])

    fisher = fisher_of(model, x, options.draws)
    total = nll(model, x, y)
    priors = [10.0 ** (n / 2) for n in range(-3, 5)]
    posteriors = [laplace(model, fisher, len(x), prior_precision=p) for p in priors]
    posterior = max(posteriors, key=lambda p: p.log_evidence(total).item())
    print(f"prior precision of the largest evidence: {posterior.prior_precision:.2f}")

    fresh_x, fresh_y = points(400)
    middle = mx.linspace(-0.3, 0.5, 20)[:, None]
    mean, seen = predict(model, posterior, fresh_x)
    rows = {
        "diagonal": (seen, predict(model, posterior, middle)[1]),
        "whole covariance": (
            predict_by_kernel(model, x, fresh_x),
            predict_by_kernel(model, x, middle),
        ),
    }
    for name, (std, gap) in rows.items():
        held = mx.abs(mean - fresh_y[:, 0]) < 1.96 * mx.sqrt(std**2 + NOISE**2)
        print(
            f"{name:<17} standard deviation {std.mean().item():.3f} at the data, "
            f"{gap.mean().item():.3f} in the gap; 95 % intervals hold {held.mean().item():.1%} of "
            "400 new points"
        )
        if not std.mean().item() < gap.mean().item():
            raise SystemExit("the model is as sure in the gap as at the data")
    if options.plot:
        draw(options.plot, x, y, model, posterior)


if __name__ == "__main__":
    main()
