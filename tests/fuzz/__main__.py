"""Many random programs: `python -m tests.fuzz --programs 20000`, from the repository's root.

They run in another process, with a limit of time for each; what dies or hangs is a failure, and
the run goes on. Every failure is shrunk, printed, and written as a program that runs as it stands
to --out. Each batch that is done is noted in build/fuzz, with a digest of the code that it was run
on: a run that was stopped goes on where it was, and what has not changed is not run again.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import json
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

import mlx.core as mx  # noqa: E402

from .generate import whole  # noqa: E402
from .operations import OPERATIONS  # noqa: E402
from .search import Search  # noqa: E402

FAILURES, SEARCHES = 3, 8  # of one batch, after which the rest of it is not run


def code(*options: Any) -> str:
    """A digest of all that what comes of a program depends on."""
    files = sorted((ROOT / "mlxshim").rglob("*.py")) + sorted(Path(__file__).parent.glob("*.py"))
    files = [f for f in files if f.name not in ("__main__.py", "test_fuzz.py")]
    sums = [hashlib.sha256(f.read_bytes()).hexdigest() for f in files]
    return hashlib.sha256(repr((sums, mx.__version__, options)).encode()).hexdigest()[:16]


def run_batch(families: set[str], depth: int, limit: float, count: int, seed: int) -> Any:
    """What came of `count` different programs; others are run in the place of those not reached."""
    counts: collections.Counter[str] = collections.Counter()
    no_case: collections.Counter[str] = collections.Counter()
    failures, looped, seen = [], {}, set()
    for number in range(SEARCHES):
        if counts.total() >= count or len(failures) >= FAILURES:
            break
        search = Search(families, depth, limit)
        search.seen |= seen
        search.run(count - counts.total(), seed=seed * SEARCHES + number)
        counts += search.counts
        no_case += search.no_case
        looped |= {said: program for said, program in search.warned.items() if said not in looped}
        seen |= search.seen
        if search.failing is not None:
            failures.append(search.failing)
    return {
        "counts": counts,
        "no_case": no_case,
        "failures": failures,
        "looped": looped,
        "seen": sorted(seen),
    }


def noted(notes: Path, digest: str) -> Iterator[tuple[int, Any]]:
    for line in notes.read_text().splitlines() if notes.exists() else ():
        try:
            note = json.loads(line)
        except ValueError:  # the run was stopped as it wrote
            continue
        if note["code"] == digest:
            yield note["batch"], note


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--programs", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0, help="another seed, other programs")
    parser.add_argument("--batch", type=int, default=250, help="programs in one process")
    parser.add_argument("--only", nargs="*", default=[], choices=sorted(OPERATIONS))
    parser.add_argument("--without", nargs="*", default=[], choices=sorted(OPERATIONS))
    parser.add_argument("--depth", type=int, default=4, help="transforms around one program")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--limit", type=float, default=60, help="seconds for one program")
    parser.add_argument("--out", type=Path, default=Path("fuzz-failures"))
    parser.add_argument("--notes", type=Path, default=ROOT / "build" / "fuzz")
    options = parser.parse_args()
    families = (set(options.only) or set(OPERATIONS)) - set(options.without)
    digest = code(sorted(families), options.depth, options.batch)
    options.notes.mkdir(parents=True, exist_ok=True)
    notes = options.notes / f"{mx.__version__}.jsonl"
    first = options.seed * 1_000_000
    batches = range(first, first + -(-options.programs // options.batch))
    done = {batch: note for batch, note in noted(notes, digest) if batch in batches}
    tally = Tally(options.programs, options.out)
    for note in done.values():
        tally.add(note)

    def one(batch: int) -> tuple[int, Any]:
        return batch, run_batch(families, options.depth, options.limit, options.batch, batch)

    todo = [batch for batch in batches if batch not in done]
    with ThreadPoolExecutor(options.jobs) as pool, notes.open("a") as book:
        for batch, note in pool.map(one, todo):
            print(json.dumps({"code": digest, "batch": batch, **note}), file=book, flush=True)
            tally.add(note)
            tally.show()
    tally.end()
    return 1 if tally.failures else 0


class Tally:
    """What came of the programs so far, and what of it is shown."""

    def __init__(self, programs: int, out: Path) -> None:
        self.programs, self.out = programs, out
        self.counts: collections.Counter[str] = collections.Counter()
        self.no_case: collections.Counter[str] = collections.Counter()
        self.looped: collections.Counter[str] = collections.Counter()
        self.seen: set[str] = set()
        self.failures: list[str] = []
        self.start, self.before = time.time(), 0

    def add(self, note: Any) -> None:
        self.counts += collections.Counter(note["counts"])
        self.no_case += collections.Counter(note["no_case"])
        self.looped.update(note["looped"].keys())
        self.seen |= set(note["seen"])
        for program, said in note["failures"]:
            self.failures.append(said)
            name = hashlib.sha256(program.encode()).hexdigest()[:8]
            self.out.mkdir(parents=True, exist_ok=True)
            (self.out / f"{name}.py").write_text(whole(program))
            print(f"\n{self.out / name}.py: {said}\n{program}", flush=True)

    def show(self) -> None:
        count, width = self.counts.total(), 30
        filled = min(width, width * count // self.programs)
        seconds = time.time() - self.start
        print(
            f"\r[{'#' * filled}{'.' * (width - filled)}] {count} of {self.programs} programs, "
            f"{len(self.failures)} failures, {seconds:.0f} s",
            end="" if sys.stderr.isatty() else "\n",
            file=sys.stderr,
            flush=True,
        )

    def end(self) -> None:
        total = self.counts.total()
        print(f"\n{total} programs on MLX {mx.__version__}, {len(self.seen)} of them different")
        for kind, meaning in KINDS.items():
            print(f"{self.counts[kind]:8}  {kind}: {meaning}")
        for title, reasons in (("no case", self.no_case), ("looped", self.looped)):
            print(f"\n{title}, most frequent first" if reasons else "")
            for reason, count in reasons.most_common(12):
                print(f"{count:8}  {reason}")


KINDS = {
    "compared": "as the loop",
    "looped": "as the loop, with a warning: a loop over the samples, or nothing recomputed",
    "no case": "nothing to compare with: MLX itself refuses, dies, or magnifies rounding",
    "failed": "a mismatch, a crash or a hang",
}


if __name__ == "__main__":
    sys.exit(main())
