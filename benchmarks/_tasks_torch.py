"""The tasks of `benchmarks.peers` in PyTorch: `torch.func`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.func import grad, jacrev, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from ._tasks import FLOAT32_TASKS, MAPPED, Ops, Size, flat, inputs, map_tree, transformer_loss

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"


def _split(x: Any, heads: int) -> Any:
    batch, length, _ = x.shape
    return x.reshape(batch, length, heads, -1).transpose(1, 2)


def _rope(x: Any) -> Any:
    half = x.shape[-1] // 2
    freqs = 1e4 ** (-torch.arange(half, device=x.device) / half)
    angles = torch.arange(x.shape[-2], device=x.device)[:, None] * freqs
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


def _attention(q: Any, k: Any, v: Any) -> Any:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def _cross_entropy(logits: Any, targets: Any) -> Any:
    logits = logits.float()
    picked = logits.gather(-1, targets[..., None]).squeeze(-1)
    return (logits.logsumexp(-1) - picked).mean()


OPS = Ops(
    split=_split,
    merge=lambda x: x.transpose(1, 2).reshape(x.shape[0], x.shape[2], -1),
    rms_norm=lambda x, w: F.rms_norm(x, (x.shape[-1],), w, 1e-5),
    rope=_rope,
    attention=_attention,
    silu=F.silu,
    cross_entropy=_cross_entropy,
    linear=lambda x, w: x @ w.mT,
    embed=lambda table, tokens: F.embedding(tokens, table),
)


def _mlp(tree: Any, x: Any) -> Any:
    last = len(tree) - 1
    for i in range(last):
        x = torch.tanh(x @ tree[f"w{i}"].mT)
    return x @ tree[f"w{last}"].mT


def _cnn_loss(tree: Any, image: Any, label: Any) -> Any:
    x = F.relu(F.conv2d(image[None], tree["first"], padding=1))
    x = F.relu(F.conv2d(x, tree["second"], stride=2, padding=1))
    return _cross_entropy(x.mean((2, 3)) @ tree["head"].mT, label[None])


def one_sample(task: str, size: Size) -> Callable[..., Any]:
    def weighted(q: Any, k: Any, v: Any, w: Any) -> Any:
        return (_attention(q, k, v) * w).float().sum()

    if task == "attention":
        return _attention
    if task == "attention, grad":
        return grad(weighted, argnums=(0, 1, 2))
    if task == "attention, hessian product":

        def product(q: Any, k: Any, v: Any, w: Any, *direction: Any) -> Any:
            gradient = grad(lambda *qkv: weighted(*qkv, w), argnums=(0, 1, 2))
            with sdpa_kernel(SDPBackend.MATH):  # the others have no forward derivative
                return jvp(gradient, (q, k, v), direction)[1]

        return product
    if task.startswith("rms"):

        def norm(w: Any, x: Any, c: Any) -> Any:
            return (F.rms_norm(x, (x.shape[-1],), w, 1e-5) * c).float().sum()

        return grad(norm, argnums=(0, 1))
    if task.startswith("transformer"):
        return grad(lambda tree, x, y: transformer_loss(OPS, tree, x[None], y[None], size))
    if task.startswith("cnn"):
        return grad(_cnn_loss)
    if task.startswith("ensemble"):
        return grad(lambda tree, x, y: _cross_entropy(_mlp(tree, x), y))
    return jacrev(_mlp, argnums=1)


class Runner:
    def __init__(self, contender: str, task: str, size: Size) -> None:
        dtype = torch.float32 if task.startswith(FLOAT32_TASKS) or not GPU else torch.bfloat16

        def convert(x: np.ndarray) -> Any:
            y = torch.from_numpy(x).to(DEVICE)
            return y.to(dtype) if y.is_floating_point() else y.long()

        self.args = map_tree(convert, inputs(task, size))
        self.task = task
        if task.startswith("cnn"):  # its own layout: channels before rows and columns
            tree, images, labels = self.args
            for name in ("first", "second"):
                tree[name] = tree[name].permute(0, 3, 1, 2).contiguous()
            self.args = [tree, images.permute(0, 3, 1, 2).contiguous(), labels]
        axes = tuple(0 if m else None for m in MAPPED[task])
        self.fun = vmap(one_sample(task, size), in_dims=axes)

    def launch(self) -> list[Any]:
        return flat(self.fun(*self.args))

    def wait(self, out: list[Any]) -> None:
        if GPU:
            torch.cuda.synchronize()

    def peak_mib(self) -> float | None:
        if not GPU:
            return None
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        active = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        self.wait(self.launch())
        return (torch.cuda.max_memory_allocated() - active) / 2**20

    def numpy(self, out: list[Any]) -> list[np.ndarray]:
        if self.task.startswith("cnn"):
            out = [x.permute(0, 1, 3, 4, 2) if x.ndim == 5 else x for x in out]
        thin = [x.reshape(-1)[:: 1 + x.numel() // 65536].float() for x in out]
        return [x.detach().cpu().numpy() for x in thin]

    def bytes(self, out: list[Any]) -> int:
        return sum(x.numel() * x.element_size() for x in out)
