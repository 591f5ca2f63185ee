"""Gradients over several processes of one host, started by mlx.launch."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from mlxshim.nn import across_ranks, clipped_grad, distributed

TESTS = Path(__file__).resolve().parent
#: Open MPI refuses root, as whom tests run in a container, without these.
AS_ROOT = {
    f"{name}_ALLOW_RUN_AS_ROOT{again}": "1"
    for name in ("OMPI", "PRTE")
    for again in ("", "_CONFIRM")
}
BESIDE = Path(sys.executable).parent / "mlx.launch"
AVAILABLE = "import mlx.core as mx; assert mx.distributed.is_available('mpi')"
LAUNCH = str(BESIDE) if BESIDE.exists() else shutil.which("mlx.launch")


def _run(command, env):
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, env=env, check=False
    )


def _environment(backend):
    """What the processes need; None where the backend cannot be had."""
    path = os.pathsep.join([str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, **AS_ROOT, "PYTHONPATH": path}
    if backend == "nccl":
        gpus = mx.device_count(mx.gpu) if mx.distributed.is_available("nccl") else 0
        return env if gpus >= 2 else None
    if backend == "mpi":
        # The wheel of Open MPI puts it beside Python, where no library is looked for.
        env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env["PATH"]])
        mpirun = shutil.which("mpirun", path=env["PATH"])
        if mpirun is None:
            return None
        libraries = [str(Path(mpirun).parent.parent / "lib"), env.get("LD_LIBRARY_PATH", "")]
        env |= {"LD_LIBRARY_PATH": os.pathsep.join(libraries), "MLX_MPI_LIBNAME": "libmpi.so.40"}
        text = _run([mpirun, "--version"], env).stdout
        found = _run([sys.executable, "-c", AVAILABLE], env).returncode == 0
        # mlx.launch uses options of Open MPI 5.
        return env if found and "Open MPI) 5" in text else None
    return env


@pytest.mark.parametrize("backend", ["ring", "mpi", "nccl"])
def test_the_sum_over_ranks_is_that_of_one_process(backend):
    if LAUNCH is None:
        pytest.skip("no mlx.launch")
    env = _environment(backend)
    if env is None:
        pytest.skip({"mpi": "no Open MPI 5", "nccl": "not a GPU for each process"}[backend])
    # For MPI the launcher takes a program by its name, for the others a script.
    python = [Path(sys.executable).name] if backend == "mpi" else ["--python", sys.executable]
    launch = [sys.executable, LAUNCH, "-n", "2", "--backend", backend, *python]
    done = _run([*launch, str(TESTS / "nn_ranks.py"), backend], env)
    text = done.stdout.replace("}{", "}\n{")
    rows = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    assert len(rows) == 12, done.stdout + done.stderr
    by_case = {(row.pop("case"), row.pop("rank")): row for row in rows}
    for rank in (0, 1):
        for case in ("uneven", "none"):
            row = by_case[case, rank]
            assert row.pop("size") == 2
            assert all(error < 1e-5 for error in row.values()), row
        assert by_case["compiled", rank]["error"] < 1e-5
        assert by_case["half", rank]["dtypes"] == ["mlx.core.bfloat16"]
        assert by_case["dtypes", rank] == {"joined": True, "added": True}
        assert by_case["failure", rank]["after"] < 1e-5
    assert by_case["failure", 0]["ended"].startswith("RankFailed: [across_ranks] Rank 1 of 2")
    assert by_case["failure", 1]["ended"] == "KeyError: 'mine'"


def test_one_process():
    model, x = nn.Linear(2, 1), mx.random.normal((3, 2))
    clip = clipped_grad(model, lambda model, x: model(x).sum(), 1.0)
    got = across_ranks(clip, ("samples", "sum", "samples"))(model, x)
    for (_, g), (_, w) in zip(tree_flatten(got), tree_flatten(clip(model, x))):
        assert mx.array_equal(g, w)
    with pytest.raises(ZeroDivisionError):
        across_ranks(lambda: 1 / 0, ("own",))()


def test_errors():
    with pytest.raises(ValueError, match="'mean'"):
        across_ranks(lambda: None, ("mean",))
    with pytest.raises(ValueError, match="outputs has 2 entries, the function returned 1"):
        across_ranks(lambda: (mx.ones(2),), ("own", "sum"))()
    with pytest.raises(ValueError, match="leading axis"):
        across_ranks(lambda: (mx.ones(2), mx.ones(3)), ("samples", "samples"))()
    with pytest.raises(ValueError, match="eval"):
        mx.compile(across_ranks(lambda x: (2 * x,), ("sum",)))(mx.ones(2))


def test_messages_are_filled(monkeypatch):
    monkeypatch.setattr(distributed, "MESSAGE", 10)
    arrays = [mx.zeros(n, d) for n, d in ((4, mx.float32), (3, mx.bfloat16), (2, mx.int32))]
    arrays += [mx.zeros(20), mx.zeros(3), mx.zeros(3, mx.int32)]
    assert distributed._messages(arrays) == [[0, 1], [2, 5], [3], [4]]


class _Alone:
    """A group of one that goes through the exchange all the same."""

    def size(self):
        return 1

    def rank(self):
        return 0


def test_sums_keep_shapes_and_dtypes(monkeypatch):
    monkeypatch.setattr(distributed, "MESSAGE", 10)
    monkeypatch.setattr(mx.distributed, "all_sum", lambda x, group: 2 * x)
    tree = {"a": mx.ones((2, 3), mx.float16), "b": [mx.ones(()), {"c": mx.ones((7,), mx.int32)}]}
    got = distributed._sum(tree, _Alone())
    for (name, g), (_, w) in zip(tree_flatten(got), tree_flatten(tree)):
        assert g.shape == w.shape and g.dtype == w.dtype and mx.array_equal(g, 2 * w), name
