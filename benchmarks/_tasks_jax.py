"""The tasks of `benchmarks.peers` in JAX: `jax.vmap` under `jax.jit`, attention by cuDNN."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ._tasks import FLOAT32_TASKS, MAPPED, Ops, Size, flat, inputs, map_tree, transformer_loss

GPU = jax.default_backend() == "gpu"


def _attention(q: Any, k: Any, v: Any, fused: bool = GPU) -> Any:
    """(batch, length, heads, dim), JAX's own layout."""
    implementation = "cudnn" if fused else "xla"
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=implementation)


def _rms_norm(x: Any, w: Any) -> Any:
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + 1e-5)
    return y.astype(x.dtype) * w


def _rope(x: Any) -> Any:
    half = x.shape[-1] // 2
    angles = jnp.arange(x.shape[1])[:, None] * 1e4 ** (-jnp.arange(half) / half)
    cos, sin = jnp.cos(angles)[:, None].astype(x.dtype), jnp.sin(angles)[:, None].astype(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1)


def _cross_entropy(logits: Any, targets: Any) -> Any:
    logits = logits.astype(jnp.float32)
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return (jax.nn.logsumexp(logits, axis=-1) - picked).mean()


OPS = Ops(
    split=lambda x, heads: x.reshape(x.shape[0], x.shape[1], heads, -1),
    merge=lambda x: x.reshape(x.shape[0], x.shape[1], -1),
    rms_norm=_rms_norm,
    rope=_rope,
    attention=_attention,
    silu=jax.nn.silu,
    cross_entropy=_cross_entropy,
    linear=lambda x, w: x @ w.swapaxes(-1, -2),
    embed=lambda table, tokens: table[tokens],
)


def _mlp(tree: Any, x: Any) -> Any:
    last = len(tree) - 1
    for i in range(last):
        x = jnp.tanh(x @ tree[f"w{i}"].T)
    return x @ tree[f"w{last}"].T


def _conv(x: Any, w: Any, stride: int) -> Any:
    layout = ("NHWC", "OHWI", "NHWC")
    padding = ((1, 1), (1, 1))
    return jax.lax.conv_general_dilated(x, w, (stride, stride), padding, dimension_numbers=layout)


def _cnn_loss(tree: Any, image: Any, label: Any) -> Any:
    x = jax.nn.relu(_conv(image[None], tree["first"], 1))
    x = jax.nn.relu(_conv(x, tree["second"], 2))
    return _cross_entropy(x.mean((1, 2)) @ tree["head"].T, label[None])


def one_sample(task: str, size: Size) -> Callable[..., Any]:
    def weighted(q: Any, k: Any, v: Any, w: Any, fused: bool = GPU) -> Any:
        return (_attention(q, k, v, fused) * w).astype(jnp.float32).sum()

    if task == "attention":
        return _attention
    if task == "attention, grad":
        return jax.grad(weighted, argnums=(0, 1, 2))
    if task == "attention, hessian product":

        def product(q: Any, k: Any, v: Any, w: Any, *direction: Any) -> Any:
            # cuDNN's has no forward derivative.
            gradient = jax.grad(lambda *qkv: weighted(*qkv, w, False), argnums=(0, 1, 2))
            return jax.jvp(gradient, (q, k, v), direction)[1]

        return product
    if task.startswith("rms"):
        return jax.grad(
            lambda w, x, c: (_rms_norm(x, w) * c).astype(jnp.float32).sum(), argnums=(0, 1)
        )
    if task.startswith("transformer"):
        return jax.grad(lambda tree, x, y: transformer_loss(OPS, tree, x[None], y[None], size))
    if task.startswith("cnn"):
        return jax.grad(_cnn_loss)
    if task.startswith("ensemble"):
        return jax.grad(lambda tree, x, y: _cross_entropy(_mlp(tree, x), y))
    return jax.jacrev(_mlp, argnums=1)


class Runner:
    def __init__(self, contender: str, task: str, size: Size) -> None:
        dtype = jnp.float32 if task.startswith(FLOAT32_TASKS) or not GPU else jnp.bfloat16

        def convert(x: np.ndarray) -> Any:
            y = jnp.asarray(x)
            return y.astype(dtype) if y.dtype == jnp.float32 else y

        self.task = task
        self.args = map_tree(convert, inputs(task, size))
        if task.startswith("attention"):  # (n, 1, heads, length, dim) in JAX's layout
            self.args = [x.swapaxes(2, 3) for x in self.args]
        axes = tuple(0 if m else None for m in MAPPED[task])
        fun = jax.jit(jax.vmap(one_sample(task, size), in_axes=axes))
        self.fun = fun.lower(*self.args).compile()

    def launch(self) -> list[Any]:
        return flat(self.fun(*self.args))

    def wait(self, out: list[Any]) -> None:
        jax.block_until_ready(out)

    def peak_mib(self) -> float | None:
        """What the compiler has planned: its temporaries and the outputs."""
        plan = self.fun.memory_analysis()
        if plan is None:
            return None
        return (plan.temp_size_in_bytes + plan.output_size_in_bytes) / 2**20

    def numpy(self, out: list[Any]) -> list[np.ndarray]:
        if self.task.startswith("attention"):
            out = [x.swapaxes(2, 3) for x in out]
        thin = [x.reshape(-1)[:: 1 + x.size // 65536].astype(jnp.float32) for x in out]
        return [np.asarray(x) for x in thin]

    def bytes(self, out: list[Any]) -> int:
        return sum(x.nbytes for x in out)
