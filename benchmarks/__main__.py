"""Run every benchmark, each in a process of its own, and write docs/performance.md from it all.

    python -m benchmarks [--minutes 10] [--only NAME,...] [--out docs/benchmarks] [--render-only]
    python -m benchmarks --quick --out ../quick/benchmarks     # whether all of them run

Each writes OUT/NAME-DEVICE.json and .png. The page, performance.md beside OUT, is rendered from
every result in OUT, whatever machine it is from. It needs `pip install -e ".[bench]"`.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from ._measure import GPU, describe_machine
from ._render import render

#: Name -> its arguments for a share of the time, in minutes.
BENCHMARKS: dict[str, Callable[[float], list[str]]] = {
    "trace": lambda minutes: ["--minutes", f"{minutes:.2f}"],
    "overhead": lambda minutes: ["--minutes", f"{minutes:.2f}"],
    "interception": lambda minutes: ["--minutes", f"{minutes:.2f}"],
    "attention": lambda minutes: ["--repeats", "20", "--seconds", f"{minutes / 3:.2f}"],
    "operations": lambda minutes: ["--repeats", "20", "--seconds", f"{minutes:.2f}"],
    "scaling": lambda minutes: ["--minutes", f"{minutes:.2f}"],
    "blocks": lambda minutes: ["--minutes", f"{minutes:.2f}"],
    "prefix": lambda minutes: ["--seconds", "0.3"],
    "models": lambda minutes: ["--seconds", "2"],
    # Seven processes, and XLA compiles: in less there would be holes.
    "peers": lambda minutes: ["--minutes", f"{max(minutes, 3.0):.2f}"],
    "blas": lambda minutes: ["--repeats", "20"],
}
#: The smallest that each runs at: it says that the command works, and nothing of speed.
QUICK = {
    "trace": "--minutes 0.02 --layers 1",
    "overhead": "--minutes 0.02",
    "interception": "--minutes 0.02",
    "attention": "--lengths 16 --samples 2 --dim 8 --heads 4/2 --repeats 3",
    "operations": "--repeats 3 --only rms_norm",
    "scaling": "--minutes 0.02 --only batch,soak --calls 50",
    "blocks": "--lengths 64 --without-mask 64 --seconds 0.1",
    "prefix": "--rows 1,4 --prefix 64 --seconds 0.05",
    "models": "--layers 1 --dim 16 --hidden 24 --vocabulary 30 --length 8 --samples 3 --repeats 3",
    "peers": "--minutes 0.05 --only rms",
    "blas": "--sizes 64 --repeats 3",
}
DRAW_NOTHING = {"interception", "models", "blas"}


def device_tag() -> str:
    """A word for the device, as file names have it: "h100", "apple-m3", "cpu"."""
    if not GPU:
        return "cpu"
    name = re.sub(r"nvidia|geforce|\d+gb|hbm\d*", " ", str(describe_machine()["device"]).lower())
    return re.sub(r"[^a-z0-9]+", "-", name).strip("-") or "gpu"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=10.0, help="about, for all")
    parser.add_argument("--quick", action="store_true", help="small sizes, in a minute")
    parser.add_argument("--only", default=",".join(BENCHMARKS), help="separated by commas")
    parser.add_argument("--out", default="docs/benchmarks", help="the folder of the results")
    parser.add_argument("--render-only", action="store_true", help="measure nothing")
    options = parser.parse_args()
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    failed: list[str] = []
    if not options.render_only:
        names, tag = options.only.split(","), device_tag()
        if unknown := set(names) - set(BENCHMARKS):
            parser.error(f"no benchmark is called {', '.join(sorted(unknown))}")
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (TextColumn("{task.description:<16}"), BarColumn(), TimeElapsedColumn())
        with Progress(*columns) as progress:
            bar = progress.add_task("", total=len(names))
            for name in names:
                progress.update(bar, description=name)
                files = [f"--{kind}={out / f'{name}-{tag}.{kind}'}" for kind in ("json", "png")]
                files = files[: 1 + (name not in DRAW_NOTHING)]
                command = [sys.executable, "-m", f"benchmarks.{name}", *files]
                share = options.minutes / len(names)
                command += QUICK[name].split() if options.quick else BENCHMARKS[name](share)
                child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
                assert child.stdout is not None
                for line in child.stdout:
                    progress.console.print(
                        line.rstrip(), markup=False, highlight=False, soft_wrap=True
                    )
                if child.wait():
                    failed.append(name)
                progress.advance(bar)
    page = out.parent / "performance.md"
    page.write_text(render(out), "utf-8")
    print(f"wrote {page}" + (f"; failed: {', '.join(failed)}" if failed else ""))
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
