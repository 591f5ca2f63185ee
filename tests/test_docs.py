"""What the documentation names exists: functions, their keywords, files, commands, options."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import re
from pathlib import Path
from typing import Any

import pytest

import mlxshim
import mlxshim.nn
import mlxshim.nn.privacy
from mlxshim.core import versions

ROOT = Path(__file__).resolve().parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
IDS = [str(page.relative_to(ROOT)) for page in PAGES]
FOLDERS = "mlxshim|tests|docs|examples|benchmarks|scripts"
#: Made up, for an example.
NOT_IN_MLX = {"mx.fast.soft_cap", "mx.fast.some_new_operation"}


def resolved(name: str) -> Any:
    """A dotted name's object; None if there is none."""
    found: Any = importlib.import_module(name.split(".")[0])
    for i, part in enumerate(name.split(".")[1:], 2):
        if not hasattr(found, part):
            try:
                importlib.import_module(".".join(name.split(".")[:i]))
            except ImportError:
                return None
        found = getattr(found, part)
    return found


def missing_names(text: str) -> set[str]:
    """Of the form mlxshim.one.two, outside of paths."""
    names = set(re.findall(r"(?<![\w/.\-])mlxshim(?:\.[A-Za-z_]\w*)+", text))
    return {name for name in names if resolved(name) is None}


def missing_mlx_names(text: str) -> set[str]:
    names = set(re.findall(r"(?<![\w.])mx(?:\.[A-Za-z_]\w*)+", text)) - NOT_IN_MLX
    return {name for name in names if resolved(f"mlx.core{name[2:]}") is None}


def missing_files(text: str, folder: Path) -> set[str]:
    named = set(re.findall(rf"(?<![\w./-])(?:{FOLDERS})/[\w./-]*\w", text))
    linked = set(re.findall(r"\]\(([\w./-]+\.\w+)(?:#[\w-]*)?\)", text))
    return {x for x in named if not (ROOT / x).exists() and not (folder / x).exists()} | {
        x for x in linked if not (folder / x).exists()
    }


def wrong_commands(text: str) -> set[str]:
    """Commands of modules that are not there, and options that their source does not have."""
    found = set()
    command = (
        r"python3? (?:-m ((?:mlxshim|tests|benchmarks)(?:\.\w+)*)|(examples/\w+\.py))([^\n`|#]*)"
    )
    for module, file, rest in re.findall(command, text):
        if module:
            spec = importlib.util.find_spec(module)
            if spec is not None and spec.submodule_search_locations:
                spec = importlib.util.find_spec(f"{module}.__main__")
            file = spec.origin if spec else None
        if file is None or not Path(ROOT / file).is_file():
            found.add(f"python -m {module}")
            continue
        source = Path(ROOT / file).read_text("utf-8")
        shared = "".join(
            path.read_text("utf-8")
            for path in (ROOT / file).parent.glob("_*.py")
            if f"from {'.' if module else ''}{path.stem} import" in source
        )
        for option in re.findall(r"(?<![\w-])--[a-z][\w-]*", rest):
            if f'"{option}"' not in source + shared:
                found.add(f"{module or file} {option}")
    return found


def public(node: ast.expr) -> Any:
    """The public function of mlxshim that a call in a page means."""
    if isinstance(node, ast.Name):
        for module in (mlxshim, mlxshim.nn, mlxshim.nn.privacy):
            if node.id in getattr(module, "__all__", ()):
                return getattr(module, node.id)
    if isinstance(node, ast.Attribute) and ast.unparse(node).startswith("mlxshim."):
        return resolved(ast.unparse(node))
    return None


def wrong_keywords(text: str) -> set[str]:
    """Keywords that a public function does not take, in code within a line and in blocks."""
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    spans = re.findall(
        r"(?<!`)`([^`\n]+)`(?!`)", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    )
    found = set()
    for code in [*blocks, *(span.replace("…", "...") for span in spans)]:
        try:
            tree = ast.parse(code)
        except SyntaxError:
            continue
        for node in ast.walk(tree):
            function = public(node.func) if isinstance(node, ast.Call) else None
            if function is None or not callable(function):
                continue
            taken = inspect.signature(function).parameters
            if any(p.kind is p.VAR_KEYWORD for p in taken.values()):
                continue
            given = {k.arg for k in node.keywords if k.arg}  # type: ignore[union-attr]
            found |= {f"{ast.unparse(node)}: {name}" for name in given - set(taken)}
    return found


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_what_a_page_names_is_there(page):
    text = page.read_text("utf-8")
    assert not missing_names(text)
    assert not missing_files(text, page.parent)
    assert not wrong_commands(text)
    if page.name not in ("porting-jax.md", "porting-torch.md"):  # their names are not mlxshim's
        assert not wrong_keywords(text)


@pytest.mark.skipif(versions.MLX < versions.NEWEST_TESTED, reason="an older MLX has fewer names")
@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_what_a_page_names_of_mlx_is_there(page):
    assert not missing_mlx_names(page.read_text("utf-8"))


def test_what_is_not_there_is_seen():
    assert missing_names("`mlxshim.vmapp` and `mlxshim.vmap`") == {"mlxshim.vmapp"}
    assert missing_mlx_names("`mx.sine(x)`, `mx.sin(x)`") == {"mx.sine"}
    assert missing_files("`docs/none.md`, [one](two.md), `docs/limits.md`", ROOT) == {
        "docs/none.md", "two.md",
    }  # fmt: skip
    commands = "python -m benchmarks.nothing\npython -m benchmarks.trace --layers 3 --none 1\n"
    assert wrong_commands(commands) == {"python -m benchmarks.nothing", "benchmarks.trace --none"}
    assert wrong_commands("python examples/ensemble.py --quick --slow") == {
        "examples/ensemble.py --slow"
    }
    assert wrong_keywords("`vmap(f, chunks=2)`, `vmap(f, chunk_size=2)`") == {
        "vmap(f, chunks=2): chunks"
    }
