"""A slice of the random programs, the same at every run; `python -m tests.fuzz` runs many more."""

from __future__ import annotations

import subprocess
import sys

import pytest

from fuzz.found import PROGRAMS
from fuzz.generate import KINDS, whole
from fuzz.operations import OPERATIONS
from fuzz.search import Search
from fuzz.worker import Verdict, Worker
from mlxshim.core.versions import MLX

WRONG = """
def program(t):
    def f(a):
        return [a * (2.0 if t.__name__ == "Ours" else 3.0)]

    return t.vmap(f, (0,), [0])


INPUTS = [("normal", (2, 3), "float32")]
ROUNDOFF, CALLS = 2**-24, 1
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


EMPTY = """
def program(t):
    def f(b, c, d):
        return [mx.addmm(d, b, c), (d * (2.0 if t.__name__ == "Ours" else {factor}))]

    g = t.vmap(f, (None, 1, -2), [0, 0])
    g = t.vmap(g, (2, 2, 1), [0, 0])
    g = t.value_and_grad(g, [2])
    return g


INPUTS = [
    ("normal", (0, 4, 1, 2), "float32"),
    ("normal", (0, 2, 1, 2, 1), "float32"),
    ("normal", (1, 1, 1, 2, 1), "float32"),
]
ROUNDOFF, CALLS = 2**-24, 1
"""


def test_of_what_is_summed_over_nothing_the_rest_is_compared():
    worker = Worker()
    assert not worker.run(EMPTY.format(factor=2.0)).failure
    assert worker.run(EMPTY.format(factor=3.0)).failure
    worker.close()


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


def judged(body: str, kind: str, shape: tuple[int, ...], dtype: str, bits: int) -> Verdict:
    """A program whose function, of `a` and of whether it is `ours`, returns `body`."""
    worker = Worker()
    verdict = worker.run(f"""
def program(t):
    def f(a):
        ours = t.__name__ == "Ours"
        return [{body}]

    return t.vmap(f, (0,), [0])


INPUTS = [({kind!r}, {shape}, {dtype!r})]
ROUNDOFF, CALLS = 2**-{bits}, 1
""")
    worker.close()
    return verdict


@pytest.mark.parametrize(
    ("dtype", "bits", "factor"),
    [("float32", 24, 1.00001), ("float16", 11, 1.05), ("bfloat16", 8, 1.2)],
)
def test_what_rounding_does_not_explain_is_found(dtype: str, bits: int, factor: float):
    body = f"0.5 * a * ({factor} if ours else 1.0)"
    verdict = judged(body, "positive", (2, 3), dtype, bits)
    assert verdict.failure.startswith("output 0 differs")


@pytest.mark.parametrize(("dtype", "bits"), [("float32", 24), ("float16", 11), ("bfloat16", 8)])
def test_the_order_of_a_sum_that_cancels_is_rounding(dtype: str, bits: int):
    zero = "mx.sum(mx.concatenate([a, -a]{}))"
    body = f"{zero.format('[::-1]')} if ours else {zero.format('')}"
    pieces = "sum(mx.sum(p) for p in mx.split(a if ours else a[::-1], 40))"
    for compared in (body, f"{pieces} - mx.sum(a)"):
        assert not judged(compared, "normal", (2, 200), dtype, bits).failure


def test_integers_are_compared_to_the_last_bit():
    body = "a + mx.array(1 if ours else 0, mx.uint32)"
    assert judged(body, "bits", (2, 3), "uint32", 24).failure.startswith("output 0 differs by 1")


def test_rounding_that_a_program_makes_large_is_no_case():
    body = "return [mx.floor(1e7 * a * (1.0 if t.__name__ == 'Ours' else 1.0 + 6e-8)) % 2]"
    worker = Worker()
    verdict = worker.run(WRONG.replace("return [a", body + "\n        return [a"))
    worker.close()
    assert verdict.no_case == "no case: rounding is as large as the values"
