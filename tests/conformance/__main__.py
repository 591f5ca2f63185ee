"""docs/coverage.md: every operation under every transform, MLX's own against mlxshim.

    python -m tests.conformance [--only NAME,...] [--page] [--half] [--numbers]

runs every case of the suite with `mlx.core` and with `mlxshim` as the transforms, keeps what came
of it in docs/coverage/VERSION.json, by the version of the installed MLX, and writes the page of
all the versions kept. With `--page` it writes the page alone. Needs no GPU; some minutes. With
`--half` it only runs every case in half precision, in the modes too that are left out elsewhere,
says which of them fail, and keeps nothing. With `--numbers` it only says of the cases named which
fail and by how much, and how much of the tolerance each mode needs, and keeps nothing.

Every case that is done is noted in build/coverage, with a digest of the code that it was run on:
a run that was stopped goes on where it was, and what has not changed is not run again. Several
versions may run at once, each in a process of its own.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

import mlx.core as mx  # noqa: E402

from conformance.case import in_half, load  # noqa: E402
from conformance.worker import Worker  # noqa: E402
from mlxshim.testing import MODES  # noqa: E402

KEPT = ROOT / "docs" / "coverage"
NOTES = ROOT / "build" / "coverage"
TRANSFORMS = {"mlx.core": "MLX", "mlxshim": "mlxshim"}
OUTCOMES = ("right", "looped", "refused", "wrong", "crash")  # the worst one last
Counts = dict[str, int]
#: Of each operation, for each of TRANSFORMS: how often what came of it under each mode.
Coverage = dict[str, dict[str, dict[str, Counts]]]

# The run -----------------------------------------------------------------------------------------


def outcome(result: dict[str, Any]) -> str:
    if result["error"] is None:
        return "looped" if result["looped"] else "right"
    if result["wrong"]:
        return "wrong"
    return "crash" if result["error"].startswith(("DIED", "HANG")) else "refused"


def digest(transforms: str) -> str:
    """Of all the code that what comes of a case depends on."""
    files = [ROOT / "tests" / "processes.py", *sorted((ROOT / "mlxshim").glob("testing*.py"))]
    files += [f for f in sorted(Path(__file__).parent.glob("*.py")) if not _bystander(f)]
    if transforms == "mlxshim":
        package = ROOT / "mlxshim"
        for part in ("core", "rules", "transforms"):
            files += sorted((package / part).glob("*.py"))
        files += [package / "__init__.py", package / "extend.py"]
    sums = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    return hashlib.sha256("".join(sums).encode()).hexdigest()[:16]


def _bystander(file: Path) -> bool:
    return file.name.startswith("test_") or file.name in ("__main__.py", "not_operations.py")


def run(transforms: str, wanted: tuple[str, ...], version: str) -> dict[str, dict[str, Counts]]:
    """What came of the wanted operations; what is noted of this code is not run again."""
    notes, code = NOTES / f"{version}-{transforms}.jsonl", digest(transforms)
    done = {name: modes for name, modes in _noted(notes, code) if name in load()}
    names = [name for name in load() if name.startswith(wanted)]
    worker = Worker(transforms)
    NOTES.mkdir(parents=True, exist_ok=True)
    with notes.open("a") as book:
        for number, name in enumerate(names):
            if name in done:
                continue
            print(f"{version} {transforms} {number}/{len(names)} {name}", file=sys.stderr)
            modes: dict[str, Counter[str]] = {}
            for result in worker.run(name):
                modes.setdefault(result["mode"], Counter())[outcome(result)] += 1
            done[name] = {mode: dict(n) for mode, n in modes.items()}
            print(json.dumps({"code": code, "name": name, "modes": done[name]}), file=book)
            book.flush()
    worker.close()
    return _by_operation({name: done[name] for name in names})


def failing(names: list[str], everything: bool, numbers: bool) -> int:
    """How many cases fail; each is printed, and with `numbers` what each mode comes to."""
    worker, failed, total = Worker(everything=everything), 0, 0
    for name in names:
        shares: dict[str, float] = {}
        for r in worker.run(name):
            total += 1
            shares[r["mode"]] = max(r["share"], shares.get(r["mode"], 0.0))
            if r["error"] is not None:
                failed += 1
                print(f"{name} {r['mode']} {r['where']}: {r['error']}")
        if numbers:
            parts = ", ".join(f"{mode} {share:.2g}" for mode, share in shares.items())
            print(f"{name}: largest error as a part of the tolerance: {parts}", flush=True)
    worker.close()
    print(f"{failed} of {total} cases fail.")
    return failed


def _noted(notes: Path, code: str) -> Iterator[tuple[str, dict[str, Counts]]]:
    for line in notes.read_text().splitlines() if notes.exists() else ():
        try:
            note = json.loads(line)
        except ValueError:  # the run was stopped as it wrote
            continue
        if note["code"] == code:
            yield note["name"], note["modes"]


def _by_operation(cases: dict[str, dict[str, Counts]]) -> dict[str, dict[str, Counts]]:
    table: dict[str, dict[str, Counter[str]]] = {}
    for name, modes in cases.items():
        operation = table.setdefault(name.split("/")[0], {})
        for mode, counts in modes.items():
            operation[mode] = operation.get(mode, Counter()) + Counter(counts)
    return {name: {mode: dict(n) for mode, n in modes.items()} for name, modes in table.items()}


def keep(by_transforms: dict[str, dict[str, dict[str, Counts]]], version: str) -> None:
    names = sorted(by_transforms["mlxshim"])
    lines = [
        f'"{name}": ' + json.dumps({t: by_transforms[t].get(name, {}) for t in TRANSFORMS})
        for name in names
    ]
    KEPT.mkdir(exist_ok=True)
    write(KEPT / f"{version}.json", "{\n" + ",\n".join(lines) + "\n}\n")


def write(file: Path, text: str) -> None:
    """All of it or nothing: another version's run may be reading."""
    fresh = file.with_suffix(f".{os.getpid()}")
    fresh.write_text(text)
    fresh.replace(file)


