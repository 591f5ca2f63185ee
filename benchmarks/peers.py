"""Peers in one run: mlxshim, `mx.vmap`, MLX by hand, a loop, `torch.func`, and JAX under jit.

    python -m benchmarks.peers [--minutes 3] [--only NAME;...] [--json FILE] [--png FILE]

Attention (forward, gradient, Hessian product), a norm's gradient, the per-sample gradients of a
12-layer grouped-query transformer and of a CNN, an ensemble of MLPs, Jacobians. In bfloat16 on a
GPU where the task is a transformer's, else float32; on a CPU smaller, and one thread is asked for.

Each contender runs in a process of its own, and in a new one after a crash. The run is over after
`--minutes`: no contender may take more than half of what is left, no task more than `--patience`.
Every result is in the file as soon as it is there. With `--warm` every task of MLX's contenders is
called once before anything is timed, many at a time: on CUDA, where MLX compiles a kernel for
seconds and finds it on the disk afterwards.

`alone` is the median of single calls, synchronised, and `best` the least of them, of which the
ratios are; on a CPU they are of `own`, the median of the process's time on all its threads, which
other work on the machine lengthens less. `piped` is a call's share of several that are waited for
once. Memory is the peak above the inputs: as MLX's and PyTorch's allocators count it, and as XLA's
compiler plans it. JAX is timed after compilation, which is reported as `first`. `error` compares a
sketch of the results with the loop's. A framework that is not installed is said to be that.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import platform
import selectors
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ._program import announce, command_line, pyplot, save

MODULES = {"mlx": "_tasks_mlx", "torch": "_tasks_torch", "jax": "_tasks_jax"}
#: The peers before the variants of ours: who comes last has least time if others hang.
CONTENDERS = {
    "MLX loop": "mlx",
    "mlxshim": "mlx",
    "torch.func": "torch",
    "jax": "jax",
    "MLX by hand": "mlx",
    "mlxshim, compiled": "mlx",
    "MLX by hand, compiled": "mlx",
    "mx.vmap": "mlx",
}
#: Shares of the time: imports and XLA's compilation take more than MLX's start.
SHARES = {"mlx": 1, "torch": 2, "jax": 3}


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
            if not seconds:
                continue
            row["sketch"] = _tasks.sketch(runner.numpy(out))
            size = runner.bytes(out)
            del out
            row["mib"] = runner.peak_mib()
            row.update(timed(runner, seconds, size))
            if tool.GPU:
                del row["own_ms"]  # the host's alone
            del runner
        except Exception as error:
            row["note"] = f"{type(error).__name__}: {error}".replace("\n", " ")[:160]
        print(json.dumps(row), flush=True)


def timed(runner: Any, seconds: float, size: int) -> dict[str, float]:
    alone: list[float] = []
    own: list[float] = []
    start = time.perf_counter()
    while len(alone) < 3 or (len(alone) < 200 and time.perf_counter() - start < seconds / 2):
        begin, before = time.perf_counter(), time.process_time()
        runner.wait(runner.launch())
        alone.append(time.perf_counter() - begin)
        own.append(time.process_time() - before)
    median = statistics.median(alone)
    # Results of calls that wait for each other lie in memory together.
    calls = max(2, min(20, int(seconds / 6 / median), int(6 * 2**30 / max(size, 1))))
    shares = []
    for _ in range(3 if median * calls < seconds else 1):
        begin = time.perf_counter()
        for _ in range(calls):
            out = runner.launch()
        runner.wait(out)
        shares.append((time.perf_counter() - begin) / calls)
    return {
        "ms": median * 1e3,
        "best_ms": min(alone) * 1e3,
        "own_ms": statistics.median(own) * 1e3,
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


def warm(names: list[str], tasks: list[str], patience: float, end: float) -> None:
    """Call every task of MLX's contenders once, as many at a time as there are processors.

    What is not through with it at `end` compiles when its turn has come.
    """
    pairs = [(name, task) for task in tasks for name in names if CONTENDERS[name] == "mlx"]

    def call(pair: tuple[str, str]) -> None:
        command, left = worker(pair[0], [pair[1]], 0.0), min(patience, end - time.perf_counter())
        with contextlib.suppress(subprocess.TimeoutExpired):
            if left > 0:
                subprocess.run(command, capture_output=True, env=environment(), timeout=left)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(call, pairs))


def worker(contender: str, tasks: list[str], seconds: float) -> list[str]:
    command = [sys.executable, "-m", "benchmarks.peers", "--worker", contender]
    return [*command, "--tasks", json.dumps(tasks), "--seconds", str(seconds)]


def results(
    contender: str, tasks: list[str], seconds: float, limit: float, patience: float = 60.0
) -> Iterator[Any]:
    """The rows of one contender, in no more than `limit` seconds.

    A process that dies, or is silent for `patience` seconds, costs it the task it was at.
    """
    left, end = list(tasks), time.perf_counter() + limit
    while left and time.perf_counter() < end:
        command, current, why = worker(contender, left, seconds), left[0], ""
        with (
            tempfile.TemporaryFile() as errors,  # a pipe that nobody reads would stop the writer
            subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=errors, env=environment()
            ) as child,
        ):
            try:
                for line in lines_until(child, end, patience):
                    said = json.loads(line) if line.startswith(b"{") else {}
                    if "begins" in said:
                        current = said["begins"]
                    elif "task" in said:
                        left.remove(said["task"])
                        yield said
                child.wait(10)
            except (TimeoutError, subprocess.TimeoutExpired):
                child.kill()
                child.wait()
                gone = limit - (end - time.perf_counter())
                why = f"no answer in {min(patience, gone):.0f} s"
            errors.seek(0)
            said_last = (errors.read().decode(errors="replace").strip().splitlines() or [""])[-1]
        if left:
            why = why or f"exit status {child.returncode}: {said_last}"[:160]
            if "No module named" in why:
                for task in left:
                    yield {"contender": contender, "task": task, "note": "not installed"}
                return
            left.remove(current)
            yield {"contender": contender, "task": current, "note": why}
    for task in left:
        yield {"contender": contender, "task": task, "note": f"not begun in {limit:.0f} s"}


def lines_until(child: subprocess.Popen[bytes], end: float, patience: float) -> Iterator[bytes]:
    """The child's lines, until it ends; TimeoutError if it is silent, or not through in time.

    Read from the pipe itself: a file object would hold back a second line that came with the first.
    """
    assert child.stdout is not None
    pipe, rest = child.stdout.fileno(), b""
    with selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        while selector.select(max(0.0, min(patience, end - time.perf_counter()))):
            read = os.read(pipe, 1 << 16)
            if not read:
                return
            *whole, rest = (rest + read).split(b"\n")
            yield from whole
    raise TimeoutError


def comparable(row: dict[str, Any], loop: dict[str, Any] | None) -> None:
    """Add its error; a row of other sizes (its framework found no GPU, or was alone to find one)
    loses its times."""
    row["error"] = None
    if not loop or "sketch" not in row or "sketch" not in loop:
        return
    if row["size"] != loop["size"]:
        for key in ("ms", "best_ms", "own_ms", "piped_ms", "mib", "sketch"):
            row.pop(key, None)
        row["note"] = "not on the device of the others"
        return
    want = sum(x * x for x in loop["sketch"]) ** 0.5
    row["error"] = sum((x - y) ** 2 for x, y in zip(row["sketch"], loop["sketch"])) ** 0.5 / want


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
        gpus = subprocess.run(query, capture_output=True, text=True).stdout.split("\n")
    except OSError:
        gpus = [""]
    found["device"] = gpus[0].strip() or processor()
    return found


def processor() -> str:
    try:
        with open("/proc/cpuinfo") as about:
            names = [line.partition(":")[2] for line in about if line.startswith("model name")]
    except OSError:
        names = []
    return names[0].strip() if names else platform.processor() or platform.machine()


def least_of(rows: list[dict[str, Any]]) -> str:
    """Which time of these rows is compared."""
    timed = [row for row in rows if "ms" in row]
    return "own_ms" if timed and all("own_ms" in row for row in timed) else "best_ms"


def report(rows: list[dict[str, Any]]) -> str:
    """A Markdown table for each task, the times as multiples of mlxshim's."""
    text = []
    for task in dict.fromkeys(row["task"] for row in rows):
        some = [row for row in rows if row["task"] == task]
        least = least_of(some)
        mine = next((r.get(least) for r in some if r["contender"] == "mlxshim"), None)
        head = f"| | alone | {least[:-3]} | piped | memory | against mlxshim | error |"
        text += [f"\n**{task}**\n", head, "|---|---|---|---|---|---|---|"]
        for r in some:
            if "ms" not in r:
                text.append(f"| {r['contender']} | {r.get('note', '')} | | | | |")
                continue
            ratio = f"{r[least] / mine:.2f}x" if mine else ""
            memory = f"{r['mib']:.0f} MiB" if r.get("mib") is not None else ""
            error = f"{r['error']:.0e}" if r.get("error") is not None else ""
            times = " | ".join(f"{r[key]:.2f} ms" for key in ("ms", least, "piped_ms"))
            text.append(f"| {r['contender']} | {times} | {memory} | {ratio} | {error} |")
    return "\n".join(text)


