"""`python -m mlxshim`: the table, the JSON, the exit status, and every verdict it can give."""

from __future__ import annotations

import ctypes.util
import json
import os
import subprocess
import sys
import types

import mlx.core as mx
import pytest

from mlxshim import doctor
from mlxshim.core import versions


def run(*arguments):
    command = [sys.executable, "-m", "mlxshim", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=240)


def test_table():
    done = run("--filter", "vmap(grad) 4/2 causal")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "through mlxshim" in done.stdout
    assert "L=512" in done.stdout
    assert "mlxshim  4 of 4 pass" in done.stdout


def test_json_of_the_whole_matrix():
    done = run("--json")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["failed"] == 0
    mine = [r for r in found["results"] if r["side"] == "mlxshim"]
    assert len(mine) == len(doctor.cases())
    assert all(r["verdict"] == "PASS" and 0 <= r["error"] < 0.1 for r in mine)
    assert all(r["ms"] > 0 and r["mib"] > 0 for r in mine)


def test_no_such_case():
    assert run("--filter", "no such case").returncode == 2


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGPIPE")
def test_nobody_reads_on():
    command = [sys.executable, "-m", "mlxshim", "--filter", "random.uniform"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait(timeout=60) == 128 + 13


@pytest.mark.parametrize("second", [1.0, 2.0])
def test_two_samples_that_share_a_draw_are_seen(second):
    """`distinct` is of every pair: the first sample may differ from the others."""
    case = next(c for c in doctor.cases() if getattr(c, "distinct", False))
    draws = mx.stack([mx.full((64,), n) for n in (0.0, 1.0, second)])
    library = types.SimpleNamespace(vmap=lambda fun, in_axes: lambda x: [draws])
    under_test, meant, arrays = case.parts(library)
    error = doctor._error(under_test(*arrays), meant(*arrays))
    assert (error == 0) == (second == 2.0)


@pytest.mark.skipif(not versions.SELECT_JVP_BUG, reason="MLX 0.32.0 mended it")
def test_the_native_crash_of_causal_jvp_is_seen():
    """What is repaired must be broken first: in 0.31.1 and 0.31.2 this reads foreign memory, and
    mostly kills the process."""
    found = json.loads(run("--json", "--filter", "jvp 4/2 causal").stdout)
    native = {r["case"]: r["verdict"] for r in found["results"] if r["side"] == "native"}
    assert native["jvp 4/2 causal"] != "PASS"
    assert found["failed"] == 0


@pytest.mark.parametrize(
    "code, verdict",
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "SIGSEGV"),
        ("import time; time.sleep(60)", "HANG"),
        ("raise RuntimeError('broken')", "RuntimeError: broken"),
    ],
)
def test_verdicts(code, verdict):
    assert doctor.judge([sys.executable, "-c", code], timeout=2.0) == (verdict, {})


def test_a_wrong_number_fails(monkeypatch, capsys):
    found = {"error": 0.5, "ms": 1.0, "mib": 1.0}
    monkeypatch.setattr(doctor, "judge", lambda command, timeout: ("PASS", found))
    assert doctor.main(["--filter", "decode"]) == 1
    assert "WRONG" in capsys.readouterr().out


@pytest.mark.parametrize("error", [float("nan"), float("inf")])
def test_not_a_number_is_wrong(monkeypatch, error):
    monkeypatch.setattr(
        doctor, "judge", lambda *_: ("PASS", {"error": error, "ms": 1.0, "mib": 1.0})
    )
    result = doctor.examine(0, doctor.cases()[0], "mlxshim", False, 1.0)
    assert result.verdict == "WRONG"


WHEEL = "/env/mlx_cpu.libs/libblas-bd8a282c.so.3.10.0"
NUMPY = "/env/numpy.libs/libscipy_openblas64_-32a4b2a6.so"
SYSTEM = "/usr/lib/x86_64-linux-gnu/openblas-pthread/libopenblasp-r0.3.21.so"


@pytest.mark.parametrize(
    "files, preloaded, name",
    [
        ([WHEEL], False, "reference"),
        ([WHEEL, NUMPY], False, "reference"),
        ([WHEEL, SYSTEM], False, "reference"),  # loaded by somebody else, for himself
        ([WHEEL, SYSTEM], True, "OpenBLAS"),
        ([WHEEL, "/opt/libmkl_rt.so.2"], True, "MKL"),
        ([WHEEL, "/opt/libfast.so"], True, "preloaded"),
        ([SYSTEM], False, "OpenBLAS"),  # MLX built against it
        (["/usr/lib/x86_64-linux-gnu/openblas-pthread/libblas.so.3", SYSTEM], False, "OpenBLAS"),
        (["/usr/lib/x86_64-linux-gnu/blas/libblas.so.3"], False, "reference"),
        ([], False, "unknown"),
    ],
)
def test_which_blas(files, preloaded, name):
    assert doctor.name_blas(files, preloaded) == name


@pytest.mark.parametrize("name, said", [("reference", True), ("OpenBLAS", False)])
def test_the_reference_blas_is_said(monkeypatch, name, said):
    monkeypatch.setattr(doctor, "blas", lambda: name)
    found = doctor.about()
    assert found["blas"] == name
    noted = any("LD_PRELOAD=libopenblas.so" in note for note in found["notes"])
    assert noted == (said and found["device"] == "Device(cpu, 0)")


@pytest.mark.skipif(sys.platform != "linux", reason="LD_PRELOAD")
def test_a_preloaded_blas_is_seen():
    library = ctypes.util.find_library("openblas")
    if library is None:
        pytest.skip("no OpenBLAS")
    without = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}

    def found(env):
        code = "from mlxshim import doctor; print(doctor.blas())"
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
        return done.stdout.strip()

    if found(without) != "reference":
        pytest.skip("an MLX that does not carry the reference BLAS")
    assert found({**without, "LD_PRELOAD": library}) == "OpenBLAS"


def test_another_mlx_is_said(monkeypatch):
    said = {v: doctor._untested(v) for v in [*versions.TESTED, (0, 31, 0), (0, 32, 3), (0, 33, 0)]}
    assert all(not said[v] for v in (*versions.TESTED, (0, 32, 3)))
    assert "upgrade" in said[0, 31, 0][0]
    assert "newer than 0.32.4" in said[0, 33, 0][0] and "tests/conformance" in said[0, 33, 0][0]
    monkeypatch.setattr(versions, "MLX", (9, 0, 0))
    assert any("newer than" in note for note in doctor.about()["notes"])
