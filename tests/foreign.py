"""MLX's own tests, natively and inside `mlxshim.patched()`: what passes there must pass here.

    python -m tests.foreign PATH [FILE ...] [--limit SECONDS]

PATH is a checkout of MLX (or its folder of tests), FILE the names of test files in it, by default
those that transforms take part in. Every file runs twice, one test after the other in a process of
its own; a test that kills the process, or that takes longer than the limit, counts as crashed, and
the next one goes on in a new process. The exit status is 1 if a test passes natively and not here.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import sys
import tempfile
import unittest
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tests.processes import Process

FILES = (
    "test_vmap.py",
    "test_autograd.py",
    "test_fast_sdpa.py",
    "test_compile.py",
    "test_quantized.py",
)
MODES = ("native", "patched")
OUTCOMES = ("passed", "failed", "crashed", "skipped")
#: Tests that assert that MLX refuses what mlxshim does. Here they may do without the refusal (no
#: `assertRaises` or `assertRaisesRegex` of theirs insists); all the rest of them counts.
LIFTED = {
    "test_vmap.TestVmap.test_vmap_pad": "mx.pad takes a value of its own for each sample",
    "test_autograd.TestAutograd.test_index_vjp_requires_stop_gradient": (
        "indices that are arguments are constants of the derivative"
    ),
    "test_blas.TestBlas.test_gather_matmul_index_vjp_requires_stop_gradient": (
        "indices that were computed are constants of the derivative"
    ),
    "test_eval.TestEval.test_async_eval_in_trace": "mx.async_eval of what is mapped waits",
    "test_ops.TestOps.test_searchsorted": "mx.searchsorted is mapped",
}


class Outcome(NamedTuple):
    kind: str
    why: str = ""


# The process that runs the tests ---------------------------------------------------------------


class _Result(unittest.TestResult):
    """One line of JSON for the beginning and for the end of every test."""

    def __init__(self, say: Callable[..., None], lifts: bool) -> None:
        super().__init__()
        self.say, self.lifts = say, lifts
        self.outcome = Outcome("passed")

    def startTest(self, test: Any) -> None:
        self.outcome = Outcome("passed")
        self.say(started=test.id())
        if self.lifts and test.id() in LIFTED:
            test.assertRaises = contextlib.suppress
            test.assertRaisesRegex = lambda error, *_: contextlib.suppress(error)

    def _failed(self, error: Any) -> None:
        if self.outcome.kind == "passed":
            kind, said, _ = error
            lines = str(said).strip().splitlines() or [""]
            self.outcome = Outcome("failed", f"{kind.__name__}: {lines[0]}")

    def addFailure(self, test: Any, err: Any) -> None:
        self._failed(err)

    def addError(self, test: Any, err: Any) -> None:
        alone = not isinstance(test, unittest.TestCase)  # a class that could not be set up
        if alone:
            self.startTest(test)
        self._failed(err)
        if alone:
            self.stopTest(test)

    def addSubTest(self, test: Any, subtest: Any, err: Any) -> None:
        if err is not None:
            self._failed(err)

    def addUnexpectedSuccess(self, test: Any) -> None:
        self.outcome = Outcome("failed", "it was expected to fail")

    def addSkip(self, test: Any, reason: str) -> None:
        self.outcome = Outcome("skipped", reason)

    def stopTest(self, test: Any) -> None:
        self.say(test=test.id(), kind=self.outcome.kind, why=self.outcome.why)


def _tests(suite: unittest.TestSuite) -> Iterator[unittest.TestCase]:
    for test in suite:
        if isinstance(test, unittest.TestSuite):
            yield from _tests(test)
        else:
            yield test


def work(mode: str, file: Path, done: Path) -> None:
    """Run what is not `done` yet of a file's tests, in this process."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the tests print is not for the parent

    def say(**line: Any) -> None:
        print(json.dumps(line), file=out, flush=True)

    sys.path.insert(0, str(file.parent))
    before = set(json.loads(done.read_text()))
    block: Any = contextlib.nullcontext()
    if mode == "patched":
        import mlxshim

        block = mlxshim.patched()
    with block:
        module = importlib.import_module(file.stem)
        tests = list(_tests(unittest.defaultTestLoader.loadTestsFromModule(module)))
        left = unittest.TestSuite(test for test in tests if test.id() not in before)
        left.run(_Result(say, mode == "patched"))
    say(finished=True)
    out.close()
    os._exit(0)  # what a process of MLX's dies of at its exit is no test's


