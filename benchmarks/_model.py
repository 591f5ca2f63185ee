"""The models that several benchmarks share, written once for every framework's arrays.

A Llama-style decoder: RMS norm, rotary positions, grouped-query attention, SwiGLU, tied to nothing.
Its weights are a tree of arrays, so that it is the same function for `mx.vmap`, which takes no
modules.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx

Weights = dict[str, Any]


@dataclass(frozen=True)
class Shape:
    """A model's sizes; the default is small enough that tracing it is all there is to do."""

    layers: int = 12
    heads: int = 4
    kv_heads: int = 2
    dim: int = 8
    hidden: int = 64
    vocabulary: int = 32

    @property
    def width(self) -> int:
        return self.heads * self.dim


def weights(shape: Shape, dtype: mx.Dtype = mx.float32) -> Weights:
    def matrix(*size: int) -> mx.array:
        return (mx.random.normal(size) * size[-1] ** -0.5).astype(dtype)

    width, hidden, kv_width = shape.width, shape.hidden, shape.kv_heads * shape.dim
    layers = [
        {
            "attention_norm": mx.ones((width,), dtype),
            "q": matrix(width, width),
            "k": matrix(kv_width, width),
            "v": matrix(kv_width, width),
            "o": matrix(width, width),
            "mlp_norm": mx.ones((width,), dtype),
            "gate": matrix(hidden, width),
            "up": matrix(hidden, width),
            "down": matrix(width, hidden),
        }
        for _ in range(shape.layers)
    ]
    tree: Weights = {
        "embedding": matrix(shape.vocabulary, width),
        "layers": layers,
        "norm": mx.ones((width,), dtype),
        "head": matrix(shape.vocabulary, width),
    }
    mx.eval(tree)
    return tree


def _heads(x: mx.array, count: int) -> mx.array:
    batch, length, _ = x.shape
    return x.reshape(batch, length, count, -1).transpose(0, 2, 1, 3)


def _rope(x: mx.array) -> mx.array:
    return mx.fast.rope(x, x.shape[-1], traditional=False, base=1e4, scale=1.0, offset=0)


def _attention(layer: Weights, x: mx.array, shape: Shape) -> mx.array:
    q, k = _heads(x @ layer["q"].T, shape.heads), _heads(x @ layer["k"].T, shape.kv_heads)
    v = _heads(x @ layer["v"].T, shape.kv_heads)
    out = mx.fast.scaled_dot_product_attention(
        _rope(q), _rope(k), v, scale=shape.dim**-0.5, mask="causal"
    )
    batch, _, length, _ = out.shape
    return out.transpose(0, 2, 1, 3).reshape(batch, length, -1) @ layer["o"].T


def _mlp(layer: Weights, x: mx.array) -> mx.array:
    gate = x @ layer["gate"].T
    return (gate * mx.sigmoid(gate) * (x @ layer["up"].T)) @ layer["down"].T


def logits(tree: Weights, tokens: mx.array, shape: Shape) -> mx.array:
    """tokens: (batch, length) of ints -> (batch, length, vocabulary)."""
    x = tree["embedding"][tokens]
    for layer in tree["layers"]:
        x = x + _attention(layer, mx.fast.rms_norm(x, layer["attention_norm"], 1e-5), shape)
        x = x + _mlp(layer, mx.fast.rms_norm(x, layer["mlp_norm"], 1e-5))
    return mx.fast.rms_norm(x, tree["norm"], 1e-5) @ tree["head"].T


def losses(tree: Weights, tokens: mx.array, targets: mx.array, shape: Shape) -> mx.array:
    """The mean cross entropy of each sequence: (batch,)."""
    out = logits(tree, tokens, shape).astype(mx.float32)
    picked = mx.take_along_axis(out, targets[..., None], axis=-1).squeeze(-1)
    return (mx.logsumexp(out, axis=-1) - picked).mean(axis=-1)
