"""The tasks of `benchmarks.peers` in MLX: mlxshim, `mx.vmap`, by hand, a loop."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np

import mlxshim

from ._tasks import FLOAT32_TASKS, MAPPED, Ops, Size, flat, inputs, map_tree, transformer_loss

GPU = mx.default_device().type == mx.gpu


def _split(x: mx.array, heads: int) -> mx.array:
    batch, length, _ = x.shape
    return x.reshape(batch, length, heads, -1).transpose(0, 2, 1, 3)


def _merge(x: mx.array) -> mx.array:
    batch, _, length, _ = x.shape
    return x.transpose(0, 2, 1, 3).reshape(batch, length, -1)


def _rms_norm(x: mx.array, w: mx.array) -> mx.array:
    if w.ndim == 1:
        return mx.fast.rms_norm(x, w, 1e-5)
    return mx.fast.rms_norm(x, None, 1e-5) * w[:, None]  # by hand: a weight for each sample


def _attention(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=q.shape[-1] ** -0.5, mask="causal")


def _cross_entropy(logits: mx.array, targets: mx.array) -> mx.array:
    logits = logits.astype(mx.float32)
    picked = mx.take_along_axis(logits, targets[..., None], axis=-1).squeeze(-1)
    return (mx.logsumexp(logits, axis=-1) - picked).mean()


def _embed(table: mx.array, tokens: mx.array) -> mx.array:
    if table.ndim == 2:
        return table[tokens]
    return table[mx.arange(table.shape[0])[:, None], tokens]


OPS = Ops(
    split=_split,
    merge=_merge,
    rms_norm=_rms_norm,
    rope=lambda x: mx.fast.rope(x, x.shape[-1], traditional=False, base=1e4, scale=1.0, offset=0),
    attention=_attention,
    silu=lambda x: x * mx.sigmoid(x),
    cross_entropy=_cross_entropy,
    linear=lambda x, w: x @ w.swapaxes(-1, -2),
    embed=_embed,
)


def _weighted(q: mx.array, k: mx.array, v: mx.array, w: mx.array) -> mx.array:
    return (_attention(q, k, v) * w).astype(mx.float32).sum()


def _cnn_loss(tree: Any, image: mx.array, label: mx.array) -> mx.array:
    x = mx.maximum(mx.conv2d(image[None], tree["first"], padding=1), 0)
    x = mx.maximum(mx.conv2d(x, tree["second"], stride=2, padding=1), 0)
    return _cross_entropy(x.mean(axis=(1, 2)) @ tree["head"].T, label[None])


def _mlp(tree: Any, x: mx.array) -> mx.array:
    last = len(tree) - 1
    for i in range(last):
        x = mx.tanh(x @ tree[f"w{i}"].swapaxes(-1, -2))
    return x @ tree[f"w{last}"].swapaxes(-1, -2)


def one_sample(task: str, size: Size, module: Any) -> Callable[..., Any]:
    """The function of one sample; its derivatives are `module`'s."""
    if task == "attention":
        return _attention
    if task == "attention, grad":
        return module.grad(_weighted, argnums=[0, 1, 2])
    if task == "attention, hessian product":

        def product(q: Any, k: Any, v: Any, w: Any, *direction: Any) -> Any:
            gradient = module.grad(lambda *qkv: _weighted(*qkv, w), argnums=[0, 1, 2])
            return module.jvp(lambda *qkv: list(gradient(*qkv)), [q, k, v], list(direction))[1]

        return product
    if task == "rms norm, grad":

        def weighted(w: mx.array, x: mx.array, c: mx.array) -> mx.array:
            return (mx.fast.rms_norm(x, w, 1e-5) * c).astype(mx.float32).sum()

        return module.grad(weighted, argnums=[0, 1])
    if task.startswith("transformer"):
        return module.grad(lambda tree, x, y: transformer_loss(OPS, tree, x[None], y[None], size))
    if task.startswith("cnn"):
        return module.grad(_cnn_loss)
    if task.startswith("ensemble"):
        return module.grad(lambda tree, x, y: _cross_entropy(_mlp(tree, x), y))
    basis = mx.eye(size["widths"][-1])

    def jacobian(tree: Any, x: mx.array) -> Any:
        def row(c: mx.array) -> mx.array:
            return module.vjp(lambda x: [_mlp(tree, x)], [x], [c])[1][0]

        return module.vmap(row)(basis)

    return jacobian


