"""Peers in one run: mlxshim, `mx.vmap`, MLX by hand, a loop, `torch.func`, and JAX under jit.

    python -m benchmarks.peers [--minutes 4] [--only NAME;...] [--json FILE] [--png FILE]

Attention (forward, gradient, Hessian product), a norm's gradient, the per-sample gradients of a
12-layer grouped-query transformer and of a CNN, an ensemble of MLPs, Jacobians. In bfloat16 on a
GPU where the task is a transformer's, else float32; on a CPU smaller, and one thread for each.

Each contender runs in a process of its own, and in a new one after a crash. `alone` is the median
of single calls, synchronised, and `best` the least of them, of which the ratios are; `piped` is a
call's share of several that are waited for once. Memory is
the peak above the inputs: as MLX's and PyTorch's allocators count it, and as XLA's compiler plans
it. JAX is timed after compilation, which is reported as `first`. `error` compares a sketch of the
results with the loop's. A framework that is not installed is said to be that.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import selectors
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

from ._program import announce, command_line, pyplot, save

MODULES = {"mlx": "_tasks_mlx", "torch": "_tasks_torch", "jax": "_tasks_jax"}
CONTENDERS = {
    "MLX loop": "mlx",
    "MLX by hand": "mlx",
    "mlxshim": "mlx",
    "mlxshim, compiled": "mlx",
    "mx.vmap": "mlx",
    "torch.func": "torch",
    "jax": "jax",
}


# The worker -------------------------------------------------------------------------------------


def work(contender: str, tasks: list[str], seconds: float) -> None:
    """One line of JSON before each task, and one after."""
    tool = importlib.import_module(f".{MODULES[CONTENDERS[contender]]}", __package__)
    from . import _tasks

    sizes = _tasks.GPU_SIZES if tool.GPU else _tasks.CPU_SIZES
    for task in tasks:
        print(json.dumps({"begins": task}), flush=True)
        row: dict[str, Any] = {"contender": contender, "task": task, "size": sizes[task]}
        try:
            begin = time.perf_counter()
            runner = tool.Runner(contender, task, sizes[task])
            out = runner.launch()
            runner.wait(out)
            row["first_s"] = time.perf_counter() - begin
            row["sketch"] = _tasks.sketch(runner.numpy(out))
            size = runner.bytes(out)
            del out
            row["mib"] = runner.peak_mib()
            row.update(timed(runner, seconds, size))
            del runner
        except Exception as error:
            row["note"] = f"{type(error).__name__}: {error}".replace("\n", " ")[:160]
        print(json.dumps(row), flush=True)


def timed(runner: Any, seconds: float, size: int) -> dict[str, float]:
    alone: list[float] = []
    start = time.perf_counter()
    while len(alone) < 3 or (len(alone) < 200 and time.perf_counter() - start < seconds / 2):
        begin = time.perf_counter()
        runner.wait(runner.launch())
        alone.append(time.perf_counter() - begin)
    median = statistics.median(alone)
    # Results of calls that wait for each other lie in memory together.
    calls = max(2, min(20, int(seconds / 6 / median), int(6 * 2**30 / max(size, 1))))
    shares = []
    for _ in range(3):
        begin = time.perf_counter()
        for _ in range(calls):
            out = runner.launch()
        runner.wait(out)
        shares.append((time.perf_counter() - begin) / calls)
    return {
        "ms": median * 1e3,
        "best_ms": min(alone) * 1e3,
        "piped_ms": statistics.median(shares) * 1e3,
        "calls": len(alone),
    }


# The driver -------------------------------------------------------------------------------------


def environment() -> dict[str, str]:
    env = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    # On a CPU: one thread for everybody. These do not touch a GPU's work.
    env.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1")
    flags = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    env["XLA_FLAGS"] = f"{env.get('XLA_FLAGS', '')} {flags}".strip()
    return env


def results(contender: str, tasks: list[str], seconds: float, limit: float) -> Iterator[Any]:
    """The rows of one contender; a process that dies or hangs costs it the task it was at."""
    left = list(tasks)
    while left:
        command = [sys.executable, "-m", "benchmarks.peers", "--worker", contender]
        command += ["--tasks", json.dumps(left), "--seconds", str(seconds)]
        current, why = left[0], ""
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
        ) as child:
            assert child.stderr is not None
            try:
                for line in lines_until(child, limit):
                    said = json.loads(line) if line.startswith("{") else {}
                    if "begins" in said:
                        current = said["begins"]
                    elif "task" in said:
                        left.remove(said["task"])
                        yield said
            except TimeoutError:
                child.kill()
                why = f"no answer in {limit:.0f} s"
            child.wait()
            said_last = (child.stderr.read().strip().splitlines() or [""])[-1]
        if left:
            why = why or f"exit status {child.returncode}: {said_last}"[:160]
            if "No module named" in why:
                for task in left:
                    yield {"contender": contender, "task": task, "note": "not installed"}
                return
            left.remove(current)
            yield {"contender": contender, "task": current, "note": why}


def lines_until(child: subprocess.Popen[str], limit: float) -> Iterator[str]:
    """The child's lines, until it ends; TimeoutError if it is silent for `limit` seconds."""
    assert child.stdout is not None
    with selectors.DefaultSelector() as selector:
        selector.register(child.stdout, selectors.EVENT_READ)
        while selector.select(limit):
            line = child.stdout.readline()
            if not line:
                return
            yield line
    raise TimeoutError