def draw(rows: list[dict[str, Any]], path: str, title: str) -> None:
    plt = pyplot()

    tasks = list(dict.fromkeys(row["task"] for row in rows))
    figure, grid = plt.subplots(2, -(-len(tasks) // 2), figsize=(16, 7.5), squeeze=False)
    for axis, task in zip(grid.flat, tasks):
        some = [r for r in rows if r["task"] == task and "ms" in r]
        names = [r["contender"] for r in some]
        least = least_of(some)
        bars = axis.barh(names[::-1], [r[least] for r in some][::-1])
        axis.bar_label(bars, fmt="%.3g", padding=2)
        axis.set(title=task, xlabel=f"ms, {least[:-3]}")
        axis.margins(x=0.2)
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--minutes", type=float, default=3.0, help="at most, the start-up included")
    parser.add_argument("--patience", type=float, default=60.0, help="seconds for one task")
    parser.add_argument("--warm", action="store_true", help="compile all kernels before")
    parser.add_argument("--only", default="", help="tasks, or beginnings of their names; by ;")
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
    asked = [name.strip() for name in options.contenders.split(";")]
    names = [name for name in CONTENDERS if name in asked]
    if not tasks or set(asked) - set(names):
        parser.error(f"the tasks are {list(_tasks.CPU_SIZES)}, the contenders {list(CONTENDERS)}")
    about = announce("peers", versions())
    deadline = time.perf_counter() + options.minutes * 60
    if options.warm:
        warm(names, tasks, options.patience, deadline - options.minutes * 30)
    rows: list[dict[str, Any]] = []
    loops: dict[str, dict[str, Any]] = {}
    for i, name in enumerate(names):
        left = deadline - time.perf_counter()
        shares = [SHARES[CONTENDERS[other]] for other in names[i:]]
        share = left * shares[0] / sum(shares)
        # The first of MLX's compiles kernels that the others then find on the disk.
        limit = left if i == len(names) - 1 else left / 2
        # Half of a share is for the start, compilation, inputs and warm-ups.
        seconds = min(2.0, max(0.05, share / 2 / len(tasks) / shares[0]))
        for row in results(name, tasks, seconds, limit, options.patience):
            if name == "MLX loop":
                loops[row["task"]] = row
            comparable(row, loops.get(row["task"]))
            rows.append(row)
            rows.sort(key=lambda row: tasks.index(row["task"]))
            save(options.json, {**about, "rows": rows})
            ms, piped, mib = (row.get(k) or float("nan") for k in ("ms", "piped_ms", "mib"))
            print(
                f"{row['task']:<30} {name:<18} {ms:10.3f} ms {piped:10.3f} piped {mib:9.1f} MiB  "
                f"first {row.get('first_s', float('nan')):6.2f} s  "
                f"error {row['error'] if row['error'] is not None else float('nan'):.0e}  "
                f"{row.get('note', '')}",
                flush=True,
            )
    print(report(rows))
    if options.png:
        draw(rows, options.png, f"{about['device']}, MLX {about['mlx']}")


if __name__ == "__main__":
    main()
