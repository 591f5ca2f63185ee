"""A process that answers in lines of JSON, and may die or hang."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import subprocess
import sys
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent


class Process:
    """`python -m module *arguments`, started at the first question and after every death."""

    def __init__(
        self, module: str, *arguments: str, limit: float = 60, environ: dict[str, str] | None = None
    ) -> None:
        self._command = [sys.executable, "-m", module, *arguments]
        self._environ = environ or {}
        self.limit = limit
        self.process: subprocess.Popen[bytes] | None = None
        self._buffer = b""

    def ask(self, question: Any) -> None:
        process = self.process or self._start()
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it is dead: `line` will say so
            process.stdin.write(json.dumps(question).encode() + b"\n")
            process.stdin.flush()

    def _start(self) -> subprocess.Popen[bytes]:
        self._buffer = b""
        paths = (str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH"))
        self.process = subprocess.Popen(
            self._command,
            cwd=TESTS,
            env={**os.environ, **self._environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        return self.process

    def line(self) -> dict[str, Any] | int | None:
        """The next line; where there is none the exit status of the process, None if it hangs."""
        process = self.process
        assert process is not None and process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._buffer:
                chunk = b""
                if selector.select(self.limit):
                    chunk = os.read(process.stdout.fileno(), 1 << 16)
                    if not chunk:
                        process.wait()
                if not chunk:
                    code = process.poll()
                    self.close()
                    return code
                self._buffer += chunk
        line, self._buffer = self._buffer.split(b"\n", 1)
        return json.loads(line)

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            # Waits, and closes the pipes: what a dead process was asked lies in one of them.
            with contextlib.suppress(BrokenPipeError), self.process:
                self.process = None
