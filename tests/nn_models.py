"""Small models that the tests of `mlxshim.nn` share."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten


class Mixed(nn.Module):
    """Everything at once: tied embeddings, a layer used twice, norms, low-rank arrays by hand."""

    def __init__(self, vocabulary=11, dim=8, frozen=True):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, dim)
        self.layers = [nn.Linear(dim, dim) for _ in range(2)]
        self.norm, self.layer_norm = nn.RMSNorm(dim), nn.LayerNorm(dim)
        self.last = nn.Linear(dim, dim, bias=False)
        if frozen:
            self.last.freeze()
        self.a, self.b = mx.random.normal((dim, 3)), mx.random.normal((3, dim))

    def __call__(self, ids):
        h = self.embed(ids)
        for layer in [*self.layers, self.layers[0]]:
            h = h + nn.silu(layer(self.norm(h)))
        h = self.layer_norm(self.last(h) + (h @ self.a) @ self.b)
        return self.embed.as_linear(h)


class LoRA(nn.Module):
    """A 4-bit base with trained low-rank arrays, as mlx-lm's LoRALinear."""

    def __init__(self, dim=64, rank=4):
        super().__init__()
        self.linear = nn.QuantizedLinear.from_linear(nn.Linear(dim, dim, bias=False), 32, 4)
        self.lora_a = mx.random.normal((dim, rank)) * 0.1
        self.lora_b = mx.random.normal((rank, dim)) * 0.1

    def __call__(self, x):
        return self.linear(x) + 2.0 * ((x @ self.lora_a) @ self.lora_b)


class Convolutional(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.out = nn.Conv1d(4, 6, 3), nn.Linear(6, 2)

    def __call__(self, x):
        return self.out(mx.tanh(self.conv(x)).mean(axis=-2))


def cross_entropy(model, x, y):
    return nn.losses.cross_entropy(model(x), y, reduction="mean")


def squares(model, x, y):
    return (model(x) - y).square().sum()


def mixed_case(samples=5, rows=7, **options):
    ids = mx.random.randint(0, 11, (samples, rows))
    return Mixed(**options), cross_entropy, (ids, mx.random.randint(0, 11, ids.shape))


def lora_case(samples=4):
    x = mx.random.normal((samples, 3, 64))
    return LoRA(), squares, (x, mx.random.normal(x.shape))


def dense_case(samples=6):
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 2))
    return model, squares, (mx.random.normal((samples, 5)), mx.random.normal((samples, 2)))


def convolutional_case(samples=4):
    data = (mx.random.normal((samples, 1, 9, 4)), mx.random.normal((samples, 1, 2)))
    return Convolutional(), squares, data


CASES = {
    "mixed": mixed_case,
    "lora": lora_case,
    "dense": dense_case,
    "convolutional": convolutional_case,
}


def loop(model, loss, data):
    """(losses, gradients) by MLX's own nn.value_and_grad, sample by sample."""
    parameters, found = model.parameters(), []
    for sample in zip(*data):
        found.append(nn.value_and_grad(model, loss)(model, *sample))
        model.update(parameters)  # MLX leaves its tracers in it
    losses = mx.stack([value for value, _ in found])
    flat = [dict(tree_flatten(grads)) for _, grads in found]
    return losses, {name: mx.stack([grads[name] for grads in flat]) for name in flat[0]}


def snapshot(model):
    """What a model holds, to be found again: the very arrays, and its attributes."""
    arrays = {name: id(x) for name, x in tree_flatten(model.parameters())}
    return arrays, [(id(m), type(m), dict(vars(m))) for m in model.modules()]


def close(got, want, tolerance=2e-5):
    assert got.shape == want.shape, (got.shape, want.shape)
    assert got.dtype == want.dtype, (got.dtype, want.dtype)
    scale = max(float(mx.abs(want.astype(mx.float32)).max()), 1e-6) if want.size else 1.0
    error = mx.abs(got.astype(mx.float32) - want.astype(mx.float32)).max() if want.size else 0.0
    assert float(error) <= tolerance * scale, (float(error), scale)


def close_trees(got, want, tolerance=2e-5):
    got = dict(tree_flatten(got))
    assert list(got) == list(want)
    for name in want:
        close(got[name], want[name], tolerance)
