"""Attention of many rows over one prompt: against mx.vmap, a loop, and a broadcast by hand.

    python -m benchmarks.prefix [--rows 1,4,16,64,256] [--prefix 1024,8192,65536] [--length 1]
                                [--json FILE] [--png FILE]

Each row has `--length` queries, `--own` keys and values of its own, and sees all of the prompt.
The others concatenate the prompt with a row's own keys and values and call MLX's fused attention.
GB/s is of the bytes that must be moved, for all contenders alike: the prompt's keys and values
once, each row's own, the queries and the outputs; by the time of a call among others.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import mlx.core as mx

import mlxshim
from mlxshim.nn import prompt_attention

from ._measure import GPU, describe_machine, error_of, measure
from ._program import announce, command_line, pyplot, save

HEADS, KV_HEADS, DIM = (32, 8, 128) if GPU else (8, 2, 64)
DTYPE = mx.bfloat16 if GPU else mx.float32
ROWS = "1,4,16,64,256" if GPU else "1,16,64"
PREFIX = "1024,8192,65536" if GPU else "1024,8192"
SCALE = DIM**-0.5


def concatenated(q: mx.array, pk: mx.array, pv: mx.array, k: mx.array, v: mx.array) -> mx.array:
    keys, values = (mx.concatenate(parts, axis=-2)[None] for parts in ((pk, k), (pv, v)))
    mask = "causal" if q.shape[-2] > 1 else None
    return mx.fast.scaled_dot_product_attention(q[None], keys, values, scale=SCALE, mask=mask)[0]


def broadcast(q: mx.array, pk: mx.array, pv: mx.array, k: mx.array, v: mx.array) -> mx.array:
    keys, values = (
        mx.concatenate([mx.broadcast_to(p, (q.shape[0], *p.shape)), x], axis=-2)
        for p, x in ((pk, k), (pv, v))
    )
    mask = "causal" if q.shape[-2] > 1 else None
    return mx.fast.scaled_dot_product_attention(q, keys, values, scale=SCALE, mask=mask)


def contenders() -> dict[str, Callable[..., mx.array]]:
    axes = (0, None, None, 0, 0)
    ours = mlxshim.vmap(
        lambda q, pk, pv, k, v: prompt_attention(q, (pk, pv), k, v, scale=SCALE), in_axes=axes
    )

    def loop(q: mx.array, pk: mx.array, pv: mx.array, k: mx.array, v: mx.array) -> mx.array:
        return mx.stack([concatenated(a, pk, pv, b, c) for a, b, c in zip(q, k, v)])

    return {
        "mlxshim": ours,
        "mlxshim, compiled": mx.compile(ours),
        "broadcast by hand": broadcast,
        "mx.vmap": mx.vmap(concatenated, in_axes=axes),
        "loop": loop,
    }


def draw(rows: list[dict[str, Any]], path: str, title: str) -> None:
    plt = pyplot()

    prompts = sorted({r["prompt"] for r in rows})
    figure, axes = plt.subplots(1, len(prompts), figsize=(4.5 * len(prompts), 4), squeeze=False)
    for axis, prompt in zip(axes[0], prompts):
        for name in dict.fromkeys(r["contender"] for r in rows):
            some = [
                r for r in rows if r["prompt"] == prompt and r["contender"] == name and "ms" in r
            ]
            axis.plot(
                [r["rows"] for r in some], [r["pipelined_ms"] for r in some], "o-", label=name
            )
        axis.set(
            title=f"prompt of {prompt}", xlabel="rows", ylabel="ms", xscale="log", yscale="log"
        )
        axis.grid(alpha=0.3)
    axes[0][0].legend()
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--rows", default=ROWS)
    parser.add_argument("--prefix", default=PREFIX)
    parser.add_argument("--length", type=int, default=1)
    parser.add_argument("--own", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=0.2, help="to repeat one contender for")
    parser.add_argument("--gib", type=float, default=24.0 if GPU else 4.0, help="of a contender")
    options = parser.parse_args()
    about = announce(
        "prefix",
        describe_machine(),
        heads=HEADS,
        kv_heads=KV_HEADS,
        dim=DIM,
        dtype=str(DTYPE),
        length=options.length,
        own=options.own,
    )
    results: list[dict[str, Any]] = []
    functions = contenders()
    for prompt in map(int, options.prefix.split(",")):
        for rows in map(int, options.rows.split(",")):
            one = [mx.random.normal((KV_HEADS, prompt, DIM)).astype(DTYPE) for _ in "kv"]
            q = mx.random.normal((rows, HEADS, options.length, DIM)).astype(DTYPE)
            own = [mx.random.normal((rows, KV_HEADS, options.own, DIM)).astype(DTYPE) for _ in "kv"]
            arrays = [q, *one, *own]
            mx.eval(arrays)
            moved = sum(x.nbytes for x in arrays) + q.nbytes
            want: mx.array | None = None
            for name, fun in functions.items():
                row: dict[str, Any] = {"prompt": prompt, "rows": rows, "contender": name}
                results.append(row)
                # What is concatenated, and its scores where nothing is fused.
                copies = 0 if name.startswith("mlxshim") else rows if name != "loop" else 1
                scores = copies * HEADS * options.length * prompt * DTYPE.size
                beyond = copies * KV_HEADS * (prompt + options.own) * DIM >= 2**31  # MLX's indices
                size = copies * sum(x.nbytes for x in one) * 2 + 2 * scores
                if beyond or size > options.gib * 2**30:
                    row["note"] = "would not fit"
                    print(f"prompt {prompt:6d} rows {rows:4d} {name:<20} would not fit")
                    continue
                call = functools.partial(fun, *arrays)
                found = measure(lambda call=call: [call()], 20, options.seconds)
                row.update(found, gb_s=moved / found["pipelined_ms"] / 1e6)
                if want is None and rows * prompt <= 2**20:
                    want = functions["loop"](*arrays)
                if want is not None:
                    row["error"] = error_of([call()], [want])
                print(
                    f"prompt {prompt:6d} rows {rows:4d} {name:<20} {row['ms']:9.3f} / "
                    f"{row['pipelined_ms']:9.3f} ms {row['gb_s']:8.1f} GB/s {row['mib']:9.1f} MiB "
                    f"error {row.get('error', float('nan')):.1e}",
                    flush=True,
                )
    save(options.json, {**about, "rows": results})
    if options.png:
        draw(results, options.png, f"{about['device']}, MLX {mx.__version__}")


if __name__ == "__main__":
    main()
