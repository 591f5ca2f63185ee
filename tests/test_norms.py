"""Norms and positions as on a GPU: the rules that the CPU has no reason to take."""

from __future__ import annotations

import pytest
from conformance.case import load

from mlxshim.rules import _devices
from mlxshim.testing import check

FAMILIES = ("fast.rms_norm", "fast.layer_norm", "fast.rope", "fast.cross_entropy")
CASES = {name: c for name, c in load().items() if name.split("/")[0] in FAMILIES}


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_devices, "gpu", lambda: True)


@pytest.mark.parametrize("name", CASES)
def test_the_rules_equal_the_loop(as_on_a_gpu: None, name: str):
    case = CASES[name]
    assert check(case.fun, *case.arrays, **case.options) > 0
