"""Many random programs: `python -m tests.fuzz --programs 20000`, from the repository's root.

Every failure is shrunk, printed, and written as a program that runs as it stands to --out.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .generate import whole
from .operations import OPERATIONS
from .search import Search


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--programs", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0, help="another seed, other programs")
    parser.add_argument("--batch", type=int, default=250, help="programs up to one failure")
    parser.add_argument("--only", nargs="*", default=[], choices=sorted(OPERATIONS))
    parser.add_argument("--without", nargs="*", default=[], choices=sorted(OPERATIONS))
    parser.add_argument("--depth", type=int, default=4, help="transforms around one program")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--limit", type=float, default=60, help="seconds for one program")
    parser.add_argument("--out", type=Path, default=Path("fuzz-failures"))
    options = parser.parse_args()
    families = (set(options.only) or set(OPERATIONS)) - set(options.without)
    start, total, failures = time.time(), collections.Counter(), 0
    batches = range(-(-options.programs // options.batch))

    def one(batch: int) -> Search:
        search = Search(families, options.depth, options.limit)
        search.run(options.batch, seed=options.seed * 1_000_003 + batch)
        return search

    with ThreadPoolExecutor(options.jobs) as pool:
        for search in pool.map(one, batches):
            total += search.counts
            if search.failing is not None:
                failures += 1
                program, said = search.failing
                name = hashlib.sha256(program.encode()).hexdigest()[:8]
                options.out.mkdir(exist_ok=True)
                (options.out / f"{name}.py").write_text(whole(program))
                print(f"\n{said}\n{program}", flush=True)
            print(
                f"\r{sum(total.values())} programs, {total['compared']} compared, "
                f"{total['looped']} looped, {failures} failures, {time.time() - start:.0f} s",
                end="" if sys.stdout.isatty() else "\n",
                flush=True,
            )
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
