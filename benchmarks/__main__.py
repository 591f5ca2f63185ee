"""Run every benchmark, each in a process of its own, and write docs/performance.md from it all.

    python -m benchmarks [--minutes 10] [--only NAME,...] [--out docs/benchmarks] [--render-only]

Each writes OUT/NAME-DEVICE.json and .png. docs/performance.md is rendered from every result in OUT,
whatever machine it is from.
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
    "attention": lambda minutes: ["--repeats", "20"],
    "operations": lambda minutes: ["--repeats", "20"],
    "scaling": lambda minutes: ["--minutes", f"{minutes:.2f}"],
    "blocks": lambda minutes: ["--minutes", f"{minutes:.2f}"],
    "prefix": lambda minutes: ["--seconds", "0.3"],
    "models": lambda minutes: ["--seconds", "2"],
    "peers": lambda minutes: ["--minutes", f"{minutes:.2f}"],
}


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
    parser.add_argument("--only", default=",".join(BENCHMARKS))
    parser.add_argument("--out", default="docs/benchmarks")
    parser.add_argument("--render-only", action="store_true")
    options = parser.parse_args()
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    failed: list[str] = []
    if not options.render_only:
        names, tag = options.only.split(","), device_tag()
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (TextColumn("{task.description:<16}"), BarColumn(), TimeElapsedColumn())
        with Progress(*columns) as progress:
            bar = progress.add_task("", total=len(names))
            for name in names:
                progress.update(bar, description=name)
                files = [f"--{kind}={out / f'{name}-{tag}.{kind}'}" for kind in ("json", "png")]
                files = files[: 1 + (name not in ("models", "interception"))]  # they draw nothing
                command = [sys.executable, "-m", f"benchmarks.{name}", *files]
                command += BENCHMARKS[name](options.minutes / len(names))
                child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
                assert child.stdout is not None
                for line in child.stdout:
                    progress.console.print(line.rstrip(), markup=False, highlight=False)
                if child.wait():
                    failed.append(name)
                progress.advance(bar)
    page = Path("docs/performance.md")
    page.write_text(render(out))
    print(f"wrote {page}" + (f"; failed: {', '.join(failed)}" if failed else ""))
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
