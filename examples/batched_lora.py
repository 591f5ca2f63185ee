"""One base, one prompt, many adapters: a batch in which every row has its own LoRA.

    python examples/batched_lora.py [--rows 48] [--quick] [--plot batched_lora.png]

A byte-level transformer learns this repository's text and is quantized to 4 bits. Adapters for
different kinds of text are trained together, one `vmap` over adapters. Then a batch of rows goes on
from one long prompt, each row with the adapter it asks for (`per_row`): the base runs once over all
rows, and the prompt's keys and values are one array that all of them read (`prompt_attention`).

The next byte's logits are checked against a loop over the rows, each with its adapter alone and
ordinary attention over the whole sequence. That the prompt is not copied is shown by the peak of
memory: what a further row takes, beside what it takes where prompt and continuation are put
together.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from _common import (
    Transformer,
    batch_loss,
    check,
    documentation,
    encode,
    lines_of,
    parse,
    parser,
    relative_error,
    shuffled,
    track,
    train,
)
from mlx.utils import tree_map

from mlxshim import value_and_grad, vmap
from mlxshim.nn import add_lora, functional_call, per_row, prompt_attention, stack_adapters

LENGTH = 48
Cache = list[tuple[mx.array, mx.array]]  # keys and values of each layer: (kv_heads, length, dim)


class Decoder(nn.Module):
    """The next bytes of one row, after a prompt and what the row has of its own."""

    def __init__(self, model: Any, joined: bool = False) -> None:
        super().__init__()
        self.model = model
        #: Put prompt and continuation together, as one does without a shared prompt.
        self.joined = joined

    def __call__(self, tokens: mx.array, prompt: Cache, own: Cache) -> tuple[mx.array, Cache]:
        """(length,) of bytes -> the logits of the byte after them, (256,), and the row's cache."""
        x = self.model.embed(tokens)[None]
        cache = []
        for block, shared, mine in zip(self.model.blocks, prompt, own):
            attention, h = block.attention, block.attention_norm(x)
            offset = shared[0].shape[1] + mine[0].shape[1]
            q = attention.rope(attention.split(attention.query(h), attention.heads), offset)
            k = attention.rope(attention.split(attention.key(h), attention.kv_heads), offset)
            v = attention.split(attention.value(h), attention.kv_heads)
            keys, values = (mx.concatenate([old, new[0]], axis=1) for old, new in zip(mine, (k, v)))
            cache.append((keys, values))
            y = self.attend(q[0], shared, keys, values, attention.head_dim**-0.5)
            x = x + attention.out(mx.flatten(mx.swapaxes(y, 0, 1), -2, -1)[None])
            x = block.mlp(x)
        return self.model.embed.as_linear(self.model.norm(x))[0, -1], cache

    def attend(self, q: mx.array, prompt: Any, k: mx.array, v: mx.array, scale: float) -> mx.array:
        if not self.joined:
            return prompt_attention(q, prompt, k, v, scale=scale)
        whole = [mx.concatenate([p, x], axis=1)[None] for p, x in zip(prompt, (k, v))]
        fused = mx.fast.scaled_dot_product_attention
        return fused(q[None], *whole, scale=scale, mask="causal")[0]


def nothing(model: Any, rows: int | None = None) -> Cache:
    lead = () if rows is None else (rows,)
    attention = model.blocks[0].attention
    empty = mx.zeros((*lead, attention.kv_heads, 0, attention.head_dim))
    return [(empty, empty) for _ in model.blocks]


def styles(seed: int) -> dict[str, list[str]]:
    """Kinds of text, each an adapter's."""
    code = [line for line in lines_of("mlxshim/**/*.py") if line[-1:] in "):,]"]
    prose = lines_of("*.md", "docs/*.md")
    numbers = [f"{a:4} {b:6.2f} {a + b:8.2f} ok" for a in range(40) for b in (0.5, 2.25, 10.0)]
    shouted = [line.upper() for line in prose]
    kinds = {"code": code, "prose": prose, "numbers": numbers, "capitals": shouted}
    return {name: shuffled(lines, seed) for name, lines in kinds.items()}


def train_adapters(model: Any, data: list[mx.array], steps: int) -> Any:
    """One adapter for each kind of text, all of them in one batch."""
    start = model.trainable_parameters()
    adapters = stack_adapters([start for _ in data])

    def loss(adapter: Any, tokens: mx.array) -> mx.array:
        return batch_loss(lambda x: functional_call(model, adapter, x), tokens)

    gradients = vmap(value_and_grad(loss))
    optimizer = optim.Adam(learning_rate=optim.cosine_decay(3e-3, steps, 3e-4))
    for _ in track(range(steps), f"{len(data)} adapters"):
        batch = mx.stack([d[mx.random.randint(0, len(d), (8,))] for d in data])
        _, grads = gradients(adapters, batch)
        adapters = optimizer.apply_gradients(grads, adapters)
        mx.eval(adapters, optimizer.state)
    return adapters


def losses_of(model: Any, adapters: Any, tests: mx.array) -> mx.array:
    """(adapters, kinds of text): each adapter on each kind."""

    def loss(adapter: Any, tokens: mx.array) -> mx.array:
        return batch_loss(lambda x: functional_call(model, adapter, x), tokens)

    each = vmap(loss, in_axes=(None, 0))
    return vmap(each, in_axes=(0, None))(adapters, tests)


def peak(fun: Any) -> float:
    """MiB above what is there."""
    mx.eval(fun())
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(fun())
    return (mx.get_peak_memory() - before) / 2**20


