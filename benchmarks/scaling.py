"""How time and memory grow: with batch, length, heads, depth, nesting, chunks and calls.

    python -m benchmarks.scaling [--minutes 3] [--only NAME,...] [--json FILE] [--png FILE]

Each series varies one size of vmap(grad) of attention, or of a transformer's per-sample gradients.
The slope is that of the line through log(time) or log(memory) over the larger half of the sizes,
next to what theory says: 1 is linear, 2 quadratic, 0 level. On a CPU time is the process's own.

`chunks` runs all sizes of a chunk in turns, round after round, and compares the least of each: "of
it traces" is what Python takes to trace the function once for each chunk. By the wall clock some of
that passes while the chunk before is computed, on a CPU where a core is free. The soak makes 10 000
calls, half of them with a `vmap` made anew, and reads what MLX and the process hold on the way.
"""

from __future__ import annotations

import functools
import math
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx

import mlxshim

from ._measure import GPU, TIME, describe_machine, measure
from ._model import Shape, losses, weights
from ._program import announce, command_line, pyplot, save

Thunk = Callable[[], list[mx.array]]
Point = tuple[int, Thunk]

DTYPE = mx.bfloat16 if GPU else mx.float32
N, HEADS, KV_HEADS, LENGTH, DIM = (16, 32, 8, 1024, 128) if GPU else (4, 8, 2, 128, 64)


def normal(*shape: int) -> mx.array:
    x = mx.random.normal(shape).astype(DTYPE)
    mx.eval(x)
    return x


def attention_loss(q: mx.array, k: mx.array, v: mx.array, w: mx.array) -> mx.array:
    out = mx.fast.scaled_dot_product_attention(q, k, v, scale=q.shape[-1] ** -0.5, mask="causal")
    return (out * w).astype(mx.float32).sum()


def attention(
    lead: tuple[int, ...] = (N,),
    heads: int = HEADS,
    kv_heads: int = KV_HEADS,
    length: int = LENGTH,
) -> Thunk:
    fun: Any = mlxshim.grad(attention_loss, argnums=[0, 1, 2])
    for _ in lead:
        fun = mlxshim.vmap(fun)
    arrays = [normal(*lead, 1, h, length, DIM) for h in (heads, kv_heads, kv_heads, heads)]
    return lambda: list(fun(*arrays))


def flat(tree: Any) -> list[mx.array]:
    if isinstance(tree, mx.array):
        return [tree]
    return [x for child in (tree.values() if isinstance(tree, dict) else tree) for x in flat(child)]


Grads = Callable[..., Any]


def transformer(layers: int, n: int, length: int = 256 if GPU else 64) -> tuple[Grads, list[Any]]:
    """The gradient of one sample of a transformer; its weights, and n samples."""
    shape = Shape(layers, 16, 4, 64, 2816, 256) if GPU else Shape(layers, 8, 2, 32, 512, 64)
    tree = weights(shape, DTYPE)
    tokens, targets = (mx.random.randint(0, shape.vocabulary, (n, length)) for _ in "ab")
    mx.eval(tokens, targets)

    def loss(tree: Any, x: mx.array, y: mx.array) -> mx.array:
        return losses(tree, x[None], y[None], shape)[0]

    return mlxshim.grad(loss), [tree, tokens, targets]


def per_sample(layers: int, n: int) -> Thunk:
    grads, arguments = transformer(layers, n)
    fun = mlxshim.vmap(grads, in_axes=(None, 0, 0))
    return lambda: flat(fun(*arguments))


def norm_of(grads: Grads) -> Grads:
    """One number for each sample: what is left of a gradient that nobody keeps."""

    def norm(*arguments: Any) -> mx.array:
        squares = [g.astype(mx.float32).square().sum() for g in flat(grads(*arguments))]
        return functools.reduce(mx.add, squares).sqrt()

    return norm


def norms(n: int, chunk: int) -> Thunk:
    grads, arguments = transformer(4, n)
    fun = mlxshim.vmap(norm_of(grads), in_axes=(None, 0, 0), chunk_size=chunk)
    return lambda: [fun(*arguments)]


# Chunks -----------------------------------------------------------------------------------------


