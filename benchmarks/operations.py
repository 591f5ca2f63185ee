"""Fused operations under vmap and vmap(grad): by hand, mlxshim, mx.vmap.

    python -m benchmarks.operations [--json FILE] [--png FILE] [--only NAME,...]

Norms and rope at (16, 2048, 4096), matmuls by quantized weights, the gradient of attention at a
ragged length against the next multiple of 128, and convolutions with a weight, or a gradient of it,
for each sample; bfloat16 on a GPU, smaller on a CPU. Times and memory as in `benchmarks.attention`.
By hand, what MLX has no batched call for is a loop.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import mlx.core as mx

import mlxshim

from ._measure import GPU, TIME, describe_machine, error_of, measure
from ._program import announce, command_line, pyplot, save

DTYPE = mx.bfloat16 if GPU else mx.float32
N, L, D = (16, 2048, 4096) if GPU else (4, 64, 256)
Contenders = dict[str, Callable[[], Any]]


def normal(*shape: int, dtype: mx.Dtype = DTYPE) -> mx.array:
    x = mx.random.normal(shape).astype(dtype)
    mx.eval(x)
    return x


def both(fun: Callable[..., mx.array], batch: mx.array, *shared: mx.array) -> Contenders:
    """`fun` takes the batch as well as one sample of it."""
    axes = (0, *(None for _ in shared))
    mine, native = mlxshim.vmap(fun, in_axes=axes), mx.vmap(fun, in_axes=axes)
    return {
        "by hand": functools.partial(fun, batch, *shared),
        "mlxshim": functools.partial(mine, batch, *shared),
        "mlxshim, compiled": functools.partial(mx.compile(mine), batch, *shared),
        "mx.vmap": functools.partial(native, batch, *shared),
    }


def gradients(fun: Callable[..., mx.array], batch: mx.array, *shared: mx.array) -> Contenders:
    """The gradient for the batch of a loss that weighs every entry."""
    weight = normal(*batch.shape)
    axes = (0, 0, *(None for _ in shared))

    def loss(x: mx.array, w: mx.array, *rest: mx.array) -> mx.array:
        return (fun(x, *rest) * w).sum()

    mine = mlxshim.vmap(mlxshim.grad(loss), in_axes=axes)
    native = mx.vmap(mx.grad(loss), in_axes=axes)
    everything = (batch, weight, *shared)
    return {
        "by hand": functools.partial(mx.grad(loss), *everything),
        "mlxshim": functools.partial(mine, *everything),
        "mlxshim, compiled": functools.partial(mx.compile(mine), *everything),
        "mx.vmap": functools.partial(native, *everything),
    }


def rms(x: mx.array, w: mx.array) -> mx.array:
    return mx.fast.rms_norm(x, w, 1e-5)


def layer(x: mx.array, w: mx.array, b: mx.array) -> mx.array:
    return mx.fast.layer_norm(x, w, b, 1e-5)


def rope(x: mx.array) -> mx.array:
    return mx.fast.rope(x, 128, traditional=False, base=1e4, scale=1.0, offset=0)


def quantized(x: mx.array, w: mx.array, s: mx.array, b: mx.array) -> mx.array:
    return mx.quantized_matmul(x, w, s, b, transpose=True)


def experts(x: mx.array, w: mx.array, s: mx.array, b: mx.array) -> mx.array:
    rows = mx.arange(x.shape[-2]) % w.shape[0]
    chosen = mx.broadcast_to(rows, x.shape[:-1])
    return mx.gather_qmm(x[..., None, :], w, s, b, rhs_indices=chosen, transpose=True)


def looped(
    fun: Callable[..., mx.array], axes: tuple[int | None, int | None], gradient: bool = False
) -> Contenders:
    """`fun` of a sample's images and a weight, or its gradient for the weight, and a loop."""
    samples, size, channels = (64, 32, 64) if GPU else (16, 16, 32)
    x, shape = normal(samples, 1, size, size, channels), (channels, 3, 3, channels)
    w = normal(*shape) if axes[1] is None else normal(samples, *shape)

    def of(transforms: Any) -> Callable[..., mx.array]:
        if not gradient:
            return fun
        return transforms.grad(lambda x, w: fun(x, w).square().sum(), argnums=1)

    def loop() -> mx.array:
        one = of(mx)
        return mx.stack([one(x[i], w if axes[1] is None else w[i]) for i in range(samples)])

    mine, native = (t.vmap(of(t), in_axes=axes) for t in (mlxshim, mx))
    return {
        "by hand": loop,
        "mlxshim": functools.partial(mine, x, w),
        "mlxshim, compiled": functools.partial(mx.compile(mine), x, w),
        "mx.vmap": functools.partial(native, x, w),
    }


def convolved(x: mx.array, w: mx.array) -> mx.array:
    return mx.conv2d(x, w, padding=1)


