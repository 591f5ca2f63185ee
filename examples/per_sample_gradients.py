"""Per-sample gradients of a transformer, and what they say about its training data.

    python examples/per_sample_gradients.py [--seconds 60] [--sentence "..."]

A byte-level transformer with grouped-query attention (4 query heads to 1 K/V head, RMSNorm, RoPE,
SwiGLU) learns this repository's own documentation for a minute. Then the gradient of the loss of
each line, through `vmap(grad)`, is checked against the loop, timed against it, and compared with
the gradient of a given sentence: the lines that pull the parameters the same way are its nearest
neighbours as the model sees them (Pruthi et al., "TracIn", 2020).
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
from _common import DOCUMENTATION, Transformer, encode, line_loss, lines_of
from mlx.utils import tree_flatten

from mlxshim import grad, value_and_grad, vmap


def make_loss(model: Transformer) -> Callable[[Any, mx.array], mx.array]:
    """The loss of one line, its parameters an argument."""

    def loss(parameters: Any, tokens: mx.array) -> mx.array:
        model.update(parameters)
        return line_loss(model, tokens)

    return loss


def progress(seconds: float, step: Callable[[], float]) -> None:
    """Call `step` for so many seconds, with a bar: rich's if it is installed."""
    try:
        from rich.progress import Progress
    except ImportError:
        for done, value in _until(seconds, step):
            if sys.stderr.isatty():
                print(f"\rtraining {done:4.0%}  loss {value:.3f}", end="", file=sys.stderr)
        print(f"\ntrained: loss {value:.3f}")
        return
    with Progress() as bar:
        task = bar.add_task("training", total=1.0)
        for done, value in _until(seconds, step):
            bar.update(task, completed=done, description=f"training, loss {value:.3f}")
    print(f"trained: loss {value:.3f}")


def _until(seconds: float, step: Callable[[], float]) -> Iterator[tuple[float, float]]:
    start = time.perf_counter()
    done = 0.0
    while done < 1.0:
        value = step()
        done = min(1.0, (time.perf_counter() - start) / seconds)
        yield done, value


def train(model: Transformer, data: mx.array, seconds: float) -> None:
    loss = make_loss(model)
    optimizer = optim.AdamW(learning_rate=2e-3)

    def batch_loss(parameters: Any, batch: mx.array) -> mx.array:
        return vmap(loss, in_axes=(None, 0))(parameters, batch).mean()

    step_gradient = value_and_grad(batch_loss)

    def step() -> float:
        batch = data[mx.random.randint(0, data.shape[0], (16,))]
        parameters = model.trainable_parameters()
        value, grads = step_gradient(parameters, batch)
        model.update(optimizer.apply_gradients(grads, parameters))
        mx.eval(model.parameters(), optimizer.state, value)
        return value.item()

    progress(seconds, step)


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
    return mx.concatenate([g.reshape(samples, -1) for _, g in tree_flatten(gradients)], axis=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--length", type=int, default=80)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--sentence", default="A batching rule folds the mapped axis into the batch."
    )
    options = parser.parse_args()
    mx.random.seed(options.seed)

    lines = lines_of(*DOCUMENTATION)
    data = encode(lines, options.length)
    model = Transformer(options.dim, options.layers)
    count = sum(p.size for _, p in tree_flatten(model.parameters()))
    print(f"{len(lines)} lines of documentation, {count} parameters")
    train(model, data, options.seconds)

    loss, parameters = make_loss(model), model.trainable_parameters()
    per_sample = vmap(grad(loss), in_axes=(None, 0))
    one = mx.grad(loss)
    batch = data[: options.samples]

    def loop() -> mx.array:
        rows = [flat(one(parameters, tokens), 1) for tokens in batch]
        return mx.concatenate(rows)

    def mapped() -> mx.array:
        return flat(per_sample(parameters, batch), len(batch))

    got, want = mapped(), loop()
    error = (mx.abs(got - want).max() / mx.abs(want).max()).item()
    print(f"per-sample gradients of {len(batch)} lines: largest relative error {error:.1e}")
    if not error < 1e-4:
        raise SystemExit("vmap(grad) does not equal the loop")
    ours, theirs = median_ms(mapped), median_ms(loop)
    print(f"vmap(grad) {ours:.1f} ms, loop {theirs:.1f} ms: {theirs / ours:.2f}x")

    query = flat(one(parameters, encode([options.sentence], options.length)[0]), 1)
    similar = []
    for i in range(0, len(lines), options.samples):
        chunk = data[i : i + options.samples]
        rows = flat(per_sample(parameters, chunk), len(chunk))
        norms = mx.linalg.norm(rows, axis=1) * mx.linalg.norm(query)
        similar += ((rows @ query[0]) / norms).tolist()
    model.update(parameters)
    print(f"\nthe lines whose gradients align most with that of:\n    {options.sentence}")
    for cosine, line in sorted(zip(similar, lines), reverse=True)[:8]:
        print(f"  {cosine:+.3f}  {line[:90]}")


if __name__ == "__main__":
    main()
