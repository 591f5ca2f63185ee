"""Programs in a process of their own, which may die or hang."""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

TESTS = Path(__file__).resolve().parents[1]


class Verdict(NamedTuple):
    """What became of a program; `failure` is "" where nothing is wrong with it."""

    failure: str
    no_case: str = ""
    warnings: tuple[str, ...] = ()


class Worker:
    """A process that runs programs by their text, started anew after every death."""

    def __init__(self, limit: float = 60) -> None:
        self.limit = limit
        self.process: subprocess.Popen[bytes] | None = None
        self.buffer = b""

    def run(self, program: str) -> Verdict:
        process = self.process or self._start()
        assert process.stdin is not None
        process.stdin.write(json.dumps(program).encode() + b"\n")
        process.stdin.flush()
        stage, warned = "", []
        while True:
            line = self._line(process)
            if line is None:
                code = process.poll()
                self.close()
                end = "hangs" if code is None else f"dies ({process.returncode})"
                # Where MLX itself dies of one sample there is nothing to compare with.
                return Verdict("", f"the loop {end}") if stage == "loop" else Verdict(end)
            if "verdict" in line:
                said = line["verdict"]
                no_case = said if said.startswith("no case") else ""
                return Verdict("" if no_case else said, no_case, tuple(warned))
            stage = line["stage"]
            if stage.startswith("warned "):
                warned.append(stage.removeprefix("warned "))

    def _start(self) -> subprocess.Popen[bytes]:
        self.buffer = b""
        path = f"{TESTS.parent}{os.pathsep}{TESTS}"
        self.process = subprocess.Popen(
            [sys.executable, "-m", "fuzz.worker"],
            cwd=TESTS,
            env={**os.environ, "PYTHONPATH": path},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        return self.process

    def _line(self, process: subprocess.Popen[bytes]) -> dict[str, Any] | None:
        assert process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while b"\n" not in self.buffer:
                if not selector.select(self.limit):
                    return None
                chunk = os.read(process.stdout.fileno(), 1 << 16)
                if not chunk:
                    process.wait()
                    return None
                self.buffer += chunk
        line, self.buffer = self.buffer.split(b"\n", 1)
        return json.loads(line)

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            with self.process:  # waits, and closes the pipes
                self.process = None


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
                precision=namespace["PRECISION"],
                calls=namespace["CALLS"],
                announce=lambda stage: say(stage=stage),
            )
        except BaseException as e:
            verdict = f"the comparison raised {type(e).__name__}: {e}"
        say(verdict=verdict)


if __name__ == "__main__":
    _serve()
