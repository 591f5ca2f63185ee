"""What training will do, told beforehand: the empirical neural tangent kernel.

    python examples/empirical_ntk.py [--quick] [--plot empirical_ntk.png]

Networks of growing width are trained by gradient descent on a few points of a circle. Before the
first step, `empirical_ntk` gives the kernel K of the untrained network: products of the Jacobians
of pairs of points. A network that is wide enough stays close to its linearization, whose outputs
after t steps of gradient descent of rate r are known (Jacot et al. 2018; Lee et al. 2019):

    f_t(x) = f_0(x) - K(x, X) K(X, X)^-1 (1 - (1 - r K(X, X))^t) (f_0(X) - y)

The kernel is checked against Jacobians one point at a time. The result is how far the prediction is
from the trained network: the wider, the nearer.
"""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from _common import check, parse, parser, relative_error, track
from mlx.utils import tree_flatten, tree_map

from mlxshim.nn import empirical_ntk, value_and_grad


class Wide(nn.Module):
    """Two hidden layers, each weight with variance one and its layer scaled instead."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.a = mx.random.normal((2, width))
        self.b = mx.random.normal((width, width))
        self.c = mx.random.normal((width, 1))

    def __call__(self, x: mx.array) -> mx.array:
        scale = 1 / math.sqrt(self.b.shape[0])
        h = mx.maximum(x @ self.a, 0.0)
        h = math.sqrt(2) * scale * mx.maximum(h @ self.b * math.sqrt(2) * scale, 0.0)
        return (h @ self.c)[..., 0]


def circle(angles: mx.array) -> mx.array:
    return mx.stack([mx.cos(angles), mx.sin(angles)], axis=1)


def target(angles: mx.array) -> mx.array:
    return mx.sin(2 * angles) + 0.5 * mx.cos(5 * angles)


def trained(model: Any, x: mx.array, y: mx.array, rate: float, steps: int) -> list[float]:
    """By gradient descent of the half of the summed squares."""
    gradient = value_and_grad(model, lambda model: 0.5 * (model(x) - y).square().sum())
    losses = []
    for _ in track(range(steps), f"width {model.b.shape[0]}"):
        value, grads = gradient(model)
        model.update(tree_map(lambda p, g: p - rate * g, model.parameters(), grads))
        mx.eval(model.parameters())
        losses.append(value.item())
    return losses


def predicted(
    kernel: mx.array, across: mx.array, start: tuple[mx.array, mx.array], y: mx.array,
    rate: float, steps: int,
) -> mx.array:  # fmt: skip
    """The linearized network after so many steps."""
    values, vectors = mx.linalg.eigh(kernel, stream=mx.cpu)
    values = mx.maximum(values, 1e-6)
    shrunk = (1 - (1 - rate * values) ** steps) / values
    at_data, elsewhere = start
    return elsewhere - across @ (vectors @ (shrunk * (vectors.T @ (at_data - y))))


def check_kernel(model: Any, x: mx.array) -> None:
    one = value_and_grad(model, lambda model, x: model(x))
    rows = [mx.concatenate([g.reshape(-1) for _, g in tree_flatten(one(model, a)[1])]) for a in x]
    want = mx.stack(rows) @ mx.stack(rows).T
    check(f"kernel of {len(x)} points", relative_error([empirical_ntk(model, x)], [want]), 1e-4)


def draw(path: str, angles: mx.array, data: Any, found: dict[int, Any], kernel: mx.array) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        1, 1 + len(found), figsize=(3.1 * (1 + len(found)), 3), layout="constrained"
    )
    image = axes[0].imshow(kernel, cmap="magma")
    axes[0].set(title="kernel of the widest", xlabel="point", ylabel="point")
    figure.colorbar(image, ax=axes[0], shrink=0.8)
    for axis, (width, (start, after, told, error)) in zip(axes[1:], found.items()):
        axis.plot(angles, start, color="tab:gray", lw=0.8, label="untrained")
        axis.plot(angles, after, color="tab:blue", label="trained")
        axis.plot(angles, told, "--", color="tab:orange", label="told by the kernel")
        axis.plot(*data, ".", color="k")
        axis.set(title=f"width {width}: {error:.1%} apart", xlabel="angle", ylim=(-2.2, 2.2))
    axes[1].legend(fontsize=7)
    figure.savefig(path, dpi=90)


def main() -> None:
    about = parser(__doc__)
    about.add_argument("--points", type=int, default=16)
    about.add_argument("--steps", type=int, default=400)
    about.add_argument("--widths", type=int, nargs="+", default=[32, 256, 1024])
    options = parse(about, steps=60, widths=[16, 256])

    angles = mx.sort(mx.random.uniform(-math.pi, math.pi, (options.points,)))
    grid = mx.linspace(-math.pi, math.pi, 100)
    x, y, everywhere = circle(angles), target(angles), circle(grid)
    found: dict[int, Any] = {}
    for width in options.widths:
        model: Any = Wide(width)
        if not found:
            check_kernel(model, x)
        kernel = empirical_ntk(model, x)
        across = empirical_ntk(model, everywhere, x, chunk_size=25)
        start = model(x), model(everywhere)
        mx.eval(kernel, across, start)
        largest = float(mx.linalg.eigvalsh(kernel, stream=mx.cpu)[-1])
        rate = 1 / largest
        told = predicted(kernel, across, start, y, rate, options.steps)
        losses = trained(model, x, y, rate, options.steps)
        after = model(everywhere)
        moved = mx.linalg.norm(after - start[1]).item()
        error = mx.linalg.norm(after - told).item() / moved
        found[width] = start[1], after, told, error
        print(
            f"width {width:>4}: loss {losses[0]:.2f} before, {losses[-1]:.4f} after "
            f"{options.steps} steps; the kernel told the change to within {error:.1%}"
        )
    errors = [row[-1] for row in found.values()]
    print(f"the wider, the nearer: {errors == sorted(errors, reverse=True)}")
    if options.plot:
        draw(options.plot, grid, (angles, y), found, kernel)
    if errors[-1] > min(0.2, errors[0]):
        raise SystemExit("the kernel did not tell what training does")


if __name__ == "__main__":
    main()
