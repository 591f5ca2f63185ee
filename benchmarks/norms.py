"""Ways to the norms of per-sample gradients of one linear layer, from its inputs and cotangents.

    python -m benchmarks.norms [--json FILE] [--shapes 32x512x768x2048,...]

A shape is samples x rows x inputs x outputs. "gradients" is the product for each sample alone, with
no norm taken; the other contenders end in (samples,) numbers and are checked against float32.
`mlxshim.nn` takes "by gradients" or "by rows", whichever takes less work.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from ._measure import GPU, Thunk, describe_machine, measure
from ._program import announce, command_line, save


def gradients(x: mx.array, c: mx.array) -> mx.array:
    return mx.matmul(mx.swapaxes(c, 1, 2), x)


def squares(g: mx.array) -> mx.array:
    return mx.sum(mx.square(g.astype(mx.float32)), axis=(1, 2))


def diagonals(g: mx.array) -> mx.array:
    """The squares of the entries as diagonals of products of 64 rows with themselves."""
    if g.shape[1] % 64:
        return squares(g)
    blocks = mx.reshape(g, (-1, 64, g.shape[2]))
    rows = mx.diagonal(mx.matmul(blocks, mx.swapaxes(blocks, 1, 2)), axis1=1, axis2=2)
    return mx.sum(mx.reshape(rows, (len(g), -1)).astype(mx.float32), axis=1)


def with_ones(g: mx.array) -> mx.array:
    """Squares in the gradients' dtype, added up by a product with ones."""
    rows = mx.reshape(mx.square(g), (-1, g.shape[2])) @ mx.ones((g.shape[2],), g.dtype)
    return mx.sum(mx.reshape(rows, (len(g), -1)).astype(mx.float32), axis=1)


def by_rows(x: mx.array, c: mx.array, dtype: mx.Dtype) -> mx.array:
    x, c = x.astype(dtype), c.astype(dtype)
    first, second = (mx.matmul(a, mx.swapaxes(a, 1, 2)).astype(mx.float32) for a in (x, c))
    return mx.sum(first * second, axis=(1, 2))


def contenders(x: mx.array, c: mx.array) -> dict[str, Thunk]:
    functions = {
        "gradients": gradients,
        "by gradients": lambda x, c: squares(gradients(x, c)),
        "by gradients, diagonals": lambda x, c: diagonals(gradients(x, c)),
        "by gradients, ones": lambda x, c: with_ones(gradients(x, c)),
        "by rows": lambda x, c: by_rows(x, c, mx.float32),
        "by rows, no cast": lambda x, c: by_rows(x, c, x.dtype),
    }
    return {n: lambda f=mx.compile(f): [f(x, c)] for n, f in functions.items()}  # noqa: B008


def main() -> None:
    parser = command_line(__doc__, png=False)
    default = "32x512x768x768,32x512x768x2048,32x512x768x32000" if GPU else "8x64x128x344"
    parser.add_argument("--shapes", default=default)
    parser.add_argument("--dtype", default="bfloat16" if GPU else "float32")
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args()
    about = announce("norms", describe_machine(), dtype=options.dtype)
    rows: list[dict[str, Any]] = []
    for shape in options.shapes.split(","):
        samples, length, inputs, outputs = (int(n) for n in shape.split("x"))
        x = mx.random.normal((samples, length, inputs)).astype(getattr(mx, options.dtype))
        c = (1e-3 * mx.random.normal((samples, length, outputs))).astype(x.dtype)
        mx.eval(x, c)
        want = mx.stack(
            [squares(gradients(x[i : i + 1], c[i : i + 1]).astype(mx.float32))[0] for i in (0, 1)]
        )
        for name, fun in contenders(x, c).items():
            row: dict[str, Any] = {"shape": shape, "contender": name}
            rows.append(row)
            if name != "gradients":
                got = fun()[0][:2]
                row["error"] = float((mx.abs(got - want) / want).max())
            row.update(measure(fun, options.repeats))
            print(
                f"{shape:<22} {name:<26} {row['ms']:9.3f} ms {row['mib']:9.1f} MiB"
                f"  error {row.get('error', float('nan')):.1e}",
                flush=True,
            )
    save(options.json, {**about, "rows": rows})


if __name__ == "__main__":
    main()
