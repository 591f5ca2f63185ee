"""A slice of the random programs, the same at every run; `python -m tests.fuzz` runs many more."""

from __future__ import annotations

import subprocess
import sys

import pytest

from fuzz.found import PROGRAMS
from fuzz.generate import KINDS, whole
from fuzz.operations import OPERATIONS
from fuzz.search import Search
from fuzz.worker import Worker
from mlxshim.core.versions import MLX

WRONG = """
def program(t):
    def f(a):
        return [a * (2.0 if t.__name__ == "Ours" else 3.0)]

    return t.vmap(f, (0,), [0])


INPUTS = [("normal", (2, 3), "float32")]
PRECISION, CALLS = 2e-4, 1
"""


@pytest.mark.parametrize("family", sorted(OPERATIONS))
def test_random_programs_equal_the_loop(family: str):
    # Before 0.32 MLX's own jvp of one sample is wrong: nothing to compare with. What 0.31.1
    # compiles for a CPU is wrong without a transform (docs/mlx-issues.md).
    wrong = {"jvp"} if MLX < (0, 32, 0) else set()
    wrong |= {"compile"} if MLX < (0, 31, 2) else set()
    kinds = [k for k in KINDS if k not in wrong]
    search = Search({family, "elementwise"}, kinds=kinds, may_hang=False)
    search.run(25)
    assert search.failing is None, "\n".join(search.failing or ())
    assert search.counts["compared"] > 10, search.counts


@pytest.mark.parametrize("name", sorted(PROGRAMS))
def test_what_has_failed_once(name: str):
    worker = Worker()
    verdict = worker.run(PROGRAMS[name])
    worker.close()
    assert not verdict.failure
    assert not verdict.no_case or MLX < (0, 32, 4)


def test_what_differs_is_found_and_runs_as_it_stands(tmp_path):
    worker = Worker()
    said = worker.run(WRONG).failure
    worker.close()
    assert said.startswith("output 0 differs")
    path = tmp_path / "program.py"
    path.write_text(whole(WRONG))
    done = subprocess.run([sys.executable, path], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == said


@pytest.mark.parametrize(
    ("body", "said"),
    [("import os; os.abort()", "dies (-6)"), ("import time; time.sleep(7)", "hangs")],
)
def test_a_death_and_a_hang_are_failures(body: str, said: str):
    worker = Worker(limit=3)
    line = f"        if t.__name__ == 'Ours': {body}\n"
    verdict = worker.run(WRONG.replace("        return", line + "        return"))
    assert verdict.failure == said
    # It starts anew.
    assert worker.run(WRONG).failure.startswith("output 0 differs")
    worker.close()


def test_rounding_that_a_program_makes_large_is_no_case():
    body = "return [mx.floor(1e7 * a * (1.0 if t.__name__ == 'Ours' else 1.0 + 6e-8)) % 2]"
    worker = Worker()
    verdict = worker.run(WRONG.replace("return [a", body + "\n        return [a"))
    worker.close()
    assert verdict.no_case.startswith("no case: output 0 differs")
