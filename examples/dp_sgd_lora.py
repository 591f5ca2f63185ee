"""DP-SGD: a 4-bit model learns private records through LoRA, and promises not to tell on anybody.

    python examples/dp_sgd_lora.py [--epsilon 8] [--quick] [--plot dp_sgd_lora.png]

A byte-level transformer learns this repository's documentation, which is public, and is quantized
to 4 bits. Then low-rank adapters learn made-up records of patients, one a line, which are private:
each step takes every record with the same probability, clips the gradient of each record to a
norm, adds them up and adds noise (Abadi et al. 2016). `clipped_grad` does so without holding the
gradients; one step of it is checked against a loop. Google's dp-accounting says how much noise the
wanted epsilon takes, and what has been spent after each step.

The result is the loss on records that nobody trained on, beside that of the same steps without
noise.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
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
from mlx.utils import tree_map

from mlxshim import tree_leaves
from mlxshim.nn import add_lora, clipped_grad, value_and_grad
from mlxshim.nn.privacy import epsilon, noise_multiplier_for, poisson_batches, private_grad

LENGTH = 48


def records(count: int) -> mx.array:
    """Lines such as `id 4711 age 62 pulse 084 temp 36.9 ward B result negative`."""

    def draw(low: int, high: int) -> Any:
        return mx.random.randint(low, high, (count,)).tolist()

    columns = zip(
        draw(1000, 10000), draw(18, 95), draw(50, 120), draw(355, 400), draw(0, 4), draw(0, 8)
    )
    lines = [
        f"id {number} age {age} pulse {pulse:03} temp {temperature / 10} ward {'ABCD'[ward]} "
        f"{'positive' if result == 0 else 'negative'}"
        for number, age, pulse, temperature, ward, result in columns
    ]
    return encode(lines, LENGTH)


def loss_fn(model: Any, tokens: mx.array, present: mx.array) -> mx.array:
    """Of one record; nothing where the batch is padded."""
    return present * line_loss(model, tokens)


def mean_loss(model: Any, data: mx.array) -> float:
    known = (data[:, 1:] != 0).astype(mx.float32)
    losses = nn.losses.cross_entropy(model(data[:, :-1]), data[:, 1:]) * known
    return float((losses.sum(axis=1) / known.sum(axis=1)).mean())


def check_against_loop(model: Any, data: mx.array, max_norm: float) -> None:
    """The clipped sum of some records, and the same by MLX's gradient of one after the other."""
    total: Any = None
    one = value_and_grad(model, line_loss)
    for tokens in data:
        grads = one(model, tokens)[1]
        norm = mx.sqrt(sum(g.square().sum() for g in tree_leaves(grads)))
        factor = max_norm / mx.maximum(norm, max_norm)
        grads = tree_map(lambda g, factor=factor: g * factor, grads)
        total = grads if total is None else tree_map(mx.add, total, grads)
    got = clipped_grad(model, line_loss, max_norm)(model, data)[1]
    check(f"clipped gradients of {len(data)} records", relative_error(got, total), 1e-4)


def fine_tune(
    model: Any, data: mx.array, held_out: mx.array, options: Any, noise: float, what: str
) -> dict[int, float]:
    """The loss on held-out records, by the step."""
    expected = options.rate * len(data)
    step = private_grad(model, loss_fn, options.max_norm, noise, expected)
    optimizer = optim.Adam(learning_rate=options.learning_rate)
    batches = poisson_batches(
        len(data), options.rate, options.steps, key=mx.random.key(options.seed), multiple=32
    )
    key = mx.random.key(options.seed + 1)
    found = {0: mean_loss(model, held_out)}
    for number, (indices, present) in enumerate(track(batches, what, options.steps), 1):
        key, own = mx.random.split(key)
        grads = step(model, data[indices], present, key=own)[1]
        optimizer.update(model, grads)
        mx.eval(model.trainable_parameters(), optimizer.state)
        if number % 5 == 0 or number == options.steps:
            found[number] = mean_loss(model, held_out)
    return found


def draw(
    path: str, private: dict[int, float], plain: dict[int, float], spent: dict[int, float]
) -> None:
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 3.6), layout="constrained")
    axis.plot(list(plain), list(plain.values()), color="tab:gray", label="loss without noise")
    axis.plot(list(private), list(private.values()), color="tab:blue", label="loss with DP-SGD")
    axis.set(xlabel="step", ylabel="loss of held-out records, nats a byte", ylim=(0, None))
    axis.legend(loc="upper right")
    if spent:
        other = axis.twinx()
        other.plot(*zip(*sorted(spent.items())), "o-", ms=3, color="tab:red")
        other.set_ylim(0, None)
        other.set_ylabel("epsilon spent", color="tab:red")
    axis.set_title("LoRA of a 4-bit model on private records")
    figure.savefig(path, dpi=100)


def main() -> None:
    about = parser(__doc__)
    about.add_argument("--epsilon", type=float, default=8.0, help="the promise, with --delta")
    about.add_argument("--delta", type=float, default=1e-5)
    about.add_argument("--max-norm", type=float, default=0.5)
    about.add_argument("--rate", type=float, default=0.02, help="of a record to be in a batch")
    about.add_argument("--steps", type=int, default=60)
    about.add_argument("--learning-rate", type=float, default=5e-3)
    about.add_argument("--rank", type=int, default=4)
    options = parse(about, steps=3, epsilon=1.0)
    size, pretraining, layers = (1000, 5, 1) if options.quick else (3000, 150, 2)

    model: Any = Transformer(64, layers)
    _, public = documentation(80, options.seed)
    loss = train(model, public, pretraining, what="public text")
    whole = size_of(model.parameters())
    nn.quantize(model, group_size=32, bits=4)
    add_lora(model, options.rank)
    adapters = model.trainable_parameters()
    print(
        f"a transformer of {whole} parameters, loss {loss:.2f} on public text, now in 4 bits; "
        f"{size_of(adapters)} parameters in its adapters"
    )
    data, held_out = records(size), records(64)
    check_against_loop(model, data[:8], options.max_norm)

    spent: dict[int, float] = {}
    noise = 1.0
    try:
        noise = noise_multiplier_for(options.epsilon, options.rate, options.steps, options.delta)
        every = options.steps if options.quick else max(1, options.steps // 6)
        for step in track(range(options.steps, 0, -every), "accounting"):
            spent[step] = epsilon(noise, options.rate, step, options.delta)
    except ImportError as error:
        print(f"{error} Without it nothing is known of epsilon.")
    promise = ", ".join(f"{e:.2f} after {step} steps" for step, e in sorted(spent.items()))
    print(f"noise of {noise:.3f} times the clipping norm; epsilon {promise or 'unknown'}")

    plain = fine_tune(model, data, held_out, options, 0.0, "without noise")
    model.update(adapters)
    private = fine_tune(model, data, held_out, options, noise, "DP-SGD")
    print(
        f"loss of records that nobody trained on: {private[0]:.3f} before, "
        f"{private[options.steps]:.3f} with DP-SGD, {plain[options.steps]:.3f} without noise"
    )
    if options.plot:
        draw(options.plot, private, plain, spent)


if __name__ == "__main__":
    main()
