"""The tables of docs/porting-*.md are complete and true, and their programs run."""

from __future__ import annotations

import functools
import importlib
import inspect
import re
import types
from pathlib import Path

import numpy as np
import pytest

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGES = ["porting-jax.md", "porting-torch.md"]


def rows(page: str) -> list[tuple[list[str], str]]:
    """(the names in the first column, the second column) of every row of the tables."""
    found = re.findall(r"^\| (`.*?) \| (.*) \|$", (DOCS / page).read_text(), re.MULTILINE)
    return [(re.findall(r"`([^`]+)`", theirs), ours) for theirs, ours in found]


def public(module: types.ModuleType) -> dict[str, object]:
    return {
        name: x
        for name, x in vars(module).items()
        if not name.startswith("_") and not isinstance(x, types.ModuleType)
    }


def source(x: object) -> str:
    try:
        return inspect.getsourcefile(inspect.unwrap(x)) or ""  # type: ignore
    except TypeError:
        return ""


def jax_names() -> set[str]:
    jax = pytest.importorskip("jax")
    importlib.import_module("jax.flatten_util")
    names = {
        f"jax.{name}"
        for name, x in public(jax).items()
        if "config" not in f"{getattr(x, '__module__', '')}" and name != "annotations"
    }
    for name, x in public(jax.lax).items():
        if re.search(r"lax/(parallel|control_flow/\w+)\.py$", source(x).replace("\\", "/")):
            names.add(f"jax.lax.{name}")
    for part in ("tree", "tree_util", "flatten_util"):
        names |= {f"jax.{part}.{name}" for name in public(getattr(jax, part))}
    return names


def torch_names() -> set[str]:
    torch = pytest.importorskip("torch", reason="PyTorch is not part of the test extra")
    importlib.import_module("torch.func")
    return {f"torch.func.{name}" for name in public(torch.func)}


@pytest.mark.parametrize("page, names", [*zip(PAGES, [jax_names, torch_names])], ids=PAGES)
def test_every_name_has_a_place(page, names):
    listed = {name for theirs, _ in rows(page) for name in theirs}
    assert len(listed) > 10
    missing = sorted(names() - listed)
    assert not missing, missing


@pytest.mark.parametrize("page", PAGES)
def test_every_place_exists(page):
    """Each name of mlxshim's and of MLX's that a table sends a reader to."""
    checked = 0
    for _, ours in rows(page):
        for name in re.findall(r"`((?:mlxshim|mlx|mx|nn)\.[\w.]+)", ours):
            module, *path = name.split(".")
            owner = importlib.import_module({"mx": "mlx.core", "nn": "mlx.nn"}.get(module, module))
            for part in path:
                if not hasattr(owner, part):
                    importlib.import_module(f"{owner.__name__}.{part}")
                owner = getattr(owner, part)
            checked += 1
    assert checked > 5


@pytest.mark.parametrize("page", PAGES)
def test_no_row_is_empty_and_no_name_is_there_twice(page):
    names = [name for theirs, _ in rows(page) for name in theirs]
    assert len(names) == len(set(names)), sorted(names)
    assert all(ours.strip() for _, ours in rows(page))


def programs(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)


@functools.cache
def result(page: str, number: int) -> np.ndarray:
    names: dict[str, object] = {"__name__": page}
    exec(compile(programs(page)[number], page, "exec"), names)
    return np.array(names["main"]().tolist(), np.float32)  # type: ignore


@pytest.mark.parametrize("page, library", [*zip(PAGES, ["jax", "torch"])], ids=PAGES)
def test_the_ported_program_answers_as_the_original(page, library):
    pytest.importorskip(library)
    theirs, ours = result(page, 0), result(page, 1)
    assert theirs.shape == ours.shape and theirs.size > 10
    np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("page", PAGES)
def test_the_ported_program_runs(page):
    assert len(programs(page)) == 2
    values = result(page, 1)
    assert np.isfinite(values).all() and values[1:].min() < values[0]  # a loss falls
