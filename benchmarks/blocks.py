"""Attention in blocks against the decomposed path: time and peak memory as the length grows.

    python -m benchmarks.blocks [--lengths 1024,2048,...] [--gib 16] [--heads 4] [--kv-heads 2]
                                [--json FILE] [--png FILE]

vmap(grad) of attention for queries, keys and values, causal and not. Each point is a process of
its own, which may take no more than `--gib` of memory (address space on a CPU, MLX's limit on a
GPU); "no" is said where it asked for more. Median of at least three calls, one where a call takes
longer than `--seconds`, of the clock and of the process's own time, which other work on the machine
does not lengthen; peak memory is MLX's, above the arguments.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import statistics
import subprocess
import sys
import time
from typing import Any

import mlx.core as mx

import mlxshim
from mlxshim import attention_budget

from ._measure import GPU, describe_machine
from ._program import announce, command_line, pyplot, save

PATHS = {"decomposed": math.inf, "blocks": 0}


def point(options: argparse.Namespace) -> dict[str, Any]:
    """What one process measures."""
    if GPU:
        mx.set_memory_limit(int(options.gib * 2**30))
    else:
        resource.setrlimit(resource.RLIMIT_AS, (int(options.gib * 2**30),) * 2)
    dtype = getattr(mx, options.dtype)

    def normal(heads: int) -> mx.array:
        shape = (options.samples, 1, heads, options.length, options.dim)
        return mx.random.normal(shape).astype(dtype)

    arrays = [normal(h) for h in (options.heads, *(options.kv_heads,) * 2, options.heads)]
    mx.eval(arrays)
    mx.synchronize()
    mask = "causal" if options.causal else None

    def loss(q: mx.array, k: mx.array, v: mx.array, w: mx.array) -> mx.array:
        out = mx.fast.scaled_dot_product_attention(q, k, v, scale=q.shape[-1] ** -0.5, mask=mask)
        return (out * w).astype(mx.float32).sum()

    call = mlxshim.vmap(mlxshim.grad(loss, argnums=[0, 1, 2]))
    times, own = [], []
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    with attention_budget(PATHS[options.path]):
        begin = time.perf_counter()
        while len(times) < 3 or (len(times) < 9 and sum(times) < options.seconds):
            start, before_own = time.perf_counter(), time.process_time()
            mx.eval(call(*arrays))
            mx.synchronize()
            times.append(time.perf_counter() - start)
            own.append(time.process_time() - before_own)
            if time.perf_counter() - begin > options.seconds:
                break
    return {
        "s": statistics.median(times),
        "cpu_s": statistics.median(own),
        "calls": len(times),
        "mib": (mx.get_peak_memory() - before) / 2**20,
    }


def measured(options: argparse.Namespace, **given: Any) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.blocks", "--point"]
    for name in ("samples", "heads", "kv_heads", "dim", "dtype", "gib", "seconds"):
        command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    command += ["--length", str(given["length"]), "--path", given["path"]]
    command += ["--causal"] * given["causal"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=options.timeout)
    except subprocess.TimeoutExpired:
        return {**given, "no": f"more than {options.timeout:.0f} s"}
    if done.returncode == 0:
        return {**given, **json.loads(done.stdout.splitlines()[-1])}
    words = (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]
    return {**given, "no": words[:160]}


def draw(rows: list[dict[str, Any]], path: str, title: str) -> None:
    plt = pyplot()

    figure, axes = plt.subplots(1, 2, figsize=(10, 4))
    keys = ("s" if GPU else "cpu_s", "mib")
    for axis, key, unit in zip(axes, keys, ("seconds", "MiB, peak")):
        for name in PATHS:
            for causal, style in ((False, "o-"), (True, "s--")):
                some = [r for r in rows if r["path"] == name and r["causal"] == causal and key in r]
                label = f"{name}{', causal' if causal else ''}"
                color = "tab:blue" if name == "blocks" else "tab:orange"
                axis.plot(
                    [r["length"] for r in some], [r[key] for r in some], style, color=color,
                    label=label,
                )  # fmt: skip
        axis.set(xlabel="L", ylabel=unit, xscale="log", yscale="log")
        axis.grid(alpha=0.3)
        axis.legend(loc="lower right" if key != "mib" else "upper left")
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--lengths", default="512,1024,2048,4096,8192,16384,32768")
    parser.add_argument("--samples", type=int, default=1)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--gib", type=float, default=16.0)
    parser.add_argument("--seconds", type=float, default=10.0, help="to repeat one point for")
    parser.add_argument("--timeout", type=float, default=1800.0, help="seconds for one point")
    parser.add_argument("--minutes", type=float, help="lengths up to 4096, in about so many")
    parser.add_argument("--without-mask", default="512,1024,2048,4096", help="lengths, as well")
    for name in ("--point", "--causal"):
        parser.add_argument(name, action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--length", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--path", choices=list(PATHS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.point:
        print(json.dumps(point(options)))
        return
    lengths = [int(n) for n in options.lengths.split(",")]
    if options.minutes:
        lengths = [n for n in lengths if n <= 4096]
        options.without_mask, options.seconds = "2048", options.minutes * 60 / 20
    sizes = {
        n: getattr(options, n) for n in ("samples", "heads", "kv_heads", "dim", "dtype", "gib")
    }
    about = announce("blocks", describe_machine(), **sizes)
    rows = []
    unmasked = [int(n) for n in options.without_mask.split(",") if n]
    for causal, some in ((False, unmasked), (True, lengths)):
        for length in some:
            for path in PATHS:
                row = measured(options, length=length, causal=causal, path=path)
                rows.append(row)
                found = row.get("no") or (
                    f"{row['s']:9.3f} s, {row['cpu_s']:9.3f} s own, {row['mib']:10.1f} MiB"
                )
                print(f"L {length:6d} {'causal' * causal:<7} {path:<11} {found}", flush=True)
    save(options.json, {**about, "rows": rows})
    if options.png:
        title = f"vmap(grad) of attention, {about['device']}, MLX {mx.__version__}"
        draw(rows, options.png, title)


if __name__ == "__main__":
    main()