# The page ----------------------------------------------------------------------------------------


def page(versions: dict[str, Coverage]) -> str:
    parts = [
        "# Every operation under every transform",
        "Written by `python -m tests.conformance`, on the CPU. A case is an operation with a "
        "subset of its arguments mapped, on some axes, under one transform, against a loop over "
        "the samples. *Right*: the loop's numbers, by a batched rule. *Looped*: the loop's "
        "numbers, by a loop, with a `PerformanceWarning`. *Refused*: an exception. *Wrong*: "
        "other numbers, shapes or dtypes, and no exception. *Crash*: the process died or hung.",
        "A case is left out where MLX cannot differentiate one sample, or has no such operation, "
        "unless the suite has another definition of what is right.",
        _totals(versions),
    ]
    for version, coverage in versions.items():
        parts += [f"## MLX {version}", _table(coverage)]
    return "\n\n".join(parts) + "\n"


def _totals(versions: dict[str, Coverage]) -> str:
    rows = [
        f"| MLX | transforms | operations all right | {' | '.join(OUTCOMES)} |",
        f"|---|---|---|{'---|' * len(OUTCOMES)}",
    ]
    for version, coverage in versions.items():
        for transforms, title in TRANSFORMS.items():
            total: Counter[str] = Counter()
            sound = 0
            for operation in coverage.values():
                counts = sum((Counter(n) for n in operation[transforms].values()), Counter())
                total += counts
                sound += not any(counts[o] for o in OUTCOMES[1:])
            numbers = " | ".join(str(total[o]) for o in OUTCOMES)
            rows.append(f"| {version} | {title} | {sound} of {len(coverage)} | {numbers} |")
    return "\n".join(rows)


def _table(coverage: Coverage) -> str:
    """The operations that are not right everywhere; what MLX comes to → what mlxshim comes to."""
    modes = [mode for mode in MODES if mode != "call"]
    rows, sound = [], []
    for name, operation in coverage.items():
        cells = [_cell(operation["mlx.core"].get(m), operation["mlxshim"].get(m)) for m in modes]
        if any(cell not in ("", "right") for cell in cells):
            rows.append(f"| `{name}` | {' | '.join(cells)} |")
        else:
            sound.append(f"`{name}`")
    head = [f"| | {' | '.join(modes)} |", f"|---|{'---|' * len(modes)}"]
    table = "\n".join([*head, *rows])
    return (
        "What MLX's own transforms come to → what mlxshim's come to, at worst, and in how many of "
        f"the cases.\n\n{table}\n\nRight everywhere, with both: {', '.join(sound) or 'none'}."
    )


def _cell(native: Counts | None, ours: Counts | None) -> str:
    before, after = _worst(native), _worst(ours)
    if before == after:
        return before
    return f"{before or 'none'} → {after or 'none'}"


def _worst(counts: Counts | None) -> str:
    if not counts:
        return ""
    worst = max(counts, key=OUTCOMES.index)
    total = sum(counts.values())
    return worst if counts[worst] == total else f"{worst} {counts[worst]}/{total}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", default="", help="names, or beginnings of them; keeps nothing")
    parser.add_argument("--page", action="store_true", help="write the page of what is kept")
    parser.add_argument("--half", action="store_true", help="all of half precision; keeps nothing")
    parser.add_argument("--numbers", action="store_true", help="how much fails; keeps nothing")
    options = parser.parse_args()
    wanted = tuple(options.only.split(","))
    if options.half or options.numbers:
        names = [n for n in load() if n.startswith(wanted) and (in_half(n) or not options.half)]
        sys.exit(failing(names, options.half, options.numbers) > 0)
    version: str = mx.__version__  # pyright: ignore[reportAttributeAccessIssue]
    if not options.page:
        by_transforms = {t: run(t, wanted, version) for t in TRANSFORMS}
        if options.only:
            names = by_transforms["mlxshim"]
            print(page({version: {n: {t: by_transforms[t][n] for t in TRANSFORMS} for n in names}}))
            return
        keep(by_transforms, version)
    files = sorted(KEPT.glob("*.json"), key=lambda f: [*map(int, f.stem.split("."))], reverse=True)
    versions = {file.stem: json.loads(file.read_text()) for file in files}
    write(ROOT / "docs" / "coverage.md", page(versions))


if __name__ == "__main__":
    main()
