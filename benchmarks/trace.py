"""What a trace costs: a 12-layer grouped-query transformer in which there is nothing else to do.

    python -m benchmarks.trace [--json FILE] [--png FILE] [--layers 12] [--minutes 2]

Milliseconds of Python and C++ from the call to the unevaluated result, the least of many, for
vmap(f), vmap(grad(f)), and both under `mx.compile` after its first call; and the nodes of the graph
that is then evaluated, those that only view an array another way counted apart: where a function
gives its sample a batch dimension of one, MLX's own vmap flattens each matmul twice, for that one
and for the mapped one. mlxshim does so too, but not under `mx.compile`: what it costs to trace is
paid once there. Contenders: the batch written by hand, mlxshim, `mx.vmap`.

Rules depend on the device: on a CPU attention and norms are MLX's own operations, on a GPU nodes of
ours that end in fused calls. `--path gpu` traces the second on any machine, by answering "is this a
GPU" with yes. Nothing is evaluated, but MLX's own fused calls are decomposed where they are built
on a CPU; there each is counted, and timed, as one node that stands in for it.
"""

from __future__ import annotations

import contextlib
import functools
import io
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx

import mlxshim
from mlxshim.rules import _devices, attention, norms, positions

from ._measure import GPU, describe_machine
from ._model import Shape, logits, losses, weights
from ._program import announce, command_line, pyplot, save

SAMPLES, LENGTH = 4, 128


def least(fun: Callable[[], Any], seconds: float) -> float:
    """Milliseconds."""
    for _ in range(5):  # the first traces fill caches
        fun()
    best, start = float("inf"), time.perf_counter()
    while time.perf_counter() - start < seconds:
        begin = time.perf_counter()
        fun()
        best = min(best, time.perf_counter() - begin)
    return best * 1e3


#: Operations that look at an array another way, and compute nothing.
VIEWS = {
    "Broadcast", "ExpandDims", "Flatten", "Reshape", "Slice", "Squeeze", "StopGradient",
    "Transpose", "Unflatten",
}  # fmt: skip


def nodes(result: Any) -> dict[str, int]:
    """The operations of an unevaluated graph; arrays that hold their value are none."""
    arrays: list[mx.array] = []

    def collect(tree: Any) -> None:
        if isinstance(tree, mx.array):
            arrays.append(tree)
        else:
            for child in tree.values() if isinstance(tree, dict) else tree:
                collect(child)

    collect(result)
    text = io.StringIO()
    mx.export_to_dot(text, *arrays)
    names = re.findall(r'label ="([^"]*)", shape=rectangle', text.getvalue())
    views = sum(name in VIEWS for name in names)
    return {"nodes": len(names) - views, "views": views}


def stand_in_for_a_gpu() -> None:
    """The rules of a GPU, whose fused calls are one node each."""
    _devices.gpu = lambda stream=None: True
    attention._gpu = _devices.gpu
    if GPU:
        return

    depends = mx.depends

    def one_node(x: mx.array, *others: mx.array, **_: Any) -> list[mx.array]:
        return depends([x], list(others)) if others else [mx.contiguous(x)]

    def backward(*arrays: mx.array, **_: Any) -> list[mx.array]:
        *primals, cotangent = arrays
        return depends(primals, [cotangent])

    def attention_vjp(q: mx.array, k: mx.array, v: mx.array, *rest: Any, **_: Any) -> Any:
        return depends([q, k, v], [mx.contiguous(rest[-1])])

    attention.attention.lowering = one_node
    attention.attention_vjp.lowering = attention_vjp
    norms.norm.lowering = positions.rotation.lowering = one_node
    norms.norm_vjp.lowering = backward


@contextlib.contextmanager
def fused_by_hand(path: str) -> Iterator[None]:
    """MLX's fused calls as one node each, where only a GPU would have them so."""
    if path != "gpu" or GPU:
        yield
        return
    names = ("rms_norm", "rope", "scaled_dot_product_attention")
    kept = {name: getattr(mx.fast, name) for name in names}
    mx.fast.rms_norm = lambda x, w, eps: mx.depends([x], [w])[0]
    mx.fast.rope = lambda x, *_, **__: mx.contiguous(x)
    mx.fast.scaled_dot_product_attention = lambda q, k, v, **_: mx.depends([q], [k, v])[0]
    try:
        yield
    finally:
        for name, fun in kept.items():
            setattr(mx.fast, name, fun)


