"""`python -m mlxshim`: the table, the JSON, the exit status, and every verdict it can give."""

from __future__ import annotations

import json
import subprocess
import sys

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


@pytest.mark.skipif(not versions.SELECT_JVP_BUG, reason="MLX 0.32.0 mended it")
def test_the_native_crash_of_causal_jvp_is_seen():
    """What is repaired must be broken first: in 0.31.1 and 0.31.2 this kills the process."""
    found = json.loads(run("--json", "--filter", "jvp 4/2 causal").stdout)
    native = {r["case"]: r["verdict"] for r in found["results"] if r["side"] == "native"}
    assert native["jvp 4/2 causal"] == "SIGSEGV"
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
