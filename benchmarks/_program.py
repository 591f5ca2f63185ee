"""What every benchmark is as a program: its options, what it says of itself, what it leaves.

Nothing here imports MLX: a benchmark whose parts run in processes of their own may do without.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import sys
from pathlib import Path
from typing import Any


def command_line(about: str | None, *, png: bool = True) -> argparse.ArgumentParser:
    """One with --json and, of a benchmark that draws, --png."""
    found = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawTextHelpFormatter
    )
    found.add_argument("--json", metavar="FILE", help="write the results there")
    if png:
        found.add_argument("--png", metavar="FILE", help="draw them (needs matplotlib)")
    return found


def announce(name: str, machine: dict[str, Any], **settings: Any) -> dict[str, Any]:
    """What a result begins with, and the terminal is told: the command, the machine, settings.

    The command is one for any machine: of a file elsewhere on this one it has the name. MLX's
    switches in the environment are a part of it.
    """
    arguments = [re.sub(r"^(--\w+=)?/(?:.*/)?", r"\1", argument) for argument in sys.argv[1:]]
    command = shlex.join(["python", "-m", f"benchmarks.{name}", *arguments])
    switches = [f"{k}={v}" for k, v in sorted(os.environ.items()) if k.startswith("MLX_")]
    command = " ".join([*switches, command])
    found = {"command": command, **machine, **settings}
    print(json.dumps(found, default=str), flush=True)
    return found


def save(path: str | None, result: dict[str, Any]) -> None:
    """As the file that `--json` named, if it was given."""
    if path:
        Path(path).write_text(json.dumps(result, indent=1, default=str) + "\n", "utf-8")


def pyplot() -> Any:
    """matplotlib's, with no need of a display."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    return plt
