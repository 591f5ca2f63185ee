"""Cases in a process of their own: a crash or a hang is one failing case, the run goes on."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import subprocess
import sys
from pathlib import Path
from typing import Any

_NOT_BEGUN = "loop -1"
TESTS = Path(__file__).resolve().parents[1]


class Worker:
    """A process that runs cases by name, started anew after every death."""

    def __init__(
        self, transforms: str = "mlxshim", limit: float = 60, server: str = __name__
    ) -> None:
        self.transforms, self.limit, self.server = transforms, limit, server
        self.process: subprocess.Popen[bytes] | None = None
        self.buffer = b""

    def run(self, name: str) -> list[dict[str, Any]]:
        """The outcome of each case of one operation, in the words of `mlxshim.testing.Result`."""
        results: list[dict[str, Any]] = []
        start, blind = 0, -1
        while True:
            fresh = self.process is None
            stage, done, death = self._attempt(name, start, blind, results)
            if done:
                return results
            if stage == _NOT_BEGUN:  # what died here was hurt by the operation before
                if fresh:
                    raise RuntimeError(f"the worker died before {name} began")
                continue
            kind, number, *where = stage.split(" ", 3)
            if kind == "loop":  # where MLX's own derivative dies, ours must not
                start = blind = int(number)
                continue
            start = int(number) + 1
            mode, place = where
            results.append({"mode": mode, "where": place, "error": death, "wrong": False})

    def _attempt(
        self, name: str, start: int, blind: int, results: list[dict[str, Any]]
    ) -> tuple[str, bool, str]:
        process = self.process or self._start()
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(json.dumps([name, start, blind]).encode() + b"\n")
            process.stdin.flush()
        stage = _NOT_BEGUN
        while True:
            line = self._line(process)
            if line is None:
                code = process.poll()
                self.close()
                return stage, False, "HANG" if code is None else f"DIED ({process.returncode})"
            if "done" in line:
                return stage, True, ""
            if "stage" in line:
                stage = line["stage"]
            elif "raised" in line:
                raise RuntimeError(line["raised"])
            else:
                results.append(line)

    def _start(self) -> subprocess.Popen[bytes]:
        self.buffer = b""
        paths = (str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH"))
        self.process = subprocess.Popen(
            [sys.executable, "-m", self.server, self.transforms],
            cwd=TESTS,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
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


def _serve(transforms: str) -> None:
    import importlib
    import warnings

    import mlx.core as mx

    from conformance.case import load
    from mlxshim.testing import conformance

    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what an operation prints is no answer

    def say(**message: Any) -> None:
        out.write(json.dumps(message) + "\n")
        out.flush()

    cases, module = load(), importlib.import_module(transforms)
    for line in sys.stdin:
        name, start, blind = json.loads(line)
        mx.random.seed(0)
        case = cases[name]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                for result in conformance(
                    case.fun,
                    *case.arrays,
                    **case.options,
                    transforms=module,
                    skip=range(start),
                    blind=(blind,),
                    announce=lambda stage: say(stage=stage),
                ):
                    say(**result._asdict())
        except Exception as e:
            say(raised=f"{type(e).__name__}: {e}")
            continue
        say(done=True)


if __name__ == "__main__":
    _serve(sys.argv[1])
