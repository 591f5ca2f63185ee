"""Many networks trained as one: an ensemble, and where its members disagree.

    python examples/ensemble.py [--members 16] [--quick] [--plot ensemble.png]

`ensemble` makes one module of networks of one architecture. It is trained as any module is, all
members in one batch, each from its own start and on its own random half of the data. Checked
against training the members one after the other: the same weights. The time of both is printed, and
how unsure the ensemble is of points like the ones it has seen, and of others
(Lakshminarayanan et al. 2017, "Deep ensembles").
"""

from __future__ import annotations

import time
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from _common import check, parse, parser, relative_error, track

from mlxshim.nn import ensemble, value_and_grad


def moons(count: int) -> tuple[mx.array, mx.array]:
    """Two interleaved half circles."""
    label = mx.random.randint(0, 2, (count,))
    angle = 3.1416 * mx.random.uniform(shape=(count,))
    x = mx.where(label == 0, mx.cos(angle), 1 - mx.cos(angle))
    y = mx.where(label == 0, mx.sin(angle), 0.5 - mx.sin(angle))
    points = mx.stack([x, y], axis=1)
    return points + 0.12 * mx.random.normal(points.shape), label


def network(hidden: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(2, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, 2)
    )


def fit(model: nn.Module, batches: Any, what: str) -> float:
    """Seconds. Each batch is (x, y), with an axis of members in front for an ensemble. The loss is
    the sum over members, so that the gradient of each is its own."""

    def loss(model: Any, x: mx.array, y: mx.array) -> mx.array:
        return nn.losses.cross_entropy(model(x), y).mean(axis=-1).sum()

    gradient = value_and_grad(model, loss)
    optimizer = optim.SGD(learning_rate=0.2, momentum=0.9)
    begin = time.perf_counter()
    for x, y in track(batches, what, len(batches)):
        optimizer.update(model, gradient(model, x, y)[1])
        mx.eval(model.parameters(), optimizer.state)
    return time.perf_counter() - begin


def entropy(probabilities: mx.array) -> mx.array:
    return -(probabilities * mx.log(probabilities + 1e-9)).sum(axis=-1)


def uncertainty(together: Any, x: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """The mean probabilities, their entropy, and how much of it is the members' disagreement."""
    together.in_axes = None  # the same points for all
    members = mx.softmax(together(x), axis=-1)
    mean = members.mean(axis=0)
    return mean, entropy(mean), entropy(mean) - entropy(members).mean(axis=0)


def draw(path: str, together: Any, x: mx.array, y: mx.array) -> None:
    import matplotlib.pyplot as plt
    import numpy as np

    across, up = mx.linspace(-2.5, 3.5, 90), mx.linspace(-2.2, 2.7, 70)
    grid = mx.stack(mx.meshgrid(across, up), axis=-1).reshape(-1, 2)
    mean, _, disagreement = uncertainty(together, grid)
    maps = {"probability of one moon": mean[:, 1], "the members' disagreement": disagreement}
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
    for axis, (title, values), colours in zip(axes, maps.items(), ("RdBu_r", "viridis")):
        image = np.array(values.reshape(70, 90))
        shown = axis.pcolormesh(across, up, image, cmap=colours, shading="nearest", rasterized=True)
        figure.colorbar(shown, ax=axis)
        axis.scatter(*np.array(x).T, c=np.array(y), cmap="gray", s=5, edgecolors="k", lw=0.2)
        axis.set_title(title)
    figure.savefig(path, dpi=90)


def main() -> None:
    about = parser(__doc__)
    about.add_argument("--members", type=int, default=16)
    about.add_argument("--hidden", type=int, default=32)
    about.add_argument("--steps", type=int, default=300)
    about.add_argument("--batch", type=int, default=32)
    options = parse(about, members=4, steps=40)

    x, y = moons(400)
    members = [network(options.hidden) for _ in range(options.members)]
    mx.eval(x, y, [member.parameters() for member in members])
    together = ensemble(members, in_axes=0)
    halves = mx.stack([mx.random.permutation(len(x))[: len(x) // 2] for _ in members])
    batches = []
    for _ in range(options.steps):
        picked = mx.random.randint(0, halves.shape[1], (options.members, options.batch))
        chosen = mx.take_along_axis(halves, picked, axis=1)
        batches.append((x[chosen], y[chosen]))
    mx.eval(batches)

    as_one = fit(together, batches, f"{options.members} members as one")
    one_by_one = 0.0
    for i, member in enumerate(members):
        own = [(a[i], b[i]) for a, b in batches]
        one_by_one += fit(member, own, f"member {i + 1} of {options.members} by itself")
    want = ensemble(members).parameters()
    check("weights of the members", relative_error(together.parameters(), want), 2e-2)
    print(
        f"{options.members} members, {options.steps} steps: {as_one:.2f} s as one, "
        f"{one_by_one:.2f} s one by one, {one_by_one / as_one:.1f}x"
    )

    fresh_x, fresh_y = moons(500)
    far = mx.random.uniform(-1, 1, (500, 2)) * mx.array([6.0, 5.0]) + mx.array([0.5, 0.25])
    distance = ((far[:, None] - x[None]) ** 2).sum(axis=-1).min(axis=1)
    far = far[mx.argsort(-distance)[:200]]  # the ones far from every sample
    mean, _, near = uncertainty(together, fresh_x)
    accuracy = (mx.argmax(mean, axis=1) == fresh_y).mean().item()
    away = uncertainty(together, far)[2].mean().item()
    print(
        f"accuracy on new points {accuracy:.1%}; the members' disagreement there "
        f"{near.mean().item():.4f} nats, far from all samples {away:.4f}"
    )
    if options.plot:
        draw(options.plot, together, x, y)
    if not near.mean().item() < away:
        raise SystemExit("the members agree as much where they have seen nothing")


if __name__ == "__main__":
    main()
