"""The examples and the benchmarks run, small, and say what they should."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def run(*arguments):
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_per_sample_gradients():
    out = run("examples/per_sample_gradients.py", "--quick", "--samples", "8")
    assert "gradients of 8 lines: largest relative error" in out  # --quick yields to an option
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


def test_models_benchmark(tmp_path):
    path = tmp_path / "models.json"
    small = "--layers 1 --dim 16 --hidden 24 --vocabulary 30 --length 8 --samples 3 --repeats 3"
    wanted = "ordinary;loop;per-sample;norms;clipped"
    run("-m", "benchmarks.models", *small.split(), "--only", wanted, "--json", str(path))
    rows = json.loads(path.read_text())["rows"]
    assert [r["contender"] for r in rows] == wanted.split(";")
    assert all(r["error"] < 1e-4 and r["ms"] > 0 and "note" not in r for r in rows)


def test_private_training_on_ranks():
    out = run("examples/private_training_on_ranks.py", "--quick")
    assert "1 ranks with the same parameters: True" in out


def test_all_benchmarks_write_one_page(tmp_path):
    pytest.importorskip("rich")  # of the bench extra
    wanted = "prefix,blas"
    run("-m", "benchmarks", "--quick", "--only", wanted, "--out", str(tmp_path / "results"))
    page = (tmp_path / "performance.md").read_text("utf-8")
    for name in wanted.split(","):
        assert f"python -m benchmarks.{name} " in page
    assert "](results/prefix-" in page


def test_a_command_of_a_benchmark_is_one_for_any_machine(monkeypatch):
    from benchmarks._program import announce

    arguments = ["--only", "rms norm;cnn", "--json", "/tmp/a b/x.json", "--png=/tmp/x.png"]
    monkeypatch.setattr(sys, "argv", ["peers.py", *arguments, "--out", "docs/x"])
    monkeypatch.setattr(os, "environ", {"PATH": "/bin", "MLX_ENABLE_TF32": "0"})
    said = announce("peers", {})["command"]
    assert said == (
        "MLX_ENABLE_TF32=0 "
        "python -m benchmarks.peers --only 'rms norm;cnn' --json x.json --png=x.png --out docs/x"
    )


def test_the_page_of_performance_is_what_its_files_say():
    from benchmarks._render import render

    docs = ROOT / "docs"
    assert (docs / "performance.md").read_text("utf-8") == render(docs / "benchmarks")


def test_peers_call_what_mlx_compiles_before_they_time_it(monkeypatch):
    from benchmarks import peers

    begun = []

    def run(command, **options):
        begun.append((command[command.index("--worker") + 1], command[-1]))
        raise subprocess.TimeoutExpired(command, options["timeout"])

    monkeypatch.setattr(subprocess, "run", run)

    def warm(seconds):
        peers.warm(
            ["mlxshim", "jax", "mx.vmap"], ["cnn", "jacobian"], 1.0, time.perf_counter() + seconds
        )

    warm(-1.0)
    assert not begun  # the time is over
    warm(60.0)
    assert len(begun) == 4 and {name for name, _ in begun} == {"mlxshim", "mx.vmap"}
    assert {seconds for _, seconds in begun} == {"0.0"}  # nothing is timed


def test_a_framework_that_is_not_installed_is_not_waited_for(tmp_path, monkeypatch):
    from benchmarks import peers

    # Its output ends some time before the process does.
    (tmp_path / "torch.py").write_text(
        "import os, time\nos.close(1)\ntime.sleep(1)\n"
        "raise ModuleNotFoundError(\"No module named 'torch'\")\n"
    )
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    monkeypatch.setattr(peers, "environment", lambda: {**os.environ, "PYTHONPATH": path})
    rows = list(peers.results("torch.func", ["rms norm, grad"], 0.1, limit=60))
    assert [row["note"] for row in rows] == ["not installed"]


def test_a_contender_that_hangs_loses_the_task_it_is_at(monkeypatch):
    from benchmarks import peers

    # Two lines in one write, more on stderr than a pipe holds, and silence.
    program = (
        "import os, sys, time\nsys.stderr.write('warning ' * 50000)\n"
        'os.write(1, b\'{"task": "a"}\\n{"begins": "b"}\\n\')\ntime.sleep(100)\n'
    )
    monkeypatch.setattr(peers, "worker", lambda *_: [sys.executable, "-I", "-c", program])
    rows = list(peers.results("mlxshim", ["a", "b"], 0.1, limit=60, patience=2))
    assert [(row["task"], row.get("note")) for row in rows] == [
        ("a", None),
        ("b", "no answer in 2 s"),
    ]
    rows = list(peers.results("mlxshim", ["a", "b", "c"], 0.1, limit=2))
    assert [row.get("note") for row in rows] == [None, "no answer in 2 s", "not begun in 2 s"]


def test_a_contender_on_another_device_has_no_times():
    from benchmarks import peers

    loop = {"size": {"n": 16}, "sketch": [3.0, 4.0], "ms": 1.0}
    row = {"size": {"n": 16}, "sketch": [3.0, 4.5], "ms": 2.0}
    peers.comparable(row, loop)
    assert row["error"] == pytest.approx(0.1) and row["ms"] == 2.0
    row = {"size": {"n": 4}, "sketch": [3.0, 4.0], "ms": 2.0}
    peers.comparable(row, loop)
    assert "ms" not in row and row["note"]


def test_norms_benchmark(tmp_path):
    path = tmp_path / "norms.json"
    run("-m", "benchmarks.norms", "--shapes", "2x3x4x64", "--repeats", "3", "--json", str(path))
    rows = json.loads(path.read_text())["rows"]
    assert len(rows) == 6 and all(r.get("error", 0) < 1e-4 for r in rows)


#: What each prints at its end, however small.
QUICK = {
    "dp_sgd_lora": r"loss of records that nobody trained on: ([\d.]+) before, ([\d.]+) with",
    "attribution": r"the changed copy comes first for (\d+) of 24 lines",
    "fisher_laplace": r"whole covariance +standard deviation ([\d.]+) at the data, ([\d.]+) in",
    "empirical_ntk": r"the wider, the nearer: (True|False)",
    "ensemble": r"([\d.]+) s as one, ([\d.]+) s one by one",
    "batched_lora": r"one prompt +([\d.]+) KiB\n +put together +([\d.]+) KiB",
    "transformer_jacobians": r"sharpest: eigenvalue +([-\d.]+), loss",
}


@pytest.mark.parametrize("name", QUICK)
def test_quick(name, tmp_path):
    # Each ends with an error if its own check against a loop or an exact answer fails.
    plot = tmp_path / "plot.png"
    draws = importlib.util.find_spec("matplotlib") is not None
    out = run(f"examples/{name}.py", "--quick", *(["--plot", str(plot)] if draws else []))
    assert re.search(QUICK[name], out), out
    assert "largest relative error" in out
    if draws:
        assert plot.read_bytes().startswith(b"\x89PNG")


def test_every_example_is_run():
    files = {path.stem for path in (ROOT / "examples").glob("*.py")} - {"_common"}
    assert files == {*QUICK, "per_sample_gradients", "private_training_on_ranks"}
