"""What every test shares: a fixed seed, and interception found undone after each."""

from __future__ import annotations

import shutil
import sys

import mlx.core as mx
import pytest
from libraries import jax_library

from mlxshim.core import interception, levels
from mlxshim.transforms import _chunks


def pytest_terminal_summary(terminalreporter):
    on_cpu = mx.default_device().type == mx.cpu
    if sys.platform == "linux" and on_cpu and not shutil.which("g++"):
        terminalreporter.line(
            "There is no g++, without which mx.compile compiles nothing on a CPU."
        )


@pytest.fixture(autouse=True)
def _undone():
    mx.random.seed(0)
    before = mx.fast.scaled_dot_product_attention
    yield
    assert not interception.in_place()
    assert levels.active() == []
    assert not _chunks._local.running
    assert mx.fast.scaled_dot_product_attention is before


@pytest.fixture(scope="session")
def jax():
    """JAX's names in one namespace, as `libraries.OURS` has ours."""
    return jax_library()
