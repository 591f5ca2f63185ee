"""docs/coverage.md: what its command notes, and what it makes of it."""

from __future__ import annotations

import importlib
from typing import Any, ClassVar

import pytest

command: Any = importlib.import_module("conformance.__main__")


class Scripted:
    """A worker that finds what it is told to, and keeps what it was asked."""

    asked: ClassVar[list[str]] = []

    def __init__(self, transforms: str) -> None:
        self.transforms = transforms

    def run(self, name: str) -> list[dict[str, Any]]:
        Scripted.asked.append(name)
        native = self.transforms == "mlx.core"
        worst = {"mode": "vmap", "error": "DIED (-11)" if native else None, "wrong": False}
        return [
            {"mode": "vmap", "error": None, "wrong": False, "looped": False},
            {**worst, "looped": not native},
        ]

    def close(self) -> None: ...


@pytest.fixture
def notes(tmp_path: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(command, "NOTES", tmp_path)
    monkeypatch.setattr(command, "Worker", Scripted)
    names = [*(f"sort/{n}" for n in range(5)), "sort/last", "argsort", "abs"]
    monkeypatch.setattr(command, "load", lambda: dict.fromkeys(names))
    monkeypatch.setattr(Scripted, "asked", [])
    return tmp_path


def test_a_run_goes_on_where_it_was_stopped(notes: Any, monkeypatch: pytest.MonkeyPatch):
    table = command.run("mlxshim", ("sort/",), "0.0")
    assert table == {"sort": {"vmap": {"right": 6, "looped": 6}}}
    (book,) = notes.iterdir()
    lines = book.read_text().splitlines(keepends=True)
    book.write_text("".join(lines[:3]) + lines[3][:10])  # it died as it wrote the fourth
    first = Scripted.asked.copy()
    assert command.run("mlxshim", ("sort/",), "0.0") == table
    assert Scripted.asked[len(first) :] == first[3:]


def test_what_was_found_on_other_code_is_found_again(notes: Any, monkeypatch: pytest.MonkeyPatch):
    command.run("mlxshim", ("sort/last",), "0.0")
    monkeypatch.setattr(command, "digest", lambda transforms: "another")
    command.run("mlxshim", ("sort/last",), "0.0")
    assert Scripted.asked == ["sort/last"] * 2


def test_the_page_says_what_each_comes_to(notes: Any):
    tables = {t: command.run(t, ("sort/", "argsort"), "0.0") for t in command.TRANSFORMS}
    sound = {t: {"vmap": {"right": 3}} for t in command.TRANSFORMS}
    versions = {"0.0": {"sort": {t: tables[t]["sort"] for t in tables}, "abs": sound}}
    page = command.page(versions)
    assert "| `sort` | crash 6/12 → looped 6/12 |" in page
    assert "Right everywhere, with both: `abs`." in page
    assert "| 0.0 | MLX | 1 of 2 | 9 | 0 | 0 | 0 | 6 |" in page
    assert "| 0.0 | mlxshim | 1 of 2 | 9 | 6 | 0 | 0 | 0 |" in page


def test_the_outcomes_are_told_apart():
    def outcome(error: str | None, wrong: bool = False, looped: bool = False) -> str:
        return command.outcome({"error": error, "wrong": wrong, "looped": looped})

    assert outcome(None) == "right"
    assert outcome(None, looped=True) == "looped"
    assert outcome("differs by 1", wrong=True) == "wrong"
    assert outcome("ValueError: no") == "refused"
    assert outcome("HANG") == outcome("DIED (-11)") == "crash"
