"""The example and the benchmark run, small, and say what they should."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def run(*arguments):
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_per_sample_gradients():
    small = ["--seconds", "1", "--samples", "4", "--dim", "32"]
    out = run("examples/per_sample_gradients.py", *small)
    assert "largest relative error" in out
    assert "vmap(grad)" in out
    assert len([line for line in out.splitlines() if line.startswith(("  +", "  -"))]) == 8


def test_attention_benchmark(tmp_path):
    path = tmp_path / "attention.json"
    small = "--lengths 16 --samples 2 --dim 8 --repeats 3 --heads 4/2 --json"
    run("-m", "benchmarks.attention", *small.split(), str(path))
    found = json.loads(path.read_text())
    mine = [r for r in found["rows"] if r["contender"].startswith("mlxshim")]
    assert {r["section"] for r in mine} == {"forward", "grad", "grad-square", "decode"}
    assert all(r["error"] < 1e-5 and r["ms"] > 0 for r in mine)
    assert found["trace_us"]["vmap"]["mlxshim"] > 0
