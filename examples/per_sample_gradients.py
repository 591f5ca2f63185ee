"""Per-sample gradients of a transformer, and what they say about its training data.

    python examples/per_sample_gradients.py [--quick] [--sentence "..."]

A byte-level transformer with grouped-query attention (4 query heads to 1 K/V head, RMSNorm, RoPE,
SwiGLU) learns this repository's own documentation. Then the gradient of the loss of each line,
through `vmap(grad)`, is checked against the loop, timed against it, and compared with the gradient
of a given sentence: the lines that pull the parameters the same way are its nearest neighbours as
the model sees them (Pruthi et al., "TracIn", 2020).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import mlx.core as mx
from _common import (
    Transformer,
    check,
    documentation,
    encode,
    line_loss,
    parse,
    parser,
    relative_error,
    size_of,
    track,
    train,
)

from mlxshim import grad, tree_leaves, vmap
from mlxshim.nn import functional_call


def median_ms(fun: Callable[[], Any], repeats: int = 5) -> float:
    mx.eval(fun())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        mx.eval(fun())
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


def flat(gradients: Any, samples: int) -> mx.array:
    """One row for each sample."""
    return mx.concatenate([g.reshape(samples, -1) for g in tree_leaves(gradients)], axis=1)


def main() -> None:
    about = parser(__doc__, plots=False)
    about.add_argument("--steps", type=int, default=1000)
    about.add_argument("--samples", type=int, default=32, help="lines at a time")
    about.add_argument("--dim", type=int, default=64)
    about.add_argument("--layers", type=int, default=3)
    about.add_argument("--length", type=int, default=80)
    about.add_argument("--lines", type=int, help="compare so many, not all")
    about.add_argument(
        "--sentence", default="A batching rule folds the mapped axis into the batch."
    )
    options = parse(about, steps=20, samples=4, dim=32, lines=200)

    lines, data = documentation(options.length, options.seed)
    model = Transformer(options.dim, options.layers)
    print(f"{len(lines)} lines of documentation, {size_of(model.parameters())} parameters")
    print(f"trained: loss {train(model, data, options.steps):.3f}")

    def loss(parameters: Any, tokens: mx.array) -> mx.array:
        return line_loss(lambda x: functional_call(model, parameters, x), tokens)

    parameters: Any = model.parameters()
    one, per_sample = mx.grad(loss), vmap(grad(loss), in_axes=(None, 0))
    batch = data[: options.samples]

    def loop() -> mx.array:
        return mx.concatenate([flat(one(parameters, tokens), 1) for tokens in batch])

    def mapped() -> mx.array:
        return flat(per_sample(parameters, batch), len(batch))

    error = relative_error(mapped(), loop())
    check(f"per-sample gradients of {len(batch)} lines", error, 1e-4)
    ours, theirs = median_ms(mapped), median_ms(loop)
    print(f"vmap(grad) {ours:.1f} ms, loop {theirs:.1f} ms: {theirs / ours:.2f}x")

    lines = lines[: options.lines]
    query = flat(one(parameters, encode([options.sentence], options.length)[0]), 1)
    similar = []
    for i in track(range(0, len(lines), options.samples), "gradients of every line"):
        chunk = data[i : i + options.samples]
        rows = flat(per_sample(parameters, chunk), len(chunk))
        norms = mx.linalg.norm(rows, axis=1) * mx.linalg.norm(query)
        similar += ((rows @ query[0]) / norms).tolist()
    print(f"\nthe lines whose gradients align most with that of:\n    {options.sentence}")
    for cosine, line in sorted(zip(similar, lines), reverse=True)[:8]:
        print(f"  {cosine:+.3f}  {line[:90]}")


if __name__ == "__main__":
    main()
