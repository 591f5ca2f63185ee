"""An architecture in a process of its own, in the protocol of `conformance.worker`."""

from __future__ import annotations

import importlib
import json
import os
import sys
import warnings
from typing import Any

import mlx.core as mx


def _serve(transforms: str) -> None:
    from architectures.configurations import VOCABULARY, build
    from architectures.samples import answer, difference, loop, quantized, questions, randomized
    from mlxshim import PerformanceWarning

    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a model prints is no answer

    def say(**message: Any) -> None:
        out.write(json.dumps(message) + "\n")
        out.flush()

    def ask(name: str, start: int, blind: int) -> None:
        number = -1
        for kind in ("dense", "4-bit"):

            def make(kind: str = kind) -> Any:
                mx.random.seed(0)
                model = randomized(build(name))
                return model if kind == "dense" else quantized(model)

            if (reason := _unavailable(make)) is not None:
                say(mode="build", where=kind, unavailable=reason)
                return
            if make() is None:
                continue
            for question in questions(make, VOCABULARY):
                number += 1
                if number < start:
                    continue
                want = None
                if number != blind:
                    say(stage=f"loop {number}")
                    try:
                        want = loop(question)
                    except Exception as e:
                        say(mode=question.mode, where=kind, refused=_said(e))
                        continue
                say(stage=f"case {number} {question.mode} {kind}")
                say(mode=question.mode, where=kind, **compared(question, want))

    def compared(question: Any, want: Any) -> dict[str, Any]:
        looped = None
        try:
            try:
                got = answer(question, module)
            except PerformanceWarning as e:
                looped = str(e)
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    got = answer(question, module)
        except Exception as e:
            return {"error": _said(e)}
        return {"error": want and difference(got, want), "looped": looped, "compared": True}

    module = importlib.import_module(transforms)
    warnings.simplefilter("ignore")
    warnings.simplefilter("error", PerformanceWarning)  # a loop would equal the loop
    for line in sys.stdin:
        name, start, blind = json.loads(line)
        try:
            ask(name, start, blind)
        except BaseException as e:
            say(raised=_said(e))
            continue
        say(done=True)


def _unavailable(make: Any) -> str | None:
    """Why the architecture cannot be had on this machine at all; None if it can."""
    try:
        if (model := make()) is not None:
            mx.eval(model(mx.array([[1, 2]])))
    except (ImportError, SystemExit) as e:
        return f"it cannot be imported: {_said(e)}"
    except RuntimeError as e:
        if "No Metal back-end" not in str(e):
            raise
        return "it is written for Metal alone"
    return None


def _said(e: BaseException) -> str:
    return f"{type(e).__name__}: {(str(e).splitlines() or [''])[0][:300]}"


if __name__ == "__main__":
    _serve(sys.argv[1])