def check_rows(model: Any, adapters: Any, prompt: Cache, rows: mx.array, tokens: mx.array) -> None:
    """Three bytes of each row at once, then one more with the cache."""
    call = per_row(Decoder(model), {"model": adapters}, in_axes=(0, None, 0))
    first, cache = call(rows, tokens[:, :3], prompt, nothing(model, len(rows)))
    second, _ = call(rows, tokens[:, 3:4], prompt, cache)
    alone, want = Decoder(model, joined=True), []
    for row, own in zip(rows.tolist(), tokens):
        adapter = {"model": tree_map(lambda leaf, row=row: leaf[row], adapters)}
        after = [
            functional_call(alone, adapter, own[:n], prompt, nothing(model))[0] for n in (3, 4)
        ]
        want.append(mx.stack(after))
    got = mx.stack([first, second], axis=1)
    check(f"logits of {len(rows)} rows", relative_error([got], [mx.stack(want)]), 1e-3)


def memory(
    model: Any, adapters: Any, prompt: Cache, sizes: list[int], kinds: int
) -> dict[str, list[float]]:
    """The peak of one step of decoding, by the number of rows."""
    found: dict[str, list[float]] = {}
    for name, joined in (("one prompt", False), ("put together", True)):
        call = per_row(Decoder(model, joined), {"model": adapters}, in_axes=(0, None, 0))
        found[name] = []
        for size in track(sizes, f"memory, {name}"):
            rows, tokens = mx.arange(size) % kinds, mx.full((size, 1), 97)
            empty = nothing(model, size)
            mx.eval(rows, tokens, empty)
            step = lambda c=call, r=rows, t=tokens, e=empty: c(r, t, prompt, e)[0]  # noqa: E731
            found[name].append(peak(step))
    return found


def generate(model: Any, adapters: Any, prompt: Cache, rows: mx.array, count: int) -> list[str]:
    call = per_row(Decoder(model), {"model": adapters}, in_axes=(0, None, 0))
    tokens, cache = mx.full((len(rows), 1), ord("\n")), nothing(model, len(rows))
    out = []
    for _ in track(range(count), "decoding"):
        logits, cache = call(rows, tokens, prompt, cache)
        tokens = mx.random.categorical(logits / 0.5)[:, None]
        mx.eval(tokens, cache)
        out.append(tokens)
    text = mx.concatenate(out, axis=1).tolist()
    return [bytes(row).decode("latin-1") for row in text]


def draw(path: str, table: mx.array, names: list[str], sizes: list[int], found: Any) -> None:
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
    image = left.imshow(table, cmap="viridis_r")
    for i in range(len(names)):
        for j in range(len(names)):
            left.text(j, i, f"{table[i, j].item():.2f}", ha="center", va="center", color="w")
    left.set(xlabel="text", ylabel="adapter", title="loss, nats a byte")
    left.set_xticks(range(len(names)), names)
    left.set_yticks(range(len(names)), names)
    figure.colorbar(image, ax=left)
    for name, values in found.items():
        right.plot(sizes, values, "o-", label=name)
    right.set(xlabel="rows", ylabel="peak, MiB", title="a step of decoding", ylim=(0, None))
    right.legend()
    figure.savefig(path, dpi=90)


def main() -> None:
    about = parser(__doc__)
    about.add_argument("--rows", type=int, default=48)
    about.add_argument("--prompt", type=int, default=2048, help="bytes of the shared prompt")
    about.add_argument("--steps", type=int, default=120)
    about.add_argument("--rank", type=int, default=4)
    options = parse(about, rows=16, steps=5)
    base_steps, layers, count = (10, 1, 8) if options.quick else (200, 2, 48)

    model: Any = Transformer(64, layers)
    kinds = styles(options.seed)
    _, public = documentation(LENGTH, options.seed)
    loss = train(model, public, base_steps, what="base")
    nn.quantize(model, group_size=32, bits=4)
    add_lora(model, options.rank)
    data = [encode(lines, LENGTH) for lines in kinds.values()]
    tests = mx.stack([d[:8] for d in data])
    base = losses_of(model, stack_adapters([model.trainable_parameters()]), tests)[0]
    adapters = train_adapters(model, [d[8:] for d in data], options.steps)
    table = losses_of(model, adapters, tests)
    print(f"the base, in 4 bits, has learned: loss {loss:.2f}; on held-back lines of each kind")
    for i, name in enumerate(kinds):
        best = table[:, i].min().item() == table[i, i].item()
        print(
            f"  {name:<9} base {base[i].item():.2f}, its adapter {table[i, i].item():.2f}"
            f"{', the best of all adapters' if best else ''}"
        )

    text = "\n".join(lines_of("*.md", "docs/*.md")).encode()[: options.prompt]
    prompt = Decoder(model)(mx.array(list(text)), nothing(model), nothing(model))[1]
    mx.eval(prompt)
    rows = mx.arange(options.rows) % len(kinds)
    check_rows(model, adapters, prompt, rows[:8], mx.random.randint(32, 127, (8, 4)))

    sizes = [options.rows * n // 4 for n in (1, 2, 3, 4)]
    found = memory(model, adapters, prompt, sizes, len(kinds))
    held = sum(x.nbytes for pair in prompt for x in pair) / 1024
    print(
        f"keys and values of the prompt of {len(text)} bytes: {held:.0f} KiB. A further row takes"
    )
    for name, values in found.items():
        each = (values[-1] - values[0]) / (sizes[-1] - sizes[0]) * 1024
        print(f"  {name:<13} {each:7.1f} KiB")
    written = generate(model, adapters, prompt, mx.arange(len(kinds)), count)
    for name, line in zip(kinds, written):
        print(f"  {name:<9} {line!r}")
    if options.plot:
        draw(options.plot, table, list(kinds), sizes, found)
    apart, together = found["one prompt"], found["put together"]
    if not apart[-1] < together[-1] / 2:
        raise SystemExit("the prompt was copied")


if __name__ == "__main__":
    main()
