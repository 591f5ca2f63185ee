"""What interception costs a call: inside a trace, where MLX's own rule serves, and outside.

    python -m benchmarks.interception [--json FILE] [--minutes 0.5]

Inside: a function of many calls of one operation is traced by MLX's vmap or grad and by mlxshim's,
in turn; nothing is evaluated. The difference of the two, between COUNT and 2 COUNT calls, is what
mlxshim adds to one call. The operations are those of which the newest MLX's rule is right, so that
their stand-ins do nothing but look and forward.

Outside: the same calls with no transform, in a process that has never imported mlxshim, in one that
has, and in one that has run its transforms. Some calls after a transform nothing stands in any
more.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import mlx.core as mx

from ._program import announce, command_line, save

COUNT = 200
Operation = Callable[[mx.array], Any]

INDICES = mx.array([0, 2])
ALONG = mx.zeros((4, 6), mx.int32)

#: Forwarded to MLX's own function.
FORWARDED: dict[str, Operation] = {
    "x[1:]": lambda x: x[1:],
    "x[..., ::2]": lambda x: x[..., ::2],
    "x[None]": lambda x: x[None],
    "x.sum(-1)": lambda x: x.sum(-1),
    "mx.mean": lambda x: mx.mean(x, axis=0),
    "mx.max": lambda x: mx.max(x, axis=-1),
    "mx.var": lambda x: mx.var(x, axis=-1, keepdims=True),
    "mx.logsumexp": lambda x: mx.logsumexp(x, axis=-1),
    "mx.expand_dims": lambda x: mx.expand_dims(x, 0),
    "mx.squeeze": lambda x: mx.squeeze(x, 0) if x.shape[0] == 1 else x.squeeze(),
    "mx.pad": lambda x: mx.pad(x, 1),
    "mx.take": lambda x: mx.take(x, INDICES, axis=0),
    "mx.take_along_axis": lambda x: mx.take_along_axis(x, ALONG, 0),
    "x != 0.0": lambda x: x != 0.0,
}
#: Not intercepted at all.
UNTOUCHED: dict[str, Operation] = {
    "mx.add": lambda x: mx.add(x, x),
    "mx.exp": mx.exp,
    "x @ x.T": lambda x: x @ x.T,
}


def inside(operation: Operation, name: str, seconds: float) -> tuple[float, float]:
    """Microseconds of one call in a trace: (MLX's, what mlxshim adds)."""
    import mlxshim

    x = mx.ones((3, 4, 6)) if name == "vmap" else mx.ones((4, 6))

    def trace(lib: Any, count: int) -> Callable[[], Any]:
        def fun(x: mx.array) -> mx.array:
            for _ in range(count):
                operation(x)
            return x if name == "vmap" else x.sum()

        # Late: while a function of one is traced, it is the other's turn to be a plain function.
        return lambda: getattr(lib, name)(fun)(x)

    calls = [trace(lib, n) for lib in (mx, mlxshim) for n in (COUNT, 2 * COUNT)]
    times: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for call, column in zip(calls, times):
            begin = time.perf_counter()
            call()
            column.append(time.perf_counter() - begin)
    mlx, mlx_more, ours, ours_more = (statistics.median(column) for column in times)
    native = (mlx_more - mlx) / COUNT * 1e6
    return native, (ours_more - ours) / COUNT * 1e6 - native


def outside(seconds: float) -> dict[str, float]:
    """Microseconds of one call with no transform around, in this process."""
    x = mx.ones((4, 6))
    found: dict[str, float] = {}
    operations = {**FORWARDED, **UNTOUCHED}
    for name, operation in operations.items():
        times, end = [], time.perf_counter() + seconds / len(operations)
        while time.perf_counter() < end:
            begin = time.perf_counter()
            for _ in range(COUNT):
                operation(x)
            times.append(time.perf_counter() - begin)
        found[name] = min(times) / COUNT * 1e6
    return found


_STATES = {
    "without mlxshim": "",
    "imported": "import mlxshim",
    "after transforms": (
        "import mlxshim; x = mx.ones((3, 4)); "
        "mlxshim.vmap(mlxshim.grad(lambda x: mx.sum(x[1:])))(x); "
        "x[0]; assert mlxshim.intercepted() == [], mlxshim.intercepted()"
    ),
}


def outside_of_each(seconds: float, rounds: int = 5) -> dict[str, dict[str, float]]:
    """Operation -> state -> the least microseconds of one call, each in processes of its own."""
    found: dict[str, dict[str, float]] = {}
    for _ in range(rounds):
        for state, preparation in _STATES.items():
            code = (
                f"import json, mlx.core as mx\n{preparation}\n"
                f"from benchmarks.interception import outside\n"
                f"print(json.dumps(outside({seconds / rounds / len(_STATES)})))"
            )
            answer = subprocess.run(
                [sys.executable, "-c", code], check=True, capture_output=True, text=True
            )
            for name, took in json.loads(answer.stdout).items():
                row = found.setdefault(name, {})
                row[state] = min(took, row.get(state, took))
    return found


def main() -> None:
    from ._measure import describe_machine  # it imports mlxshim, which `outside` is to do without

    parser = command_line(__doc__, png=False)
    parser.add_argument("--minutes", type=float, default=0.5)
    options = parser.parse_args()
    about = announce("interception", describe_machine())
    seconds, operations = options.minutes * 60, {**FORWARDED, **UNTOUCHED}
    rows: list[dict[str, Any]] = []
    for transform in ("vmap", "grad"):
        for name, operation in operations.items():
            share = seconds * 2 / 3 / 2 / len(operations)
            mlx, extra = inside(operation, transform, share)
            row = {"section": f"{name} in {transform}", "mlx": mlx, "difference": extra}
            rows.append({**row, "intercepted": name in FORWARDED})
            print(
                f"{row['section']:<30} MLX {mlx:6.2f}   mlxshim adds {extra:+6.2f} µs", flush=True
            )
    worst = max(row["difference"] for row in rows)
    print(f"at most {worst:.2f} µs of one call")
    for name, states in outside_of_each(seconds / 3).items():
        rows.append({"section": f"{name}, no transform", **states})
        print(f"{name:<30} " + "   ".join(f"{s} {t:6.3f}" for s, t in states.items()) + " µs")
    save(options.json, {**about, "rows": rows})


if __name__ == "__main__":
    main()
