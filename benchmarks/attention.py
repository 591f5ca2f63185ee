"""Attention under vmap and vmap(grad): by hand, mlxshim, mx.vmap and a loop, in one run.

    python -m benchmarks.attention [--json FILE] [--png FILE] [--lengths 128,256,...]

Every contender is checked against the loop at the smallest length. `ms` is the median of single
calls after a warm-up, each traced, evaluated and synchronised: what Python spends on the trace is
in it whole. `pipelined ms` is a call's share of twenty that are evaluated asynchronously and
synchronised once, as a training loop does: there the trace of one call hides behind the work of the
last. Memory is MLX's own peak above what was active. Each section and length runs in a process of
its own, so that one contender's failure does not spoil the next.
"""

from __future__ import annotations

import argparse
import functools
import json
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import mlx.core as mx

import mlxshim

from ._measure import GPU, TIME, Thunk, by_loop, describe_machine, error_of, measure
from ._program import announce, command_line, pyplot, save


def sdpa(q: mx.array, k: mx.array, v: mx.array, mask: str | None = "causal") -> mx.array:
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=q.shape[-1] ** -0.5, mask=mask)


def fold(x: mx.array) -> mx.array:
    return mx.flatten(x, 0, 1)


def forward(arrays: list[mx.array]) -> dict[str, Thunk]:
    def one(q: mx.array, k: mx.array, v: mx.array) -> list[mx.array]:
        return [sdpa(q, k, v)]

    def hand() -> list[mx.array]:
        q, k, v = (fold(x) for x in arrays)
        return [mx.unflatten(sdpa(q, k, v), 0, (-1, 1))]

    return {
        "by hand": hand,
        "mlxshim": functools.partial(mlxshim.vmap(one), *arrays),
        "mlxshim, compiled": functools.partial(mx.compile(mlxshim.vmap(one)), *arrays),
        "mx.vmap": functools.partial(mx.vmap(one), *arrays),
        "loop": lambda: by_loop(one, arrays),
    }


def gradient(arrays: list[mx.array], weight: mx.array, square: bool) -> dict[str, Thunk]:
    """Gradients of a per-sample loss for q, k and v; a square loss needs the value as well."""

    def loss(q: mx.array, k: mx.array, v: mx.array, w: mx.array) -> mx.array:
        out = sdpa(q, k, v)
        return ((out * out if square else out) * w).astype(mx.float32).sum()

    def hand() -> list[mx.array]:
        grads = mx.grad(loss, argnums=[0, 1, 2])(*(fold(x) for x in (*arrays, weight)))
        return [mx.unflatten(g, 0, (-1, 1)) for g in grads]

    mine = mlxshim.vmap(mlxshim.grad(loss, argnums=[0, 1, 2]))
    native = mx.vmap(mx.grad(loss, argnums=[0, 1, 2]))
    everything = [*arrays, weight]
    one = mx.grad(loss, argnums=[0, 1, 2])
    return {
        "by hand": hand,
        "mlxshim": lambda: mine(*everything),
        "mlxshim, compiled": functools.partial(mx.compile(mine), *everything),
        "by hand, compiled": mx.compile(hand),
        "mx.vmap": lambda: native(*everything),
        "loop": lambda: by_loop(lambda *xs: list(one(*xs)), everything),
    }


