"""DP-SGD on several processes: each has its share of the samples, all take the same step.

    mlx.launch -n 2 --python python3 examples/private_training_on_ranks.py
    python examples/private_training_on_ranks.py          # one process: all samples

Two interleaved spirals, a small network. In every step each process draws a Poisson batch of its
own samples, clips their gradients (`clipped_grad`) and adds them up with those of the others
(`across_ranks`); then all add the same noise. A process that fails ends the step on all of them.
On GPUs the command is the same with `--backend nccl`.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from _common import parse, parser
from mlx.utils import tree_flatten, tree_map

from mlxshim.nn import across_ranks, clipped_grad
from mlxshim.nn.privacy import noisy, poisson_batches


def spirals(count: int) -> tuple[mx.array, mx.array]:
    labels = mx.arange(count) % 2
    t = 0.5 + 2.5 * mx.random.uniform(shape=(count,))
    angle = 2.0 * t + 3.1416 * labels
    points = mx.stack([t * mx.cos(angle), t * mx.sin(angle)], axis=1)
    return points + 0.1 * mx.random.normal(points.shape), labels


def loss_fn(model: nn.Module, x: mx.array, y: mx.array, present: mx.array) -> mx.array:
    return present * nn.losses.cross_entropy(model(x), y)


def main() -> None:
    about = parser(__doc__, plots=False)
    about.add_argument("--samples", type=int, default=4096)
    about.add_argument("--steps", type=int, default=200)
    about.add_argument("--rate", type=float, default=0.0625)
    about.add_argument("--noise", type=float, default=1.0)
    options = parse(about, samples=256, steps=3)  # the same model and samples everywhere

    group = mx.distributed.init()
    x, y = spirals(options.samples)
    model: Any = nn.Sequential(
        nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 2)
    )
    optimizer = optim.Adam(learning_rate=0.01)
    max_norm, expected = 1.0, options.rate * options.samples

    mine = slice(group.rank(), None, group.size())
    own_x, own_y = x[mine], y[mine]
    batches = poisson_batches(
        len(own_x), options.rate, options.steps, key=mx.random.key(group.rank()), multiple=32
    )
    step = across_ranks(
        clipped_grad(model, loss_fn, max_norm), ("samples", "sum", "samples"), group
    )
    noise_key = mx.random.key(1000)  # all ranks add the same noise
    for number, (indices, present) in enumerate(batches):
        losses, grads, norms = step(model, own_x[indices], own_y[indices], present)
        noise_key, key = mx.random.split(noise_key)
        grads = noisy(grads, options.noise * max_norm, key)
        optimizer.update(model, tree_map(lambda g: g / expected, grads))
        mx.eval(model.parameters())
        if group.rank() == 0 and number % 50 == 0:
            there, clipped = int((norms > 0).sum()), int((norms > max_norm).sum())
            loss = float(losses.sum()) / max(there, 1)
            print(f"step {number:4d}  loss {loss:.3f}  {there} samples, {clipped} clipped")
    accuracy = float((mx.argmax(model(x), axis=1) == y).mean())
    total = sum(float(p.sum()) for _, p in tree_flatten(model.parameters()))
    totals = mx.distributed.all_gather(mx.array([total]), group=group).tolist()
    if group.rank() == 0:
        agreed = max(totals) == min(totals)
        print(f"accuracy {accuracy:.3f}; {group.size()} ranks with the same parameters: {agreed}")
        try:
            from mlxshim.nn.privacy import epsilon

            spent = epsilon(options.noise, options.rate, options.steps, 1e-5)
            print(f"({spent:.2f}, 1e-5)-differentially private")
        except ImportError as error:
            print(error)


if __name__ == "__main__":
    main()