def chunks(n: int, length: int, seconds: float) -> list[dict[str, Any]]:
    """chunk_size against all at once, and against chunks compiled by hand, in turns."""
    grads, (tree, tokens, targets) = transformer(4, n, length)
    norm = norm_of(grads)
    whole = mlxshim.vmap(norm, in_axes=(None, 0, 0))
    compiled = mx.compile(whole)
    sizes = [c for c in powers(0, 20) if c <= n]
    parts = {c: [slice(i, i + c) for i in range(0, n, c)] for c in sizes}
    chunked = {c: mlxshim.vmap(norm, in_axes=(None, 0, 0), chunk_size=c) for c in sizes}

    def by_hand(c: int) -> None:
        for part in parts[c]:
            mx.eval(compiled(tree, tokens[part], targets[part]))

    def timed(fun: Callable[[], object]) -> tuple[float, float]:
        """Milliseconds by the wall clock, and as the others of this module are."""
        begin, own = time.perf_counter(), time.process_time()
        fun()
        mx.synchronize()
        wall, own = time.perf_counter() - begin, time.process_time() - own
        return wall * 1e3, (wall if GPU else own) * 1e3

    times: dict[int, list[tuple[float, float, float, float]]] = {c: [] for c in sizes}
    peaks: dict[int, float] = {}
    start = time.perf_counter()
    while len(times[n]) < 8 or time.perf_counter() - start < seconds:
        for c in sizes:
            active = mx.get_active_memory()
            mx.reset_peak_memory()
            # Once before it counts: buffers of another size are of no use to this one.
            for _ in range(2):
                wall, took = timed(lambda c=c: mx.eval(chunked[c](tree, tokens, targets)))
            peaks[c] = (mx.get_peak_memory() - active) / 2**20
            _, trace = timed(lambda c=c: [whole(tree, tokens[p], targets[p]) for p in parts[c]])
            times[c].append((wall, took, trace, timed(lambda c=c: by_hand(c))[1]))
    # The first round warms up, and compiles.
    least = {c: [min(column) for column in zip(*times[c][1:])] for c in sizes}
    all_wall, all_own = least[n][:2]
    return [
        {
            "length": length,
            "samples": n,
            "chunk": c,
            "ms": own,
            "wall_ms": wall,
            "ratio": own / all_own,
            "wall_ratio": wall / all_wall,
            "of_it_traces": trace / all_own,
            "compiled": compiled / all_own,
            "mib": peaks[c],
        }
        for c, (wall, own, trace, compiled) in least.items()
    ]


def powers(first: int, last: int) -> list[int]:
    return [2**i for i in range(first, last + 1)]