def decode(q: mx.array, k: mx.array, v: mx.array) -> dict[str, Thunk]:
    """One query for each sample over one shared K/V, with the folds that a hand would try."""
    n, _, heads, _, dim = q.shape
    kv_heads = k.shape[1]

    def rows() -> list[mx.array]:
        out = sdpa(mx.transpose(q[:, 0, :, 0], (1, 0, 2))[None], k, v, None)
        return [mx.reshape(mx.swapaxes(out, 0, 2), q.shape)]

    def group_rows() -> list[mx.array]:
        x = mx.transpose(mx.reshape(q, (n, kv_heads, -1, dim)), (1, 0, 2, 3))
        out = sdpa(mx.reshape(x, (1, kv_heads, -1, dim)), k, v, None)
        out = mx.transpose(mx.reshape(out, (kv_heads, n, -1, dim)), (1, 0, 2, 3))
        return [mx.reshape(out, q.shape)]

    def group_heads() -> list[mx.array]:
        x = mx.transpose(mx.reshape(q, (n, kv_heads, -1, dim)), (1, 0, 2, 3))
        out = sdpa(mx.reshape(x, (1, n * heads, 1, dim)), k, v, None)
        out = mx.transpose(mx.reshape(out, (kv_heads, n, -1, dim)), (1, 0, 2, 3))
        return [mx.reshape(out, q.shape)]

    def batch() -> list[mx.array]:
        copies = [mx.contiguous(mx.broadcast_to(x, (n, *x.shape[1:]))) for x in (k, v)]
        return [mx.unflatten(sdpa(fold(q), *copies, None), 0, (-1, 1))]

    def one(q: mx.array) -> list[mx.array]:
        return [sdpa(q, k, v)]

    return {
        "by hand: rows": rows,
        "by hand: rows of a group": group_rows,
        "by hand: heads of a group": group_heads,
        "by hand: copied K/V": batch,
        "mlxshim": functools.partial(mlxshim.vmap(one), q),
        "mlxshim, compiled": functools.partial(mx.compile(mlxshim.vmap(one)), q),
        "by hand: rows, compiled": mx.compile(rows),
        "mx.vmap": functools.partial(mx.vmap(one), q),
        "loop": lambda: by_loop(one, [q]),
    }