def error_of(row: dict[str, Any], loop: dict[str, Any] | None) -> float | None:
    if not loop or "sketch" not in row or "sketch" not in loop:
        return None
    want = sum(x * x for x in loop["sketch"]) ** 0.5
    return sum((x - y) ** 2 for x, y in zip(row["sketch"], loop["sketch"])) ** 0.5 / want


def versions() -> dict[str, Any]:
    from importlib.metadata import PackageNotFoundError, version

    import mlxshim

    found: dict[str, Any] = {"python": platform.python_version(), "mlxshim": mlxshim.__version__}
    for name in ("mlx", "torch", "jax", "jaxlib", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    try:
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        found["device"] = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    except OSError:
        found["device"] = ""
    found["device"] = found["device"] or platform.processor() or platform.machine()
    return found


def report(rows: list[dict[str, Any]]) -> str:
    """A Markdown table for each task, the times as multiples of mlxshim's."""
    text = []
    for task in dict.fromkeys(row["task"] for row in rows):
        some = [row for row in rows if row["task"] == task]
        mine = next((r.get("best_ms") for r in some if r["contender"] == "mlxshim"), None)
        text += [f"\n**{task}**\n", "| | alone | best | piped | memory | against mlxshim | error |"]
        text.append("|---|---|---|---|---|---|---|")
        for r in some:
            if "ms" not in r:
                text.append(f"| {r['contender']} | {r.get('note', '')} | | | | |")
                continue
            ratio = f"{r['best_ms'] / mine:.2f}x" if mine else ""
            memory = f"{r['mib']:.0f} MiB" if r.get("mib") is not None else ""
            error = f"{r['error']:.0e}" if r.get("error") is not None else ""
            times = " | ".join(f"{r[key]:.2f} ms" for key in ("ms", "best_ms", "piped_ms"))
            text.append(f"| {r['contender']} | {times} | {memory} | {ratio} | {error} |")
    return "\n".join(text)


def draw(rows: list[dict[str, Any]], path: str, title: str) -> None:
    plt = pyplot()

    tasks = list(dict.fromkeys(row["task"] for row in rows))
    figure, grid = plt.subplots(2, -(-len(tasks) // 2), figsize=(16, 7.5), squeeze=False)
    for axis, task in zip(grid.flat, tasks):
        some = [r for r in rows if r["task"] == task and "ms" in r]
        names = [r["contender"] for r in some]
        axis.barh(names[::-1], [r["best_ms"] for r in some][::-1])
        axis.set(title=task, xlabel="ms, best", xscale="log")
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--minutes", type=float, default=3.0, help="about, the start-up included")
    parser.add_argument("--only", default="", help="tasks, or beginnings of their names")
    parser.add_argument("--contenders", default=";".join(CONTENDERS), help="separated by ;")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--tasks", help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.worker, json.loads(options.tasks), options.seconds)
        return
    from . import _tasks

    wanted = tuple(name.strip() for name in options.only.split(";")) if options.only else ("",)
    tasks = [task for task in _tasks.CPU_SIZES if task.startswith(wanted)]
    names = [name.strip() for name in options.contenders.split(";")]
    about = announce("peers", versions())
    deadline = time.perf_counter() + options.minutes * 60
    rows: list[dict[str, Any]] = []
    loops: dict[str, dict[str, Any]] = {}
    for i, name in enumerate(names):
        # What is left is shared by those that are left; a start and its warm-ups take a while.
        share = (deadline - time.perf_counter()) / (len(names) - i)
        seconds = min(2.0, max(0.05, (share - 6) / len(tasks)))
        for row in results(name, tasks, seconds, limit=max(90.0, share)):
            if name == "MLX loop":
                loops[row["task"]] = row
            row["error"] = error_of(row, loops.get(row["task"]))
            rows.append(row)
            ms, piped, mib = (row.get(k) or float("nan") for k in ("ms", "piped_ms", "mib"))
            print(
                f"{row['task']:<30} {name:<18} {ms:10.3f} ms {piped:10.3f} piped {mib:9.1f} MiB  "
                f"first {row.get('first_s', float('nan')):6.2f} s  "
                f"error {row['error'] if row['error'] is not None else float('nan'):.0e}  "
                f"{row.get('note', '')}",
                flush=True,
            )
    rows.sort(key=lambda row: tasks.index(row["task"]))
    print(report(rows))
    save(options.json, {**about, "rows": rows})
    if options.png:
        draw(rows, options.png, f"{about['device']}, MLX {about['mlx']}")


if __name__ == "__main__":
    main()