def contenders(shape: Shape, path: str) -> dict[str, dict[str, Callable[[], Any]]]:
    tree = weights(shape, mx.bfloat16 if path == "gpu" else mx.float32)
    tokens, targets = (mx.random.randint(0, shape.vocabulary, (SAMPLES, LENGTH)) for _ in "ab")
    mx.eval(tokens, targets)

    def forward(tree: Any, x: mx.array) -> mx.array:
        return logits(tree, x[None], shape)[0]

    def loss(tree: Any, x: mx.array, y: mx.array) -> mx.array:
        return losses(tree, x[None], y[None], shape)[0]

    def total(tree: Any, x: mx.array, y: mx.array) -> mx.array:
        return losses(tree, x, y, shape).sum()

    def by_hand(tree: Any, x: mx.array) -> mx.array:
        with fused_by_hand(path):
            return logits(tree, x, shape)

    # By hand there is only the gradient of the sum: per-sample ones are another program.
    of_sum = [("by hand: of the sum", mx.grad(total))] if path == "device" or GPU else []
    both = (tree, tokens, targets)
    table: dict[str, dict[str, Callable[[], Any]]] = {
        "vmap": {"by hand": functools.partial(by_hand, tree, tokens)},
        "vmap(grad)": {name: functools.partial(fun, *both) for name, fun in of_sum},
        "vmap, compiled": {"by hand": functools.partial(mx.compile(by_hand), tree, tokens)},
        "vmap(grad), compiled": {
            name: functools.partial(mx.compile(fun), *both) for name, fun in of_sum
        },
    }
    for name, module in (("mx.vmap", mx), ("mlxshim", mlxshim)):
        mapped = module.vmap(forward, in_axes=(None, 0))
        grads = module.vmap(module.grad(loss), in_axes=(None, 0, 0))
        table["vmap"][name] = functools.partial(mapped, tree, tokens)
        table["vmap(grad)"][name] = functools.partial(grads, tree, tokens, targets)
        table["vmap, compiled"][name] = functools.partial(mx.compile(mapped), tree, tokens)
        compiled = mx.compile(grads)
        table["vmap(grad), compiled"][name] = functools.partial(compiled, tree, tokens, targets)
    return table


def draw(rows: list[dict[str, Any]], path: str, title: str) -> None:
    plt = pyplot()

    sections = list(dict.fromkeys(row["section"] for row in rows))
    figure, axes = plt.subplots(1, len(sections), figsize=(3.4 * len(sections), 3.6))
    for axis, section in zip(axes, sections):
        some = [r for r in rows if r["section"] == section and "ms" in r]
        axis.bar([r["contender"] for r in some], [r["ms"] for r in some])
        axis.set(title=section, ylabel="ms")
        axis.tick_params(axis="x", rotation=30)
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--path", choices=["device", "gpu"], default="gpu" if GPU else "device")
    parser.add_argument("--minutes", type=float, default=0.5)
    options = parser.parse_args()
    if options.path == "gpu":
        stand_in_for_a_gpu()
    about = announce("trace", describe_machine(), layers=options.layers, path=options.path)
    table = contenders(Shape(layers=options.layers), options.path)
    rows: list[dict[str, Any]] = []
    seconds = options.minutes * 60 / sum(len(column) for column in table.values())
    for section, column in table.items():
        for name, fun in column.items():
            row: dict[str, Any] = {"section": section, "contender": name}
            rows.append(row)
            try:
                row["ms"] = least(fun, seconds)
                row.update(nodes(fun()))
            except Exception as error:
                row["note"] = f"{type(error).__name__}: {error}"[:120]
        native = next((r.get("ms") for r in rows[-2:] if r["contender"] == "mx.vmap"), None)
        for row in rows[-len(column) :]:
            if native and "ms" in row:
                row["ratio"] = row["ms"] / native
            print(
                f"{section:<22} {row['contender']:<20} {row.get('ms', float('nan')):8.3f} ms "
                f"{row.get('ratio', float('nan')):6.2f}x {row.get('nodes', 0):6d} nodes "
                f"{row.get('views', 0):6d} views "
                f"{row.get('note', '')}",
                flush=True,
            )
    save(options.json, {**about, "rows": rows})
    if options.png:
        draw(rows, options.png, f"Trace of {options.layers} layers, MLX {mx.__version__}")


if __name__ == "__main__":
    main()
