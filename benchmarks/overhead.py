"""What a transform costs where there is nothing to transform: microseconds of one call.

    python -m benchmarks.overhead [--json FILE] [--png FILE] [--minutes 0.5] [--cold] [--path gpu]

The function returns its argument, or a sum of it; nothing is evaluated. Each transform of mlxshim
is called in turn with MLX's own of the same name, in one run; the median of all calls. "difference"
is what mlxshim adds. A call within another transform adds less: what is intercepted is then in
place.

With --cold as much memory as caches hold is written before each call: so a call finds them that
comes after other work, and was waited for. On a GPU fused operations are nodes of ours in a vmap;
`--path gpu` has them so on any machine, as `benchmarks.trace` does.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import mlx.core as mx

import mlxshim

from ._measure import describe_machine
from ._program import announce, command_line, pyplot, save
from .trace import stand_in_for_a_gpu

Call = Callable[[], Any]


def interleaved(calls: list[Call], seconds: float, cold: bool = False) -> list[float]:
    """The median microseconds of each, called in turn."""
    times: list[list[int]] = [[] for _ in calls]
    memory, line = bytearray(8 << 20), 64
    ones = b"1" * (len(memory) // line)
    for call in calls:
        for _ in range(100):
            call()
    clock, end = time.perf_counter_ns, time.perf_counter() + seconds
    while time.perf_counter() < end:
        for call, column in zip(calls, times):
            if cold:
                memory[::line] = ones
            begin = clock()
            call()
            column.append(clock() - begin)
    return [statistics.median(column) / 1e3 for column in times]


def cases() -> dict[str, Callable[[Any], Call]]:
    """Name -> (a module with transforms) -> the call."""
    xs, x = mx.ones((4, 3)), mx.ones((3,))
    q = mx.ones((2, 1, 4, 8, 16), mx.bfloat16)
    weights = {"w": mx.ones((4, 3)), "b": mx.ones((4, 3))}
    mx.eval(xs, x, q, weights)
    table: dict[str, Callable[[Any], Call]] = {}

    def of(name: str, make: Callable[[Any], Callable[..., Any]], *args: Any) -> None:
        table[name] = lambda lib: functools.partial(make(lib), *args)

    def first(*args: mx.array) -> mx.array:
        return args[0]

    def total(*args: mx.array) -> mx.array:
        return args[0].sum()

    for n in range(1, 6):
        of(f"vmap, {n} arguments", lambda lib: lib.vmap(first), *[xs] * n)
    of("vmap, x + 1", lambda lib: lib.vmap(lambda a: a + 1), xs)
    of("vmap, a list of results", lambda lib: lib.vmap(lambda a: [a, a.sum()]), xs)
    shared, tree = (None, 0), {"w": 0, "b": 0}
    of("vmap, in_axes=(None, 0)", lambda lib: lib.vmap(lambda a, b: b, in_axes=shared), x, xs)
    of("vmap, a dict", lambda lib: lib.vmap(lambda p: p["w"], in_axes=tree), weights)
    of("vmap(vmap)", lambda lib: lib.vmap(lib.vmap(first)), xs)

    def attend(q: mx.array) -> mx.array:
        return mx.fast.scaled_dot_product_attention(q, q, q, scale=0.25)

    of("vmap, one attention", lambda lib: lib.vmap(attend), q)

    def normed(a: mx.array, w: mx.array) -> mx.array:
        return mx.fast.rms_norm(a, w, 1e-5)

    of("vmap, one rms_norm", lambda lib: lib.vmap(normed, in_axes=(0, None)), xs, x)
    for n in range(1, 6):
        of(f"grad, {n} arguments", lambda lib: lib.grad(total), *[x] * n)
    of("grad, a dict", lambda lib: lib.grad(lambda p: p["w"].sum()), weights)
    of("grad, argnums=[0, 1]", lambda lib: lib.grad(total, argnums=[0, 1]), x, x)
    of("value_and_grad", lambda lib: lib.value_and_grad(total), x)
    of("value_and_grad, a dict", lambda lib: lib.value_and_grad(lambda p: p["w"].sum()), weights)
    of("vmap(grad)", lambda lib: lib.vmap(lib.grad(total)), xs)
    of("grad(vmap)", lambda lib: lib.grad(lambda a: lib.vmap(first)(a).sum()), xs)
    of("vjp", lambda lib: lambda c: lib.vjp(first, c, c), [x])
    of("jvp", lambda lib: lambda c: lib.jvp(first, c, c), [x])
    return table


def draw(rows: list[dict[str, Any]], path: str, title: str) -> None:
    plt = pyplot()

    figure, axis = plt.subplots(figsize=(7, 0.3 * len(rows) + 1))
    names = [row["section"] for row in rows][::-1]
    axis.barh(names, [row["mlxshim"] for row in rows][::-1], label="mlxshim")
    axis.barh(names, [row["mlx"] for row in rows][::-1], label="MLX", height=0.4)
    axis.set(title=title, xlabel="µs of one call")
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--minutes", type=float, default=0.5)
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--path", choices=["device", "gpu"], default="device")
    options = parser.parse_args()
    if options.path == "gpu":
        stand_in_for_a_gpu()
    about = announce("overhead", describe_machine(), cold=options.cold, path=options.path)
    table, rows = cases(), []
    for name, make in table.items():
        seconds = options.minutes * 60 / len(table)
        mlx, ours = interleaved([make(mx), make(mlxshim)], seconds, options.cold)
        rows.append({"section": name, "mlx": mlx, "mlxshim": ours, "difference": ours - mlx})
        print(
            f"{name:<26} MLX {mlx:7.2f}   mlxshim {ours:7.2f}   {ours - mlx:+7.2f} µs", flush=True
        )
    save(options.json, {**about, "rows": rows})
    if options.png:
        draw(rows, options.png, f"A call with nothing to do, MLX {mx.__version__}")


if __name__ == "__main__":
    main()