def strided(x: mx.array, w: mx.array) -> mx.array:
    return mx.conv2d(x, w, stride=2, padding=1)


def ragged(length: int) -> Contenders:
    """The gradient of one attention call for a batch of N sequences."""
    arrays = [normal(N, h, length, 128) for h in (32, 8, 8, 32)]

    def loss(q: mx.array, k: mx.array, v: mx.array, w: mx.array) -> mx.array:
        scale = q.shape[-1] ** -0.5
        out = mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask="causal")
        return (out * w).astype(mx.float32).sum()

    one = lambda *xs: loss(*(x[None] for x in xs))  # noqa: E731
    numbers = [0, 1, 2]
    return {
        "by hand": functools.partial(mx.grad(loss, argnums=numbers), *arrays),
        "mlxshim": functools.partial(mlxshim.vmap(mlxshim.grad(one, argnums=numbers)), *arrays),
        "mlxshim, grad alone": functools.partial(mlxshim.grad(loss, argnums=numbers), *arrays),
    }


def sections() -> dict[str, Callable[[], Contenders]]:
    x, w, b = functools.partial(normal, N, L, D), normal(D), normal(D)
    heads = functools.partial(normal, N, D // 128, L, 128)
    length = 2000 if GPU else 100
    tile = -(-length // 128) * 128

    def packed(*shape: int) -> Any:
        return mx.quantize(normal(*shape), group_size=64, bits=4)

    rows = functools.partial(normal, N, L // 8, D)
    return {
        "rms_norm": lambda: both(rms, x(), w),
        "rms_norm, grad": lambda: gradients(rms, x(), w),
        "layer_norm": lambda: both(layer, x(), w, b),
        "layer_norm, grad": lambda: gradients(layer, x(), w, b),
        "rope": lambda: both(rope, heads()),
        "rope, grad": lambda: gradients(rope, heads()),
        "quantized_matmul": lambda: both(quantized, rows(), *packed(D, D)),
        "quantized_matmul, grad": lambda: gradients(quantized, rows(), *packed(D, D)),
        "gather_qmm": lambda: both(experts, rows(), *packed(8, D // 4, D)),
        "conv2d": lambda: looped(convolved, (0, None)),
        "conv2d, own weights": lambda: looped(convolved, (0, 0)),
        "conv2d, grad": lambda: looped(convolved, (0, None), True),
        "conv2d, own weights, grad": lambda: looped(convolved, (0, 0), True),
        "conv2d, strided, grad": lambda: looped(strided, (0, 0), True),
        f"attention, grad, L={length}": lambda: ragged(length),
        f"attention, grad, L={tile}": lambda: ragged(tile),
    }


def draw(rows: list[dict[str, Any]], path: str, title: str) -> None:
    plt = pyplot()

    sections = list(dict.fromkeys(row["section"] for row in rows))
    figure, grid = plt.subplots(3, -(-len(sections) // 3), figsize=(16, 9), squeeze=False)
    for axis, section in zip(grid.flat, sections):
        some = [r for r in rows if r["section"] == section and "ms" in r]
        axis.barh([r["contender"] for r in some][::-1], [r[TIME] for r in some][::-1])
        axis.set(title=section, xlabel="ms")
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--only", default="", help="names, or beginnings of them")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--seconds", type=float, default=1.5, help="for a contender's calls")
    options = parser.parse_args()
    about = announce("operations", describe_machine(), shape=[N, L, D], dtype=str(DTYPE))
    rows: list[dict[str, Any]] = []
    wanted = tuple(options.only.split(",")) if options.only else ("",)
    for section, build in sections().items():
        if not section.startswith(wanted):
            continue
        contenders = build()
        want: list[mx.array] | None = None
        for name, fun in contenders.items():
            row: dict[str, Any] = {"section": section, "contender": name}
            rows.append(row)
            try:
                got = fun()
                got = [got] if isinstance(got, mx.array) else list(got)
                want = want or got
                row["error"] = error_of(got, [w.reshape(g.shape) for w, g in zip(want, got)])
                row.update(measure(fun, options.repeats, options.seconds))
            except Exception as error:
                row["note"] = f"{type(error).__name__}: {error}"[:120]
            ms, piped, mib = (row.get(key, float("nan")) for key in ("ms", "pipelined_ms", "mib"))
            print(
                f"{section:<26} {name:<22} {ms:9.3f} ms {piped:9.3f} pipelined ms {mib:9.1f} MiB"
                f"  error {row.get('error', float('nan')):.1e}  {row.get('note', '')}",
                flush=True,
            )
        save(options.json, {**about, "rows": rows})
    if options.png:
        draw(rows, options.png, f"{about['device']}, MLX {mx.__version__}")


if __name__ == "__main__":
    main()
