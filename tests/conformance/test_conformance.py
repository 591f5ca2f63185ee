"""Every operation under every transform, each in a process that may die."""

from __future__ import annotations

import re

import pytest

from conformance.case import load
from conformance.worker import Worker
from mlxshim.core.versions import MLX, NEWEST_TESTED


@pytest.fixture(scope="session")
def worker():
    worker = Worker()
    yield worker
    worker.close()


@pytest.mark.parametrize("name", load())
def test_equals_the_loop(worker: Worker, name: str):
    results = worker.run(name)
    # Old versions lack some operations, or some of their arguments.
    assert results or MLX < NEWEST_TESTED, "the loop itself raised in every case"
    failed = [r for r in results if r["error"] and not _refused(r["error"])]
    lines = "\n".join(f"{r['mode']} {r['where']}: {r['error']}" for r in failed[:40])
    assert not failed, f"{len(failed)} of {len(results)} cases:\n{lines}"


def _refused(error: str) -> bool:
    """Old versions may lack an operation, if the error says which version has it.

    And MLX's compiler on CUDA makes no kernel of abs of complex numbers, in or out of a transform.
    """
    if re.match(r"RuntimeError: Failed to compile kernel: .*c8.*IAbs", error):
        return True
    return MLX < (0, 32, 0) and "needs MLX 0.32" in error
