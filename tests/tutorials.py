"""Pages of documentation that run: their Python blocks in order, their output as it is printed.

    python tests/tutorials.py docs/tutorials/*.md      # write the outputs into the pages

A block

    ```python
    print(1 + 1)
    ```

is executed in the page's one namespace. The ```` ```text ```` block after it, if there is one, is
what it printed: compared word by word, numbers within a tolerance. Blocks with `import matplotlib`
are left out where it is not installed. What a page saves as an SVG lies beside it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import math
import os
import re
import shutil
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?")
PLOTS = importlib.util.find_spec("matplotlib") is not None
#: What rounding, another BLAS and another MLX may change of a printed number.
RELATIVE, ABSOLUTE = 0.15, 1e-6


class Block(NamedTuple):
    code: str
    line: int
    output: str | None  # what the page says that it prints
    end: int  # where in the page the code ends, fence included
    output_span: tuple[int, int] | None


def blocks(page: str) -> list[Block]:
    fences = list(FENCE.finditer(page))
    found = []
    for n, fence in enumerate(fences):
        if fence[1].strip() != "python" or ("import matplotlib" in fence[2] and not PLOTS):
            continue
        after = fences[n + 1] if n + 1 < len(fences) else None
        follows = (
            after is not None
            and after[1].strip() == "text"
            and not page[fence.end() : after.start()].strip()
        )
        found.append(
            Block(
                fence[2],
                page.count("\n", 0, fence.start()) + 1,
                after[2] if after is not None and follows else None,
                fence.end(),
                after.span() if after is not None and follows else None,
            )
        )
    return found


def outputs(path: Path) -> list[tuple[Block, str]]:
    """Execute a page in the current directory: each block and what it printed."""
    if PLOTS:
        import matplotlib

        matplotlib.use("agg")
        matplotlib.rcParams["svg.hashsalt"] = path.stem  # the same picture, the same file
    namespace: dict[str, Any] = {"__name__": path.stem}
    done = []
    for block in blocks(path.read_text("utf-8")):
        # Lines of a traceback are lines of the page.
        code = compile("\n" * block.line + block.code, str(path), "exec")
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(code, namespace)
        done.append((block, printed.getvalue()))
    return done


def same(said: str, printed: str) -> bool:
    """The words alike, and the numbers within the tolerance."""
    if NUMBER.sub("#", said).split() != NUMBER.sub("#", printed).split():
        return False
    pairs = zip(NUMBER.findall(said), NUMBER.findall(printed))
    return all(
        math.isclose(float(a), float(b), rel_tol=RELATIVE, abs_tol=ABSOLUTE) for a, b in pairs
    )


def rewrite(path: Path) -> None:
    """Put what the blocks print into the page."""
    page = path.read_text("utf-8")
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        ran = outputs(path)
        for plot in Path(folder).glob("*.svg"):
            shutil.copy(plot, path.parent)
        os.chdir(ROOT)
    for block, printed in reversed(ran):
        end = block.output_span[1] if block.output_span else block.end
        fresh = f"\n\n```text\n{printed.rstrip()}\n```" if printed.strip() else ""
        if block.output is None or not same(block.output, printed):
            page = page[: block.end] + fresh + page[end:]
    path.write_text(page, "utf-8")


if __name__ == "__main__":
    warnings.simplefilter("error")
    for page in [Path(name).resolve() for name in sys.argv[1:]]:
        rewrite(page)
        print(page.relative_to(ROOT))
