"""What a transformer looks at, and how sharp each line is: Jacobians and Hessian products.

    python examples/transformer_jacobians.py [--quick] [--plot transformer_jacobians.png]

A byte-level transformer learns this repository's documentation. Then, for a batch of lines at once:

* the Jacobian of the next byte's logits with respect to every byte's embedding, `vmap(jacrev)`, a
  matrix for each position of each line, whose norm says how much the prediction hangs on it;
* the largest eigenvalue of the Hessian of each line's loss with respect to all parameters, by power
  iteration with Hessian products, `vmap(hvp)`: how sharp the minimum is for that line.

Both are checked against one line at a time, the Hessian products also for symmetry.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from _common import (
    Transformer,
    check,
    documentation,
    line_loss,
    parse,
    parser,
    relative_error,
    track,
    train,
)
from mlx.utils import tree_flatten, tree_map

from mlxshim import hvp, jacrev, vmap
from mlxshim.nn import functional_call


def dot(a: Any, b: Any) -> mx.array:
    return sum((x * y).sum() for (_, x), (_, y) in zip(tree_flatten(a), tree_flatten(b)))


def scaled(tree: Any) -> Any:
    norm = mx.sqrt(dot(tree, tree))
    return tree_map(lambda x: x / norm, tree)


def sensitivity(model: Any, tokens: mx.array, outputs: int) -> mx.array:
    """(lines, length): the norm of the Jacobian of the last `outputs` largest logits."""

    def last(embedded: mx.array) -> mx.array:
        return mx.sort(model.logits(embedded[None])[0, -1])[-outputs:]

    embedded = model.embed(tokens)
    jacobians = vmap(jacrev(last))(embedded)  # (lines, outputs, length, dim)
    one = jacrev(last)(embedded[0])
    check("Jacobians", relative_error([jacobians[0]], [one]), 1e-3)
    return mx.sqrt(jacobians.square().sum(axis=(1, 3)))


def sharpness(model: Any, lines: mx.array, iterations: int) -> mx.array:
    """(lines,): the eigenvalue of each Hessian that is largest in size."""
    parameters = model.trainable_parameters()

    def product(line: mx.array, vector: Any) -> Any:
        """The Hessian of the loss of one line, times a vector."""

        def loss(parameters: Any) -> mx.array:
            return line_loss(lambda tokens: functional_call(model, parameters, tokens), line)

        return hvp(loss, parameters, vector)[1]

    def step(line: mx.array, vector: Any) -> tuple[mx.array, Any]:
        found = product(line, vector)
        return dot(vector, found), scaled(found)

    def draw() -> Any:
        return tree_map(lambda p: mx.random.normal((len(lines), *p.shape)), parameters)

    vectors = vmap(scaled)(draw())
    check_products(product, lines, vectors, vmap(scaled)(draw()))
    values = mx.zeros((len(lines),))
    for _ in track(range(iterations), "power iteration"):
        values, vectors = vmap(step)(lines, vectors)
        mx.eval(values, vectors)
    return values


def check_products(product: Any, lines: mx.array, vectors: Any, others: Any) -> None:
    products, back = vmap(product)(lines, vectors), vmap(product)(lines, others)
    one = product(lines[0], tree_map(lambda x: x[0], vectors))
    check("Hessian products", relative_error(tree_map(lambda x: x[0], products), one), 1e-3)
    left, right = vmap(dot)(others, products), vmap(dot)(vectors, back)
    check("their symmetry", relative_error([left], [right]), 1e-2)


def draw(path: str, looks: mx.array, lines: list[str], sharp: mx.array, losses: mx.array) -> None:
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(
        1, 2, figsize=(10, 3.6), layout="tight", width_ratios=(3, 1)
    )
    shown = min(12, len(lines))
    relative = looks[:shown] / looks[:shown].max(axis=1, keepdims=True)
    left.imshow(relative, aspect="auto", cmap="Blues", vmax=1.2)
    for row, line in enumerate(lines[:shown]):
        for column, letter in enumerate(line[: looks.shape[1]]):
            left.text(column, row, letter, ha="center", va="center", fontsize=7, family="monospace")
    left.set(title="what the next byte hangs on: norm of the Jacobian", xticks=[], yticks=[])
    right.scatter(losses, sharp, s=14)
    right.set(xlabel="loss of the line", ylabel="largest eigenvalue of its Hessian")
    right.set_title("sharpness")
    figure.savefig(path, dpi=90)


def main() -> None:
    about = parser(__doc__)
    about.add_argument("--steps", type=int, default=200)
    about.add_argument("--lines", type=int, default=16)
    about.add_argument("--length", type=int, default=48)
    about.add_argument("--iterations", type=int, default=12)
    options = parse(about, steps=20, lines=4, iterations=3)
    dim, layers = (32, 1) if options.quick else (48, 2)

    text, data = documentation(options.length, options.seed, least=options.length)
    model = Transformer(dim, layers)
    loss = train(model, data, options.steps)
    print(f"{len(text)} lines, loss {loss:.2f} nats a byte")

    lines = data[: options.lines]
    looks = sensitivity(model, lines, 8)
    share = looks / looks.sum(axis=1, keepdims=True)
    print(
        f"the last 8 of {options.length} bytes have {share[:, -8:].sum(axis=1).mean().item():.0%}"
        " of the influence on the next one"
    )

    sharp = sharpness(model, lines, options.iterations)
    losses = mx.stack([line_loss(model, line) for line in lines])
    order = mx.argsort(-mx.abs(sharp)).tolist()
    for place, i in (("sharpest", order[0]), ("flattest", order[-1])):
        found = f"eigenvalue {sharp[i].item():8.2f}, loss {losses[i].item():.2f}"
        print(f"{place}: {found}  {text[i][:60]}")
    if options.plot:
        draw(options.plot, looks, text, sharp, losses)


if __name__ == "__main__":
    main()
