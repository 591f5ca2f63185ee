"""Every public name says what it takes and raises, and has an example, which is a doctest."""

from __future__ import annotations

import inspect
import re
import runpy
from pathlib import Path

import pytest

import mlxshim
import mlxshim.nn

NAMES = [(module, name) for module in (mlxshim, mlxshim.nn) for name in module.__all__]
IDS = [f"{module.__name__}.{name}" for module, name in NAMES]

#: Functions that refuse nothing of their own.
REFUSE_NOTHING = {
    "intercepted", "random_projection", "stop_gradient", "tree_flatten", "tree_leaves",
    "tree_structure",
}  # fmt: skip


@pytest.mark.parametrize("module, name", NAMES, ids=IDS)
def test_docstring(module, name):
    public = getattr(module, name)
    if public is mlxshim.jacrev:  # is mlxshim.jacobian, too
        name = "jacrev"
    doc = inspect.getdoc(public)
    assert doc and "Example:" in doc
    example = doc.split("Example:")[1]
    assert re.search(rf">>> .*\b{name}\b", example), "the example does not use it"
    if inspect.isclass(public):
        return
    if name not in REFUSE_NOTHING:
        assert "Raises:" in doc or re.search(r"errors are\s+those of", doc)
    elsewhere = re.search(r"rguments.{0,30} those of `", doc)
    for parameter in inspect.signature(public).parameters.values():
        if parameter.name.startswith("_") or parameter.kind is parameter.VAR_KEYWORD:
            continue
        described = re.search(rf"\b{parameter.name}\b", doc.split("Example:")[0])
        assert described or elsewhere, f"{parameter.name} is not described"


@pytest.mark.parametrize("module", [mlxshim, mlxshim.nn], ids=["mlxshim", "mlxshim.nn"])
def test_what_is_public(module):
    assert sorted(module.__all__) == list(module.__all__)
    assert all(hasattr(module, name) for name in module.__all__)


def test_the_typed_program_runs():
    runpy.run_path(str(Path(__file__).parent / "typing" / "public.py"))