def tracing() -> dict[str, dict[str, float]]:
    """Microseconds to trace one causal GQA call, with nothing evaluated: the least of many."""
    arrays = [mx.random.normal((8, 1, h, 16, 8)) for h in (4, 2, 2)]

    def least(fun: Callable[..., Any]) -> float:
        best = float("inf")
        for _ in range(150):
            begin = time.perf_counter()
            for _ in range(20):
                fun(*arrays)
            best = min(best, (time.perf_counter() - begin) / 20)
        return best * 1e6

    def loss(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        return sdpa(q, k, v).sum()

    table: dict[str, dict[str, float]] = {}
    for name, native, mine in (
        ("vmap of nothing", mx.vmap(lambda q, k, v: q), mlxshim.vmap(lambda q, k, v: q)),
        ("vmap", mx.vmap(sdpa), mlxshim.vmap(sdpa)),
        (
            "vmap(grad)",
            mx.vmap(mx.grad(loss, argnums=[0, 1, 2])),
            mlxshim.vmap(mlxshim.grad(loss, argnums=[0, 1, 2])),
        ),
    ):
        try:
            table[name] = {"mx.vmap": least(native), "mlxshim": least(mine)}
        except Exception as error:  # what MLX cannot trace has no time
            table[name] = {"mx.vmap": float("nan"), "mlxshim": least(mine)}
            print(f"mx.vmap, {name}: {type(error).__name__}: {error}"[:160], file=sys.stderr)
    return table


def run(
    contenders: dict[str, Thunk],
    options: argparse.Namespace,
    labels: dict[str, Any],
    too_big: bool,
    check: bool,
) -> list[dict[str, Any]]:
    rows = []
    want = contenders["loop"]() if check else None
    for name, fun in contenders.items():
        row: dict[str, Any] = {**labels, "contender": name}
        rows.append(row)
        if name == "mx.vmap" and too_big:
            row["note"] = "skipped: the scores would not fit"
        else:
            try:
                if want is not None:
                    row["error"] = error_of(fun(), want)
                row.update(measure(fun, options.repeats, options.seconds))
            except Exception as error:
                row["note"] = f"{type(error).__name__}: {error}"[:160]
        ms, piped, mib = (row.get(key, float("nan")) for key in ("ms", "pipelined_ms", "mib"))
        figures = f"{ms:9.3f} ms {piped:9.3f} pipelined ms {mib:9.1f} MiB"
        checked = f"  error {row['error']:.1e}" if "error" in row else ""
        where = f"{labels['section']:<14} L={labels['length']:<6}"
        print(f"{where} {name:<26} {figures}{checked}  {row.get('note', '')}", flush=True)
    return rows


def draw(rows: list[dict[str, Any]], path: str, title: str) -> None:
    plt = pyplot()

    figure, axes = plt.subplots(2, 2, figsize=(11, 8), sharex=True)
    for column, section in enumerate(("forward", "grad")):
        for line, (key, label) in enumerate(((TIME, "milliseconds"), ("mib", "peak MiB"))):
            axis = axes[line][column]
            for name in ("by hand", "mlxshim", "mx.vmap", "loop"):
                points = [
                    (r["length"], r[key])
                    for r in rows
                    if r["section"] == section and r["contender"] == name and key in r
                ]
                if points:
                    style = "--" if name == "by hand" else "-"
                    axis.plot(*zip(*points), style, marker="o", markersize=4, label=name)
            axis.set(xscale="log", yscale="log", ylabel=label)
            axis.set_title("vmap" if section == "forward" else "vmap(grad)")
            axis.grid(alpha=0.3)
            axis.legend()
    for axis in axes[1]:
        axis.set_xlabel("sequence length")
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def parse() -> argparse.Namespace:
    parser = command_line(__doc__)
    default = "128,256,512,1024,2048,4096,8192" if GPU else "128,256,512,1024"
    parser.add_argument("--lengths", default=default)
    parser.add_argument("--samples", type=int, default=16 if GPU else 4)
    parser.add_argument("--heads", default="32/8" if GPU else "8/2")
    parser.add_argument("--dim", type=int, default=128 if GPU else 64)
    parser.add_argument("--dtype", default="bfloat16" if GPU else "float32")
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=1.5, help="for a contender's calls")
    parser.add_argument("--sections", default="forward,grad,grad-square,decode,trace")
    parser.add_argument("--memory-limit-gib", type=float, default=45.0 if GPU else 6.0)
    parser.add_argument("--only", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    options = parse()
    if options.only:
        print(json.dumps(one_run(options)), file=sys.stdout)
        return
    sizes = {n: getattr(options, n) for n in ("samples", "heads", "dim", "dtype")}
    about = announce("attention", describe_machine(), **sizes)
    rows: list[dict[str, Any]] = []
    trace: dict[str, dict[str, float]] = {}
    for section in options.sections.split(","):
        for length in options.lengths.split(",") if section != "trace" else ["0"]:
            command = [sys.executable, "-m", "benchmarks.attention", *sys.argv[1:]]
            done = subprocess.run(
                [*command, "--only", f"{section}:{length}"], stdout=subprocess.PIPE, text=True
            )
            *table, answer = done.stdout.splitlines() or [""]
            print("\n".join(table), flush=True)
            if done.returncode or not answer.startswith(("[", "{")):
                print(f"{section} L={length}: exit status {done.returncode}", flush=True)
            elif section == "trace":
                trace = json.loads(answer)
            else:
                rows += json.loads(answer)
            save(options.json, {**about, "rows": rows, "trace_us": trace})
    for name, times in trace.items():
        ratio = times["mlxshim"] / times["mx.vmap"]
        native, mine = times["mx.vmap"], times["mlxshim"]
        print(f"trace of {name:<16} mx {native:6.1f} us  mlxshim {mine:6.1f} us  {ratio:.2f}x")
    if options.png:
        title = f"{about['device']}, MLX {mx.__version__}: {options.samples} samples, "
        title += f"{options.heads} heads, D={options.dim}, {options.dtype}, causal"
        draw(rows, options.png, title)


def one_run(options: argparse.Namespace) -> Any:
    """One section at one length; its table goes to the terminal, its rows to the caller."""
    section, length = options.only.split(":")
    if section == "trace":
        return tracing()
    length, n, dim = int(length), options.samples, options.dim
    heads, kv_heads = (int(h) for h in options.heads.split("/"))
    dtype = getattr(mx, options.dtype)
    q, w = (mx.random.normal((n, 1, heads, length, dim)).astype(dtype) for _ in range(2))
    k, v = (mx.random.normal((n, 1, kv_heads, length, dim)).astype(dtype) for _ in range(2))
    mx.eval(q, k, v, w)
    if section == "forward":
        contenders, factor = forward([q, k, v]), 3
    elif section == "decode":
        contenders, factor = decode(q[:, :, :, :1], k[0], v[0]), 0
    else:
        contenders, factor = gradient([q, k, v], w, section == "grad-square"), 7
    too_big = factor * n * heads * length * length * dtype.size / 2**30 > options.memory_limit_gib
    smallest = length == min(int(x) for x in options.lengths.split(","))
    return run(contenders, options, {"section": section, "length": length}, too_big, smallest)


if __name__ == "__main__":
    main()
