"""Per-sample and clipped gradients of a Llama-style model: MLX's own, and mlxshim.nn's.

    python -m benchmarks.models [--json FILE] [--layers 12 --dim 768 --heads 12/4 ...] [--only NAME]

Contenders: the ordinary gradient of the batch (the mark to measure by), a loop over samples,
`mx.vmap(mx.grad)`, `per_sample_value_and_grad` and `clipped_grad`. On a GPU the model has 100
million parameters in bfloat16, elsewhere it is small. Every contender runs in a process of its own
and is checked there against MLX's gradients of single samples. `ms` is the median of single calls,
traced, evaluated and synchronised; `pipelined ms` a call's share of several that are synchronised
once; `trace ms` what a call takes to return: it builds the graph, and of norms and clipped sums it
starts the backward pass. Memory is MLX's peak above what was active. On a GPU that depends on how
far the host is ahead: MLX has up to ten graphs in flight, of up to 1000 million entries each on a
Hopper GPU, and what they read is free when they are done. So `short MiB` is the peak in another
process, where MLX_MAX_MB_PER_BUFFER=100 keeps that queue short: what the computation itself holds.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import time
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mlxshim.nn import clipped_grad, per_sample_norms, per_sample_value_and_grad

from ._measure import GPU, Thunk, describe_machine, measure
from ._program import announce, command_line, save

MAX_NORM = 1.0


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, dim // heads
        self.q_proj = nn.Linear(dim, dim, bias=False)
        self.k_proj = nn.Linear(dim, kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(dim, kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(dim, dim, bias=False)
        self.rope = nn.RoPE(self.head_dim)

    def __call__(self, x: mx.array) -> mx.array:
        batch, length, _ = x.shape

        def split(y: mx.array, heads: int) -> mx.array:
            return y.reshape(batch, length, heads, -1).transpose(0, 2, 1, 3)

        q = self.rope(split(self.q_proj(x), self.heads))
        k = self.rope(split(self.k_proj(x), self.kv_heads))
        v = split(self.v_proj(x), self.kv_heads)
        scale = self.head_dim**-0.5
        y = mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask="causal")
        return self.o_proj(y.transpose(0, 2, 1, 3).reshape(batch, length, -1))


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, kv_heads: int, hidden: int) -> None:
        super().__init__()
        self.attention = Attention(dim, heads, kv_heads)
        self.gate_proj = nn.Linear(dim, hidden, bias=False)
        self.up_proj = nn.Linear(dim, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, dim, bias=False)
        self.attention_norm, self.mlp_norm = nn.RMSNorm(dim), nn.RMSNorm(dim)

    def __call__(self, x: mx.array) -> mx.array:
        x = x + self.attention(self.attention_norm(x))
        h = self.mlp_norm(x)
        return x + self.down_proj(nn.silu(self.gate_proj(h)) * self.up_proj(h))


class Llama(nn.Module):
    """The embedding is the output layer too."""

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__()
        heads, kv_heads = (int(h) for h in options.heads.split("/"))
        self.embed = nn.Embedding(options.vocabulary, options.dim)
        self.layers = [
            Block(options.dim, heads, kv_heads, options.hidden) for _ in range(options.layers)
        ]
        self.norm = nn.RMSNorm(options.dim)

    def __call__(self, ids: mx.array) -> mx.array:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.embed.as_linear(self.norm(x))


def loss_fn(model: Any, x: mx.array, y: mx.array) -> mx.array:
    """Written for a batch: the mean over all tokens."""
    losses = nn.losses.cross_entropy(model(x), y)
    return losses.astype(mx.float32).mean()


def flat(tree: Any) -> list[mx.array]:
    return [x for _, x in tree_flatten(tree)]


def contenders(model: Llama, x: mx.array, y: mx.array) -> dict[str, Thunk]:
    """Each returns arrays: losses first, then gradients in the order of the parameters."""
    parameters = model.trainable_parameters()

    def of_parameters(parameters: Any, x: mx.array, y: mx.array) -> mx.array:
        model.update(parameters)
        return loss_fn(model, x[None], y[None])

    def ordinary(x: mx.array, y: mx.array) -> list[mx.array]:
        value, grads = mx.value_and_grad(lambda p: (model.update(p), loss_fn(model, x, y))[1])(
            parameters
        )
        return [value, *flat(grads)]

    def loop() -> list[mx.array]:
        found = []
        for i in range(len(x)):
            value, grads = mx.value_and_grad(of_parameters)(parameters, x[i], y[i])
            found.append([value, *flat(grads)])
            mx.eval(found[-1])
        return [a for arrays in found for a in arrays]

    def native(x: mx.array, y: mx.array) -> list[mx.array]:
        fun = mx.vmap(mx.value_and_grad(of_parameters), in_axes=(None, 0, 0))
        value, grads = fun(parameters, x, y)
        return [value, *flat(grads)]

    mine = per_sample_value_and_grad(model, loss_fn, keepdims=True)
    norms = per_sample_norms(model, loss_fn, keepdims=True)
    clip = clipped_grad(model, loss_fn, MAX_NORM, keepdims=True)

    def per_sample(x: mx.array, y: mx.array) -> list[mx.array]:
        value, grads = mine(model, x, y)
        return [value, *flat(grads)]

    def norms_alone(x: mx.array, y: mx.array) -> list[mx.array]:
        return list(norms(model, x, y))

    def clipped(x: mx.array, y: mx.array) -> list[mx.array]:
        value, grads, _ = clip(model, x, y)
        return [value, *flat(grads)]

    every: dict[str, Thunk] = {"loop": loop}
    named = {
        "ordinary": ordinary,
        "mx.vmap": native,
        "per-sample": per_sample,
        "norms": norms_alone,
        "clipped": clipped,
    }
    for name, fun in named.items():
        every[name] = functools.partial(fun, x, y)
        every[f"{name}, compiled"] = functools.partial(mx.compile(fun), x, y)
    return every


def error_of(name: str, got: list[mx.array], model: Llama, x: mx.array, y: mx.array) -> float:
    """The largest relative error of a parameter's gradient, against single samples of MLX's."""
    parameters = tree_unflatten(tree_flatten(model.trainable_parameters()))

    def one(i: int) -> list[mx.array]:
        def of_parameters(p: Any) -> mx.array:
            model.update(p)
            return loss_fn(model, x[i : i + 1], y[i : i + 1])

        grads = flat(mx.grad(of_parameters)(parameters))
        model.update(parameters)
        mx.eval(grads)
        return [g.astype(mx.float32) for g in grads]

    def norm(arrays: list[mx.array]) -> mx.array:
        return mx.sqrt(sum((a.astype(mx.float32).square().sum() for a in arrays), mx.array(0.0)))

    def error(found: list[mx.array], want: list[mx.array]) -> float:
        return max(
            float(mx.linalg.norm(f.astype(mx.float32) - w) / mx.maximum(mx.linalg.norm(w), 1e-12))
            for f, w in zip(found, want)
        )

    if name.startswith(("per-sample", "mx.vmap")):
        return max(error([g[i] for g in got[1:]], one(i)) for i in (0, len(x) - 1))
    if name.startswith("norms"):
        want = mx.stack([norm(one(i)) for i in range(len(x))])
        return error([got[1]], [want])
    if name.startswith("clipped"):
        total: list[mx.array] = []
        for i in range(len(x)):
            grads = one(i)
            factor = MAX_NORM / mx.maximum(norm(grads), MAX_NORM)
            grads = [g * factor for g in grads]
            total = [t + g for t, g in zip(total, grads)] if total else grads
            mx.eval(total)
        return error(got[1:], total)
    return 0.0


def prepared(name: str, options: argparse.Namespace) -> tuple[Thunk, Any]:
    mx.random.seed(0)
    model = Llama(options)
    model.set_dtype(getattr(mx, options.dtype))
    x, y = mx.random.randint(0, options.vocabulary, (2, options.samples, options.length))
    mx.eval(model.parameters(), x, y)
    return contenders(model, x, y)[name], (model, x, y)


def run_one(name: str, options: argparse.Namespace) -> dict[str, Any]:
    row: dict[str, Any] = {"contender": name}
    try:
        fun, (model, x, y) = prepared(name, options)
        row["parameters"] = sum(p.size for p in flat(model.parameters()))
        parameters = model.parameters()
        got = fun()
        mx.eval(got)
        model.update(parameters)  # MLX's contenders leave tracers in it
        row["error"] = error_of(name, got, model, x, y)
        del got
        row.update(measure(fun, options.repeats, options.seconds))
        row["mib"] = peak(fun)
        begins = []
        for _ in range(5):
            mx.synchronize()
            begin = time.perf_counter()
            unused = fun()
            begins.append((time.perf_counter() - begin) * 1e3)
            del unused
        if name != "loop":
            row["trace_ms"] = statistics.median(begins)
    except Exception as error:
        row["note"] = f"{type(error).__name__}: {error}"[:160]
    return row


def peak(fun: Thunk) -> float:
    """MiB above what is there, of calls one after the other, as in a training loop."""
    for _ in range(3):
        mx.eval(fun())
    mx.synchronize()
    active = mx.get_active_memory()
    mx.reset_peak_memory()
    for _ in range(3):
        mx.eval(fun())
    mx.synchronize()
    return (mx.get_peak_memory() - active) / 2**20


def peak_of(name: str, options: argparse.Namespace) -> dict[str, Any]:
    return {"short_mib": peak(prepared(name, options)[0])}


def worker(name: str, *more: str, **names: str) -> dict[str, Any]:
    """The row that a process of its own has found."""
    command = [sys.executable, "-m", "benchmarks.models", *sys.argv[1:], "--one", name, *more]
    env = {**os.environ, **names}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=env)
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        return {"contender": name, "note": f"exit status {done.returncode}"}
    return json.loads(lines[-1])


def parse() -> argparse.Namespace:
    parser = command_line(__doc__, png=False)
    parser.add_argument("--layers", type=int, default=12 if GPU else 4)
    parser.add_argument("--dim", type=int, default=768 if GPU else 128)
    parser.add_argument("--hidden", type=int, default=2048 if GPU else 344)
    parser.add_argument("--heads", default="12/4" if GPU else "4/2")
    parser.add_argument("--vocabulary", type=int, default=32000 if GPU else 1000)
    parser.add_argument("--length", type=int, default=512 if GPU else 64)
    parser.add_argument("--samples", type=int, default=32 if GPU else 8)
    parser.add_argument("--dtype", default="bfloat16" if GPU else "float32")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=3.0, help="at most, for each contender")
    parser.add_argument("--only", default="", help="names of contenders, separated by ';'")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--memory", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


ORDER = (
    "ordinary;ordinary, compiled;loop;mx.vmap;mx.vmap, compiled;per-sample;per-sample, compiled;"
    "norms;norms, compiled;clipped;clipped, compiled"
)


def main() -> None:
    options = parse()
    if options.one:
        print(json.dumps((peak_of if options.memory else run_one)(options.one, options)))
        return
    sizes = {
        key: getattr(options, key)
        for key in ["layers", "dim", "hidden", "heads", "vocabulary", "length", "samples", "dtype"]
    }
    about = announce("models", describe_machine(), **sizes)
    rows = []
    for name in (options.only or ORDER).split(";"):
        row = worker(name)
        if GPU and "note" not in row:
            row.update(worker(name, "--memory", MLX_MAX_MB_PER_BUFFER="100"))
        rows.append(row)
        keys = ("ms", "pipelined_ms", "trace_ms", "mib", "short_mib")
        figures = [row.get(key, float("nan")) for key in keys]
        print(
            f"{name:<22} {figures[0]:9.2f} ms {figures[1]:9.2f} pipelined ms "
            f"{figures[2]:8.2f} trace ms {figures[3]:10.1f} MiB {figures[4]:10.1f} short MiB"
            f"  error {row.get('error', float('nan')):.1e}  {row.get('note', '')}",
            flush=True,
        )
        save(options.json, {**about, "rows": rows})


if __name__ == "__main__":
    main()
