"""Cases in a process of their own: a crash or a hang is one failing case, the run goes on."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from processes import Process

from mlxshim.core.versions import SELECT_JVP_BUG

_NOT_BEGUN = "loop -1"

#: Freed memory is filled (glibc, macOS): MLX's own derivative of one sample, where it reads what
#: is no tangent, dies at once and is no oracle; it does not answer with what lay there before.
_POISON = {"MALLOC_PERTURB_": "165", "MallocScribble": "1"}


class Worker:
    """A process that runs cases by name, started anew after every death.

    With `everything`, in the modes that are left out elsewhere too.
    """

    def __init__(
        self,
        transforms: str = "mlxshim",
        limit: float = 60,
        server: str = __name__,
        everything: bool = False,
    ) -> None:
        flags = ["everything"] * everything
        environ = _POISON if SELECT_JVP_BUG else None
        self._process = Process(server, transforms, *flags, limit=limit, environ=environ)
        self.close = self._process.close

    def run(self, name: str) -> list[dict[str, Any]]:
        """The outcome of each case of one operation, in the words of `mlxshim.testing.Result`, and
        whether it was found by a loop over the samples."""
        results: list[dict[str, Any]] = []
        start, blind = 0, -1
        while True:
            fresh = self._process.process is None
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
            died = {"mode": mode, "where": place, "error": death, "wrong": False, "share": 0.0}
            results.append({**died, "looped": False})

    def _attempt(
        self, name: str, start: int, blind: int, results: list[dict[str, Any]]
    ) -> tuple[str, bool, str]:
        self._process.ask([name, start, blind])
        stage = _NOT_BEGUN
        while True:
            line = self._process.line()
            if not isinstance(line, dict):
                return stage, False, "HANG" if line is None else f"DIED ({line})"
            if "done" in line:
                return stage, True, ""
            if "stage" in line:
                stage = line["stage"]
            elif "raised" in line:
                raise RuntimeError(line["raised"])
            else:
                results.append(line)


def _serve(transforms: str, *flags: str) -> None:
    import importlib
    import warnings

    import mlx.core as mx

    from conformance.case import load
    from mlxshim import PerformanceWarning
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
            with warnings.catch_warnings(record=True) as heard:
                warnings.simplefilter("always")
                for result in conformance(
                    case.fun,
                    *case.arrays,
                    **(case.in_all_modes() if flags else case.options),
                    transforms=module,
                    skip=range(start),
                    blind=(blind,),
                    announce=lambda stage: say(stage=stage),
                ):
                    looped = any(issubclass(w.category, PerformanceWarning) for w in heard)
                    heard.clear()
                    say(**result._asdict(), looped=looped)
        except Exception as e:
            say(raised=f"{type(e).__name__}: {e}")
            continue
        say(done=True)


if __name__ == "__main__":
    _serve(*sys.argv[1:])
