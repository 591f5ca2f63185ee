"""docs/performance.md, from the JSON of every benchmark."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Result = dict[str, Any]

HEADER = """# Performance

Written by `python -m benchmarks` from the files in [benchmarks/](benchmarks/); every number is one
that a command below measured, with its competitors in the same run. `alone` is the median time of
one call that is traced, evaluated and waited for; `piped` a call's share of several that are waited
for once, as in a training loop. Memory is the peak above the inputs. `own` is, on a CPU, the time
of the process's own, which other work on the machine lengthens less.
"""


def table(head: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    head = list(head)
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def number(row: Result, key: str, unit: str, digits: int = 2) -> str:
    value = row.get(key)
    return "" if value is None else f"{value:.{digits}f} {unit}".strip()


def seconds(row: Result, key: str) -> str:
    """Three digits, from milliseconds to minutes."""
    value = row.get(key)
    return "" if value is None else f"{value:#.3g}".rstrip(".") + " s"


def by_section(result: Result, key: str = "section") -> dict[str, list[Result]]:
    found: dict[str, list[Result]] = {}
    for row in result["rows"]:
        found.setdefault(str(row[key]), []).append(row)
    return found


def trace(result: Result) -> str:
    head = ("", "contender", "time", "against mx.vmap", "nodes that compute", "views")
    return table(
        head,
        (
            (
                row["section"], row["contender"], number(row, "ms", "ms", 3) or row.get("note"),
                number(row, "ratio", "x"), row.get("nodes", ""), row.get("views", ""),
            )
            for row in result["rows"]
        ),
    )  # fmt: skip


def overhead(result: Result) -> str:
    head = ("", "MLX's own", "mlxshim", "difference")
    return table(
        head,
        (
            (row["section"], *(number(row, key, "µs") for key in ("mlx", "mlxshim", "difference")))
            for row in result["rows"]
        ),
    )


def attention(result: Result) -> str:
    names = list(dict.fromkeys(row["contender"] for row in result["rows"]))
    text = []
    for section, rows in by_section(result).items():
        lengths = list(dict.fromkeys(row["length"] for row in rows))
        found = {(row["length"], row["contender"]): row for row in rows}
        used = [name for name in names if any((n, name) in found for n in lengths)]

        def cell(length: int, name: str, found: Any = found) -> str:
            row = found.get((length, name), {})
            if "ms" not in row:
                return str(row.get("note", ""))
            times = "{own_ms:.2f}" if "own_ms" in row else "{ms:.2f} / {pipelined_ms:.2f}"
            return times.format(**row) + f" ms, {row['mib']:.0f} MiB"

        body = ((n, *(cell(n, name) for name in used)) for n in lengths)
        kind = "own" if any("own_ms" in row for row in rows) else "alone / piped"
        text.append(f"**{section}** ({kind})\n\n{table(('L', *used), body)}")
    return "\n\n".join(text)


def operations(result: Result) -> str:
    own = any("own_ms" in row for row in result["rows"])
    times = {"own": "own_ms"} if own else {"alone": "ms", "piped": "pipelined_ms"}
    return table(
        ("", "contender", *times, "memory"),
        (
            (
                row["section"], row["contender"],
                *(number(row, key, "ms", 3) or row.get("note", "") for key in times.values()),
                number(row, "mib", "MiB", 0),
            )
            for row in result["rows"]
        ),
    )  # fmt: skip


def scaling(result: Result) -> str:
    head = ("series", "varies", "from", "to", "slope of time", "slope of memory", "theory")

    def ends(row: Result) -> str:
        return f"{row['size']}: {row.get('own_ms', row['ms']):.2f} ms, {row['mib']:.1f} MiB"

    rows = [
        (
            name, one["varies"], ends(one["rows"][0]), ends(one["rows"][-1]),
            f"{one['slopes']['ms']:.2f}", f"{one['slopes']['mib']:.2f}", one["theory"],
        )
        for name, one in result["series"].items()
    ]  # fmt: skip
    text = table(head, rows)
    if result.get("chunks"):
        head = ("tokens of a sample", "samples at a time", "time", "against all at once")
        head += ("by the wall clock", "of it traces", "compiled by hand", "peak memory")
        keys = ("ratio", "wall_ratio", "of_it_traces", "compiled")
        text += (
            f"\n\nGradient norms of {result['chunks'][0]['samples']} samples of a 4-layer "
            "transformer by `chunk_size`, the least of several rounds in turns:\n\n"
        ) + table(
            head,
            (
                (
                    row["length"], row["chunk"], number(row, "ms", "ms"),
                    *(number(row, key, "x") for key in keys), number(row, "mib", "MiB", 0),
                )
                for row in result["chunks"]
            ),
        )  # fmt: skip
    if result.get("soak"):
        first, last = result["soak"][0], result["soak"][-1]
        text += (
            f"\n\nSoak: after {first['calls']} calls MLX holds {first['mlx_mib']:.2f} MiB and the "
            f"process {first['process_mib']:.1f}, after {last['calls']} {last['mlx_mib']:.2f} and "
            f"{last['process_mib']:.1f}."
        )
    return text


def peers(result: Result) -> str:
    from .peers import report

    return report(result["rows"]).strip()


def models(result: Result) -> str:
    columns = [
        ("alone", "ms", "ms", 2), ("own", "own_ms", "ms", 2), ("piped", "pipelined_ms", "ms", 2),
        ("trace", "trace_ms", "ms", 2),
        ("memory", "mib", "MiB", 0), ("with a short queue", "short_mib", "MiB", 0),
    ]  # fmt: skip
    rows = result["rows"]
    columns = [c for c in columns if any(c[1] in row for row in rows)]

    def cells(row: Result) -> list[str]:
        found = [number(row, key, unit, digits) for _, key, unit, digits in columns]
        return [row["contender"], found[0] or row.get("note", ""), *found[1:]]

    return table(("contender", *(c[0] for c in columns)), map(cells, rows))


def plain(result: Result) -> str:
    """Rows of a benchmark that says itself which columns it has."""
    return table(
        result["columns"], ([row.get(c, "") for c in result["columns"]] for row in result["rows"])
    )


def blocks(result: Result) -> str:
    head = ("L", "mask", "path", "time", "of it the process's own", "peak memory")
    setting = (
        f"{result['samples']} sample of {result['heads']} query and {result['kv_heads']} K/V "
        f"heads, D = {result['dim']}, {result['dtype']}, in no more than {result['gib']:g} GiB.\n\n"
    )
    return setting + table(
        head,
        (
            (
                row["length"], "causal" if row["causal"] else "", row["path"],
                seconds(row, "s") or row.get("no"), seconds(row, "cpu_s"),
                number(row, "mib", "MiB", 0),
            )
            for row in result["rows"]
        ),
    )  # fmt: skip


def prefix(result: Result) -> str:
    head = ("prompt", "rows", "contender", "alone", "piped", "of the bytes moved", "memory")
    setting = (
        f"{result['heads']} query and {result['kv_heads']} K/V heads, D = {result['dim']}, "
        f"{result['length']} query and {result['own']} keys of each row's own, {result['dtype']}. "
        f"Bytes moved: the prompt's K/V once, each row's own K/V, queries and outputs.\n\n"
    )
    return setting + table(
        head,
        (
            (
                row["prompt"], row["rows"], row["contender"],
                number(row, "ms", "ms", 3) or row.get("note"), number(row, "pipelined_ms", "ms", 3),
                number(row, "gb_s", "GB/s", 0), number(row, "mib", "MiB", 0),
            )
            for row in result["rows"]
        ),
    )  # fmt: skip


def interception(result: Result) -> str:
    inside = [row for row in result["rows"] if "difference" in row]
    outside = [row for row in result["rows"] if "difference" not in row]
    states = [key for key in outside[0] if key != "section"]
    return "\n\n".join(
        (
            table(
                ("One call in a trace", "MLX", "mlxshim adds"),
                (
                    (row["section"], number(row, "mlx", "µs"), number(row, "difference", "µs"))
                    for row in inside
                ),
            ),
            table(
                ("One call", *states),
                ((row["section"], *(number(row, s, "µs") for s in states)) for row in outside),
            ),
        )
    )


SECTIONS: dict[str, tuple[str, Callable[[Result], str]]] = {
    "trace": ("The cost of a trace", trace),
    "overhead": ("A call with nothing to transform", overhead),
    "interception": ("What interception costs", interception),
    "attention": ("Attention", attention),
    "operations": ("Fused operations", operations),
    "scaling": ("Scaling", scaling),
    "blocks": ("Attention in blocks", blocks),
    "prefix": ("A shared prompt", prefix),
    "models": ("Per-sample and clipped gradients of a model", models),
    "peers": ("Peers", peers),
    "blas": ("The BLAS of Linux without a GPU", plain),
}


def render(folder: Path) -> str:
    text = [HEADER]
    for name, (title, section) in SECTIONS.items():
        files = sorted(folder.glob(f"{name}-*.json"))
        if not files:
            continue
        text.append(f"## {title}\n")
        for file in files:
            result = json.loads(file.read_text("utf-8"))
            versions = ", ".join(
                f"{key} {result[key]}" for key in ("mlx", "torch", "jax") if result.get(key)
            )
            text.append(f"### {result['device']}, {versions}\n\n    {result['command']}\n")
            text.append(section(result) + "\n")
            image = file.with_suffix(".png")
            if image.exists():
                text.append(f"![{title}]({folder.name}/{image.name})\n")
    return "\n".join(text)
