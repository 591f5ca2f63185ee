"""The tasks of `benchmarks.peers`: sizes, inputs (NumPy, the same for all) and a shared model body.

Every framework gives `Ops`; what is written here is the same program for all of them.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

Size = dict[str, Any]

GPU_SIZES: dict[str, Size] = {
    "attention": {"n": 16, "heads": 32, "kv_heads": 8, "length": 2048, "dim": 128},
    "attention, grad": {"n": 16, "heads": 32, "kv_heads": 8, "length": 2048, "dim": 128},
    "attention, hessian product": {"n": 16, "heads": 32, "kv_heads": 8, "length": 512, "dim": 128},
    "rms norm, grad": {"n": 16, "length": 2048, "width": 4096},
    "transformer, per-sample grads": {
        "n": 8, "layers": 12, "heads": 16, "kv_heads": 4, "dim": 64, "hidden": 2816,
        "vocabulary": 1024, "length": 512,
    },
    "cnn, per-sample grads": {"n": 256, "image": 32, "channels": (3, 32, 64), "classes": 10},
    "ensemble of 64 MLPs, grad": {"n": 64, "batch": 256, "widths": (784, 512, 512, 10)},
    "jacobian": {"n": 64, "widths": (256, 512, 512, 64)},
}  # fmt: skip
CPU_SIZES: dict[str, Size] = {
    "attention": {"n": 4, "heads": 8, "kv_heads": 2, "length": 256, "dim": 64},
    "attention, grad": {"n": 4, "heads": 8, "kv_heads": 2, "length": 256, "dim": 64},
    "attention, hessian product": {"n": 4, "heads": 8, "kv_heads": 2, "length": 128, "dim": 64},
    "rms norm, grad": {"n": 8, "length": 256, "width": 1024},
    "transformer, per-sample grads": {
        "n": 4, "layers": 12, "heads": 8, "kv_heads": 2, "dim": 32, "hidden": 512,
        "vocabulary": 256, "length": 128,
    },
    "cnn, per-sample grads": {"n": 16, "image": 32, "channels": (3, 16, 32), "classes": 10},
    "ensemble of 64 MLPs, grad": {"n": 64, "batch": 32, "widths": (256, 128, 128, 10)},
    "jacobian": {"n": 16, "widths": (128, 256, 256, 32)},
}  # fmt: skip


@dataclass
class Ops:
    """What the model needs of a framework, each for one sample or a batch alike."""

    #: (batch, length, heads * dim) -> what `attention` takes, and back.
    split: Callable[[Any, int], Any]
    merge: Callable[[Any], Any]
    rms_norm: Callable[[Any, Any], Any]
    rope: Callable[[Any], Any]
    attention: Callable[[Any, Any, Any], Any]
    silu: Callable[[Any], Any]
    #: (batch, length, vocabulary), (batch, length) -> the mean
    cross_entropy: Callable[[Any, Any], Any]
    #: x W^T, and rows of a table: weights may have a batch dimension of their own, by hand.
    linear: Callable[[Any, Any], Any]
    embed: Callable[[Any, Any], Any]


def transformer_loss(ops: Ops, tree: Any, tokens: Any, targets: Any, size: Size) -> Any:
    x = ops.embed(tree["embedding"], tokens)
    for layer in tree["layers"]:
        y = ops.rms_norm(x, layer["attention_norm"])
        q = ops.split(ops.linear(y, layer["q"]), size["heads"])
        k = ops.split(ops.linear(y, layer["k"]), size["kv_heads"])
        v = ops.split(ops.linear(y, layer["v"]), size["kv_heads"])
        x = x + ops.linear(ops.merge(ops.attention(ops.rope(q), ops.rope(k), v)), layer["o"])
        y = ops.rms_norm(x, layer["mlp_norm"])
        y = ops.silu(ops.linear(y, layer["gate"])) * ops.linear(y, layer["up"])
        x = x + ops.linear(y, layer["down"])
    logits = ops.linear(ops.rms_norm(x, tree["norm"]), tree["head"])
    return ops.cross_entropy(logits, targets)


def inputs(task: str, size: Size) -> list[Any]:
    """The arguments of a task, float32 or int32; the mapped axis is the first."""
    draw = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        # Drawing hundreds of millions for each contender would take longer than what is measured:
        # large ones repeat, after a prime number that no row and no sample is a multiple of.
        return np.resize(draw.standard_normal(min(math.prod(shape), 4_194_301), np.float32), shape)

    def weight(rows: int, columns: int, *lead: int) -> np.ndarray:
        return normal(*lead, rows, columns) / math.sqrt(columns)

    n = size["n"]
    if task.startswith("attention"):
        lead, tail = (n, 1), (size["length"], size["dim"])
        one = [normal(*lead, size[h], *tail) for h in ("heads", "kv_heads", "kv_heads")]
        if task == "attention":
            return one
        extra = [normal(*lead, size["heads"], *tail)]
        if task.endswith("product"):
            extra += [normal(*x.shape) for x in one]
        return one + extra
    if task.startswith("rms"):
        shape = (n, size["length"], size["width"])
        return [normal(size["width"]), normal(*shape), normal(*shape)]
    if task.startswith("transformer"):
        width, kv_width = size["heads"] * size["dim"], size["kv_heads"] * size["dim"]
        hidden, vocabulary = size["hidden"], size["vocabulary"]
        layers = [
            {
                "attention_norm": np.ones(width, np.float32),
                "q": weight(width, width),
                "k": weight(kv_width, width),
                "v": weight(kv_width, width),
                "o": weight(width, width),
                "mlp_norm": np.ones(width, np.float32),
                "gate": weight(hidden, width),
                "up": weight(hidden, width),
                "down": weight(width, hidden),
            }
            for _ in range(size["layers"])
        ]
        tree = {
            "embedding": normal(vocabulary, width),
            "layers": layers,
            "norm": np.ones(width, np.float32),
            "head": weight(vocabulary, width),
        }
        tokens = draw.integers(0, vocabulary, (2, n, size["length"])).astype(np.int32)
        return [tree, tokens[0], tokens[1]]
    if task.startswith("cnn"):
        a, b, c = size["channels"]
        tree = {
            "first": normal(b, 3, 3, a) / math.sqrt(9 * a),
            "second": normal(c, 3, 3, b) / math.sqrt(9 * b),
            "head": weight(size["classes"], c),
        }
        labels = draw.integers(0, size["classes"], (n,)).astype(np.int32)
        return [tree, normal(n, size["image"], size["image"], a), labels]
    widths = size["widths"]
    if task.startswith("ensemble"):
        tree = {f"w{i}": weight(o, k, n) for i, (k, o) in enumerate(itertools.pairwise(widths))}
        labels = draw.integers(0, widths[-1], (size["batch"],)).astype(np.int32)
        return [tree, normal(size["batch"], widths[0]), labels]
    tree = {f"w{i}": weight(o, k) for i, (k, o) in enumerate(itertools.pairwise(widths))}
    return [tree, normal(n, widths[0])]


#: Which arguments of a task have a mapped axis.
MAPPED = {
    "attention": (True, True, True),
    "attention, grad": (True,) * 4,
    "attention, hessian product": (True,) * 7,
    "rms norm, grad": (False, True, True),
    "transformer, per-sample grads": (False, True, True),
    "cnn, per-sample grads": (False, True, True),
    "ensemble of 64 MLPs, grad": (True, False, False),
    "jacobian": (False, True),
}

FLOAT32_TASKS = ("cnn", "ensemble", "jacobian")


def map_tree(fun: Callable[[Any], Any], tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: map_tree(fun, value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [map_tree(fun, value) for value in tree]
    return fun(tree)


def flat(tree: Any) -> list[Any]:
    """The leaves in an order that all frameworks share."""
    if isinstance(tree, dict):
        return [leaf for key in sorted(tree) for leaf in flat(tree[key])]
    if isinstance(tree, (list, tuple)):
        return [leaf for value in tree for leaf in flat(value)]
    return [tree]


def sketch(arrays: list[np.ndarray]) -> list[float]:
    """A few numbers that two results share if they are the same."""
    total = np.zeros(8)
    for x in arrays:
        total += _waves(x.size) @ x.astype(np.float64)
    return total.tolist()


@functools.lru_cache(16)
def _waves(size: int) -> np.ndarray:
    return np.cos(0.7 * np.arange(1, 9)[:, None] * np.arange(size))