def by_hand(task: str, size: Size) -> Callable[..., Any]:
    """The same for the whole batch, written as somebody would who has no vmap."""
    n = size["n"]

    def fold(x: mx.array) -> mx.array:
        return x.reshape(-1, *x.shape[2:])

    def unfold(x: mx.array) -> mx.array:
        return x.reshape(n, 1, *x.shape[1:])

    if task == "attention":
        return lambda *qkv: unfold(_attention(*map(fold, qkv)))
    if task.startswith("attention"):
        whole = one_sample(task, size, mx)
        return lambda *xs: [unfold(g) for g in whole(*map(fold, xs))]
    if task.startswith("rms"):

        def norm_grads(w: mx.array, x: mx.array, c: mx.array) -> Any:
            _, (dx,) = mx.vjp(lambda x: [mx.fast.rms_norm(x, w, 1e-5)], [x], [c])
            return [(mx.fast.rms_norm(x, None, 1e-5) * c).sum(axis=1), dx]

        return norm_grads

    def copies(tree: Any) -> Any:
        """Weights once for each sample: the gradients of these are per sample."""
        return map_tree(lambda w: mx.broadcast_to(w, (n, *w.shape)), tree)

    if task.startswith("transformer"):

        def total(tree: Any, x: mx.array, y: mx.array) -> mx.array:
            return n * transformer_loss(OPS, tree, x, y, size)

        return lambda tree, x, y: mx.grad(total)(copies(tree), x, y)
    if task.startswith("cnn"):

        def conv(x: mx.array, w: mx.array, stride: int) -> mx.array:
            """im2col: (n, h, w, c), (n, out, 3, 3, c) -> (n, h, w, out)"""
            h, k = x.shape[1], x.shape[3]
            x = mx.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)])
            shifts = [
                x[:, i : i + h : stride, j : j + h : stride] for i in range(3) for j in range(3)
            ]
            rows = mx.concatenate(shifts, axis=-1).reshape(n, -1, 9 * k)
            out = rows @ w.reshape(n, w.shape[1], -1).swapaxes(-1, -2)
            return out.reshape(n, h // stride, h // stride, -1)

        def total_cnn(tree: Any, x: mx.array, y: mx.array) -> mx.array:
            x = mx.maximum(conv(x, tree["first"], 1), 0)
            x = mx.maximum(conv(x, tree["second"], 2), 0)
            logits = x.mean(axis=(1, 2))[:, None] @ tree["head"].swapaxes(-1, -2)
            return n * _cross_entropy(logits, y[:, None])

        return lambda tree, x, y: mx.grad(total_cnn)(copies(tree), x, y)
    if task.startswith("ensemble"):

        def total_mlps(tree: Any, x: mx.array, y: mx.array) -> mx.array:
            return n * _cross_entropy(_mlp(tree, x), mx.broadcast_to(y, (n, *y.shape)))

        return mx.grad(total_mlps)

    def chain(tree: Any, x: mx.array) -> mx.array:
        """J = W_last diag(1 - h^2) W ... for every point."""
        hidden, last = [], len(tree) - 1
        for i in range(last):
            x = mx.tanh(x @ tree[f"w{i}"].T)
            hidden.append(x)
        rows = tree[f"w{last}"][None]
        for i in reversed(range(last)):
            h = hidden[i]
            rows = (rows * (1 - h * h)[:, None]) @ tree[f"w{i}"]
        return rows

    return chain


def looped(fun: Callable[..., Any], mapped: tuple[bool, ...], n: int) -> Callable[..., Any]:
    def loop(*args: Any) -> Any:
        samples = [
            [map_tree(lambda x, i=i: x[i], a) if m else a for a, m in zip(args, mapped)]
            for i in range(n)
        ]
        results = [flat(fun(*sample)) for sample in samples]
        return [mx.stack(list(column)) for column in zip(*results)]

    return loop


class Runner:
    def __init__(self, contender: str, task: str, size: Size) -> None:
        warnings.simplefilter("ignore", mlxshim.PerformanceWarning)
        dtype = mx.float32 if task.startswith(FLOAT32_TASKS) or not GPU else mx.bfloat16

        def convert(x: np.ndarray) -> mx.array:
            x = mx.array(x)
            return x.astype(dtype) if x.dtype == mx.float32 else x

        self.args = map_tree(convert, inputs(task, size))
        mx.eval(self.args)
        mapped = MAPPED[task]
        axes = tuple(0 if m else None for m in mapped)
        if contender.startswith("MLX by hand"):
            self.fun = by_hand(task, size)
        elif contender == "MLX loop":
            self.fun = looped(one_sample(task, size, mx), mapped, size["n"])
        else:
            module: Any = mx if contender == "mx.vmap" else mlxshim
            self.fun = module.vmap(one_sample(task, size, module), in_axes=axes)
        if contender.endswith("compiled"):
            self.fun = mx.compile(self.fun)

    def launch(self) -> list[mx.array]:
        out = flat(self.fun(*self.args))
        mx.async_eval(out)
        return out

    def wait(self, out: list[mx.array]) -> None:
        mx.eval(out)
        mx.synchronize()

    def peak_mib(self) -> float:
        mx.synchronize()
        mx.clear_cache()
        active = mx.get_active_memory()
        mx.reset_peak_memory()
        self.wait(self.launch())
        return (mx.get_peak_memory() - active) / 2**20

    def numpy(self, out: list[mx.array]) -> list[np.ndarray]:
        thin = [x.reshape(-1)[:: 1 + x.size // 65536].astype(mx.float32) for x in out]
        return [np.array(x) for x in thin]

    def bytes(self, out: list[mx.array]) -> int:
        return sum(x.nbytes for x in out)