# Its parent ------------------------------------------------------------------------------------


def run_file(mode: str, file: Path, limit: float) -> dict[str, Outcome]:
    """The outcome of every test of a file."""
    outcomes: dict[str, Outcome] = {}
    while True:
        with tempfile.TemporaryDirectory() as folder:
            done = Path(folder) / "done"
            done.write_text(json.dumps(list(outcomes)))
            process = Process("tests.foreign", "--work", mode, str(file), str(done), limit=limit)
            process.ask(None)  # starts it
            try:
                running, ended = _follow(process, outcomes)
            finally:
                process.close()
        if isinstance(ended, dict):
            return outcomes
        why = f"it took longer than {limit:g} s" if ended is None else f"exit status {ended}"
        if running is None:
            raise SystemExit(f"{file} cannot be run, {mode}: {why}")
        outcomes[running] = Outcome("crashed", why)


def _follow(process: Process, outcomes: dict[str, Outcome]) -> tuple[str | None, Any]:
    """(the test under way, what `process.line` said) when the process is at its end."""
    running: str | None = None
    while True:
        line = process.line()
        if not isinstance(line, dict) or "finished" in line:
            return running, line
        running = line.get("started")
        if "test" in line:
            outcomes[line["test"]] = Outcome(line["kind"], line["why"])


# The table -------------------------------------------------------------------------------------


def table(found: dict[str, dict[str, dict[str, Outcome]]]) -> str:
    """File by file, how many tests had which outcome in which mode."""
    heads = [
        "",
        *(f"{mode}: {kind}" if kind == "passed" else kind for mode in MODES for kind in OUTCOMES),
    ]
    rows = [heads]
    total: Counter[tuple[str, str]] = Counter()
    for name, modes in found.items():
        counts = Counter((mode, o.kind) for mode in MODES for o in modes[mode].values())
        total += counts
        rows.append([name, *(str(counts[mode, kind]) for mode in MODES for kind in OUTCOMES)])
    rows.append(["all", *(str(total[mode, kind]) for mode in MODES for kind in OUTCOMES)])
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = [
        "| " + " | ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) + " |"
        for row in rows
    ]
    rule = [":" + "-" * (widths[0] + 1), *("-" * (w + 1) + ":" for w in widths[1:])]
    return "\n".join([lines[0], "|" + "|".join(rule) + "|", *lines[1:]])


def worse(modes: dict[str, dict[str, Outcome]]) -> list[str]:
    """The tests that pass natively and not inside patched(), and why."""
    lines: list[str] = []
    for test, native in modes["native"].items():
        here = modes["patched"].get(test, Outcome("missing"))
        if native.kind == "passed" and here.kind != "passed":
            lines.append(f"{test} {here.kind}: {here.why}")
    return lines


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["--work"]:
        mode, file, done = arguments[1:]
        work(mode, Path(file), Path(done))
    parser = argparse.ArgumentParser(
        prog="python -m tests.foreign",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("path", type=Path)
    parser.add_argument("files", nargs="*", default=list(FILES))
    parser.add_argument("--limit", type=float, default=120.0, help="seconds for one test")
    options = parser.parse_args(arguments)
    folder = next(
        (p for p in (options.path / "python" / "tests", options.path) if any(p.glob("test_*.py"))),
        None,
    )
    if folder is None:
        parser.error(f"{options.path} is no checkout of MLX: it has no python/tests/test_*.py")
    missing = [name for name in options.files if not (folder / name).is_file()]
    if missing:
        parser.error(f"{folder} has no {', '.join(missing)}")
    found: dict[str, dict[str, dict[str, Outcome]]] = {}
    failing: list[str] = []
    for name in options.files:
        file = (folder / name).resolve()
        found[name] = {}
        for mode in MODES:
            print(f"{name}, {mode} ...", file=sys.stderr, flush=True)
            found[name][mode] = run_file(mode, file, options.limit)
        failing += worse(found[name])
    print(table(found))
    lifted = [test for test in LIFTED if any(test in modes["patched"] for modes in found.values())]
    for test in lifted:
        print(f"\n{test} is let do without its refusal: {LIFTED[test]}.")
    print(f"\n{len(failing)} pass natively and not inside patched()" + (":" if failing else "."))
    for line in failing:
        print(f"  {line}")
    return 1 if failing else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
