"""What the examples share: their text, a small transformer, a progress bar, a command line."""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten

from mlxshim.nn import value_and_grad

T = TypeVar("T")
ROOT = Path(__file__).resolve().parent.parent


# The command line ------------------------------------------------------------------------------


def parser(about: str, *, plots: bool = True) -> argparse.ArgumentParser:
    """One with --quick, --seed and, of an example that `plots`, --plot."""
    found = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument("--quick", action="store_true", help="a small size, in seconds")
    found.add_argument("--seed", type=int, default=0)
    if plots:
        found.add_argument("--plot", metavar="FILE.png", help="draw the result (needs matplotlib)")
    return found


def parse(about: argparse.ArgumentParser, **quick: Any) -> argparse.Namespace:
    """The options, the defaults those of `quick` if --quick is given; the seed is set."""
    if about.parse_known_args()[0].quick:
        about.set_defaults(**quick)
    options = about.parse_args()
    mx.random.seed(options.seed)
    return options


def track(steps: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
    """The steps, with a progress bar: rich's, tqdm's, or on a terminal without them a count."""
    if total is None:
        steps = list(steps)
        total = len(steps)
    try:
        from rich.console import Console
        from rich.progress import track as rich_track
    except ImportError:
        try:
            from tqdm import tqdm
        except ImportError:
            for i, step in enumerate(steps, 1):
                if sys.stderr.isatty():
                    print(f"\r{what} {i}/{total}", end="", file=sys.stderr)
                yield step
            return
        yield from tqdm(steps, what, total)
        return
    yield from rich_track(steps, what, total, console=Console(stderr=True))


def check(what: str, error: float, limit: float) -> None:
    """Say how far two ways to one result are apart, and end the program if they are too far."""
    print(f"{what}: largest relative error {error:.1e}")
    if not error <= limit:
        raise SystemExit(f"{what}: that is more than {limit:.0e}")


def relative_error(got: Any, want: Any) -> float:
    """The largest difference of two trees, over the largest entry."""
    pairs: Any = list(zip(tree_flatten(got), tree_flatten(want), strict=True))
    largest = max(float(mx.abs(w).max()) for _, (_, w) in pairs)
    return max(float(mx.abs(g - w).max()) for (_, g), (_, w) in pairs) / largest


def size_of(tree: Any) -> int:
    flat: Any = tree_flatten(tree)
    return sum(x.size for _, x in flat)


# The text --------------------------------------------------------------------------------------


def lines_of(*patterns: str, least: int = 30) -> list[str]:
    """Different lines of this repository's own files, in an order that is always the same."""
    files = [file for pattern in patterns for file in sorted(ROOT.glob(pattern))]
    lines = [line.strip() for file in files for line in file.read_text("utf-8").splitlines()]
    return sorted({line for line in lines if len(line) >= least})


DOCUMENTATION = ("*.md", "docs/*.md", "mlxshim/**/*.py")


def encode(lines: Iterable[str], length: int) -> mx.array:
    """(lines, length) of bytes, 0 after the end."""
    rows = [line.encode()[:length] for line in lines]
    return mx.array([list(row) + [0] * (length - len(row)) for row in rows])


def documentation(length: int, seed: int, least: int = 30) -> tuple[list[str], mx.array]:
    """This repository's own lines in a random order, and their bytes: (lines, length)."""
    lines = shuffled(lines_of(*DOCUMENTATION, least=least), seed)
    return lines, encode(lines, length)


def shuffled(items: Iterable[T], seed: int) -> list[T]:
    found = list(items)
    random.Random(seed).shuffle(found)
    return found


# The model -------------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int = 4, kv_heads: int = 1) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, dim // heads
        self.query = nn.Linear(dim, dim, bias=False)
        self.key = nn.Linear(dim, kv_heads * self.head_dim, bias=False)
        self.value = nn.Linear(dim, kv_heads * self.head_dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)
        self.rope = nn.RoPE(self.head_dim)

    def split(self, y: mx.array, heads: int) -> mx.array:
        """(batch, length, heads * head_dim) -> (batch, heads, length, head_dim)."""
        return mx.swapaxes(mx.unflatten(y, -1, (heads, self.head_dim)), 1, 2)

    def __call__(self, x: mx.array) -> mx.array:
        q = self.rope(self.split(self.query(x), self.heads))
        k = self.rope(self.split(self.key(x), self.kv_heads))
        v = self.split(self.value(x), self.kv_heads)
        scale = self.head_dim**-0.5
        y = mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask="causal")
        return self.out(mx.flatten(mx.swapaxes(y, 1, 2), -2, -1))


class Block(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.attention = Attention(dim)
        self.attention_norm, self.mlp_norm = nn.RMSNorm(dim), nn.RMSNorm(dim)
        self.gate = nn.Linear(dim, 2 * dim, bias=False)
        self.up = nn.Linear(dim, 2 * dim, bias=False)
        self.down = nn.Linear(2 * dim, dim, bias=False)

    def mlp(self, x: mx.array) -> mx.array:
        y = self.mlp_norm(x)
        return x + self.down(nn.silu(self.gate(y)) * self.up(y))

    def __call__(self, x: mx.array) -> mx.array:
        return self.mlp(x + self.attention(self.attention_norm(x)))


class Transformer(nn.Module):
    """Of bytes, decoder only: grouped-query attention (4 query heads, 1 K/V head), RMS norm, rotary
    positions, SwiGLU, the embedding as the output layer."""

    def __init__(self, dim: int, layers: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, dim)
        self.blocks = [Block(dim) for _ in range(layers)]
        self.norm = nn.RMSNorm(dim)

    def __call__(self, tokens: mx.array) -> mx.array:
        return self.logits(self.embed(tokens))

    def logits(self, x: mx.array) -> mx.array:
        for block in self.blocks:
            x = block(x)
        return self.embed.as_linear(self.norm(x))


def line_loss(model: Any, tokens: mx.array) -> mx.array:
    """The mean cross entropy of the next bytes of one line, (length,), padding left out."""
    known = (tokens[1:] != 0).astype(mx.float32)
    losses = nn.losses.cross_entropy(model(tokens[None, :-1])[0], tokens[1:])
    return (losses * known).sum() / mx.maximum(known.sum(), 1.0)


def batch_loss(model: Any, tokens: mx.array) -> mx.array:
    """The same of lines, (lines, length), all their bytes alike."""
    known = (tokens[:, 1:] != 0).astype(mx.float32)
    losses = nn.losses.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:])
    return (losses * known).sum() / known.sum()


def train(
    model: nn.Module,
    data: mx.array,
    steps: int,
    *,
    batch: int = 16,
    rate: float = 3e-3,
    what: str = "training",
) -> float:
    """Adam on random batches of `data`; the mean loss of the last steps."""
    optimizer = optim.Adam(learning_rate=optim.cosine_decay(rate, steps, rate / 10))
    gradient = value_and_grad(model, batch_loss)
    losses = []
    for _ in track(range(steps), what):
        value, grads = gradient(model, data[mx.random.randint(0, len(data), (batch,))])
        optimizer.update(model, grads)
        mx.eval(model.parameters(), optimizer.state, value)
        losses.append(value.item())
    last = losses[-min(20, steps) :]
    return sum(last) / len(last)
