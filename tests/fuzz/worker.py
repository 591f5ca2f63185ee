"""Programs in a process of their own, which may die or hang."""

from __future__ import annotations

import json
import os
import re
import sys
from typing import Any, NamedTuple

from processes import Process

_SOON = 10  # seconds
#: So that the prelude can fill new memory.
_MALLOC = {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=0"}
_EMPTY = re.compile(r"\((?:\d+, )*0[,)]")  # a shape with an axis of none


def is_empty(program: str) -> bool:
    """Whether an input of a program has no entries."""
    return _EMPTY.search(program.partition("INPUTS")[2]) is not None


class Verdict(NamedTuple):
    """What became of a program; `failure` is "" where nothing is wrong with it."""

    failure: str
    no_case: str = ""
    warnings: tuple[str, ...] = ()


class Worker:
    """A process that runs programs by their text, started anew after every death."""

    def __init__(self, limit: float = 20) -> None:
        self.limit = limit
        self._process = Process("fuzz.worker", limit=limit, environ=_MALLOC)
        self.close = self._process.close

    def run(self, program: str) -> Verdict:
        # Where MLX's kernel may not end, and calls no compiler, that is soon known.
        soon = is_empty(program) and "compile" not in program
        self._process.limit = min(self.limit, _SOON) if soon else self.limit
        self._process.ask(program)
        stage, warned = "", []
        while True:
            line = self._process.line()
            if not isinstance(line, dict):
                end = "hangs" if line is None else f"dies ({line})"
                # Where MLX itself dies of one sample there is nothing to compare with.
                if stage == "loop":
                    return Verdict("", f"the loop {end}")
                if line is None and is_empty(program):
                    return Verdict("", "hangs where nothing is summed")  # docs/mlx-issues.md
                return Verdict(end)
            if "verdict" in line:
                said = line["verdict"]
                no_case = said if said.startswith("no case") else ""
                return Verdict("" if no_case else said, no_case, tuple(warned))
            stage = line["stage"]
            if stage.startswith("warned "):
                warned.append(stage.removeprefix("warned "))


def _serve() -> None:
    from . import prelude

    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what an operation prints is no answer

    def say(**message: Any) -> None:
        out.write(json.dumps(message) + "\n")
        out.flush()

    for text in sys.stdin:
        namespace = dict(vars(prelude))
        try:
            exec(compile(json.loads(text), "program", "exec"), namespace)
            verdict = prelude.compare(
                namespace["program"],
                namespace["INPUTS"],
                roundoff=namespace["ROUNDOFF"],
                calls=namespace["CALLS"],
                announce=lambda stage: say(stage=stage),
            )
        except BaseException as e:
            verdict = f"the comparison raised {type(e).__name__}: {e}"
        say(verdict=verdict)


if __name__ == "__main__":
    _serve()