def nested(depth: int) -> Thunk:
    """The same 16 samples, as a batch of batches."""
    lead = [1] * depth
    for i in range(4):
        lead[i % depth] *= 2
    return attention(tuple(lead), length=LENGTH // 2)


def series() -> dict[str, tuple[str, str, Callable[[], Iterator[Point]]]]:
    """name -> what varies, what theory says, the points."""
    lengths = powers(8, 13) if GPU else powers(6, 10)
    fused = "time 2, memory 1 (fused)" if GPU else "time 2, memory 2 (scores are kept)"
    samples = 64 if GPU else 16
    return {
        "batch": (
            "samples",
            "time 1, memory 1",
            lambda: ((n, attention((n,))) for n in powers(0, 6 if GPU else 4)),
        ),
        "length": ("L", fused, lambda: ((n, attention((2,), length=n)) for n in lengths)),
        "heads": (
            "query heads to a K/V head",
            "time 0, memory 0",
            lambda: (
                (HEADS // h, attention(kv_heads=h)) for h in reversed(powers(0, 5 if GPU else 3))
            ),
        ),
        "depth": (
            "layers",
            "time 1, memory 1",
            lambda: ((n, per_sample(n, 4)) for n in powers(0, 4)),
        ),
        "nesting": (
            "vmaps around the same 16 samples",
            "time 0, memory 0",
            lambda: ((d, nested(d)) for d in (1, 2, 3, 4)),
        ),
        "batch in chunks of 4": (
            "samples",
            "time 1, memory 0",
            lambda: ((n, norms(n, 4)) for n in powers(2, int(math.log2(samples)))),
        ),
    }


def slope(rows: list[dict[str, Any]], key: str) -> float:
    half = rows[len(rows) // 2 - (len(rows) < 4) :]
    xs = [math.log(r["size"]) for r in half]
    ys = [math.log(max(r[key], 1e-9)) for r in half]
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    covariance = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys))
    return covariance / sum((x - mean_x) ** 2 for x in xs)


def soak(calls: int) -> list[dict[str, float]]:
    """Memory while the same small work is done over and over."""

    def loss(w: mx.array, q: mx.array, k: mx.array) -> mx.array:
        x = mx.fast.rms_norm(q, w, 1e-5)
        return (mx.fast.scaled_dot_product_attention(x, k, k, scale=0.3) ** 2).sum()

    w, q, k = normal(16), normal(4, 1, 4, 16, 16), normal(4, 1, 2, 16, 16)

    def make() -> Callable[..., mx.array]:
        return mlxshim.vmap(mlxshim.grad(lambda *xs: loss(*xs)), in_axes=(None, 0, 0))

    kept, readings = make(), []
    for i in range(1, calls + 1):
        mx.eval((kept if i % 2 else make())(w, q, k))
        if i % (calls // 10) == 0:
            mx.synchronize()
            mx.clear_cache()
            readings.append(
                {"calls": i, "mlx_mib": mx.get_active_memory() / 2**20, "process_mib": resident()}
            )
    return readings


def resident() -> float:
    """MiB that the process holds now (on macOS: has held at most)."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize() / 2**20
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def draw(result: dict[str, Any], path: str, title: str) -> None:
    plt = pyplot()

    figure, grid = plt.subplots(2, 4, figsize=(17, 7.5))
    for axis, (name, one) in zip(grid.flat, result["series"].items()):
        rows = one["rows"]
        sizes = [r["size"] for r in rows]
        axis.plot(sizes, [r[TIME] for r in rows], "o-", label="ms")
        axis.plot(sizes, [r["mib"] for r in rows], "s--", label="MiB")
        axis.set(title=name, xlabel=one["varies"], xscale="log", yscale="log")
        values = [r[key] for r in rows for key in (TIME, "mib")]
        axis.set_ylim(min(values) / 2, max(values) * 2)  # what is level looks it
        axis.grid(alpha=0.3)
        axis.legend()
    axis = grid.flat[-2]
    for length in dict.fromkeys(r["length"] for r in result["chunks"]):
        some = [r for r in result["chunks"] if r["length"] == length]
        (line,) = axis.plot(
            [r["chunk"] for r in some], [r["ratio"] for r in some], "o-", label=f"L {length}"
        )
        wall = [r["wall_ratio"] for r in some]
        axis.plot([r["chunk"] for r in some], wall, ":", color=line.get_color())
    if result["chunks"]:
        axis.set(title="chunk_size (dotted: wall clock)", xlabel="samples at a time", xscale="log")
        axis.set(ylabel="time against all at once", ylim=(0, None))
        axis.axhline(1.1, color="gray", lw=0.8)
        axis.legend()
    if result["soak"]:
        axis = grid.flat[-1]
        for key in ("mlx_mib", "process_mib"):
            axis.plot(
                [r["calls"] for r in result["soak"]], [r[key] for r in result["soak"]], label=key
            )
        axis.set(title="soak", xlabel="calls", ylim=(0, None))
        axis.legend()
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--only", default="", help="series, chunks or soak")
    parser.add_argument("--calls", type=int, default=10_000, help="of the soak")
    options = parser.parse_args()
    about = announce(
        "scaling",
        describe_machine(),
        dtype=str(DTYPE),
        attention={"n": N, "heads": HEADS, "kv_heads": KV_HEADS, "length": LENGTH, "dim": DIM},
    )
    wanted = options.only.split(",") if options.only else [*series(), "chunks", "soak"]
    result: dict[str, Any] = {**about, "series": {}, "chunks": [], "soak": []}
    seconds = options.minutes * 60 / 60
    for name, (varies, theory, points) in series().items():
        if name not in wanted:
            continue
        rows: list[dict[str, Any]] = []
        for size, fun in points():
            found = measure(fun, 30, seconds / 2)
            rows.append({"size": size, **found})
            print(
                f"{name:<22} {size:6d} {found[TIME]:10.3f} ms {found['mib']:10.2f} MiB", flush=True
            )
        slopes = {"ms": slope(rows, TIME), "mib": slope(rows, "mib")}
        print(
            f"{name:<22} slope of time {slopes['ms']:.2f}, of memory {slopes['mib']:.2f}; "
            f"theory: {theory}",
            flush=True,
        )
        result["series"][name] = {
            "varies": varies, "theory": theory, "slopes": slopes, "rows": rows,
        }  # fmt: skip
    for length in ((64, 256, 1024) if GPU else (16, 64, 256)) if "chunks" in wanted else ():
        for row in chunks(64 if GPU else 16, length, seconds * 6):
            result["chunks"].append(row)
            print(
                f"L {length:5d}, {row['chunk']:3d} at a time {row['ms']:10.3f} ms, "
                f"{row['ratio']:.2f} of all at once ({row['wall_ratio']:.2f} by the wall clock), "
                f"of it traces {row['of_it_traces']:.2f}; "
                f"compiled by hand {row['compiled']:.2f}; {row['mib']:8.2f} MiB",
                flush=True,
            )
    if "soak" in wanted:
        begin = time.perf_counter()
        result["soak"] = soak(options.calls)
        for row in result["soak"]:
            print(
                f"soak {row['calls']:6.0f} calls: MLX {row['mlx_mib']:.3f} MiB, process "
                f"{row['process_mib']:.1f} MiB"
            )
        print(f"soak: {time.perf_counter() - begin:.1f} s")
    save(options.json, result)
    if options.png:
        draw(result, options.png, f"{about['device']}, MLX {mx.__version__}")


if __name__ == "__main__":
    main()
