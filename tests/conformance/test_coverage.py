"""No operation of MLX slips through: each has a case, or a reason to have none."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import pytest

from conformance.case import load
from conformance.not_operations import NOT_OPERATIONS, PENDING


def operations() -> Iterator[str]:
    """Every public name of the installed MLX, as cases call it."""
    at = type(mx.zeros(1).at[0])
    owners = {"": mx, "array.": mx.array, "array.at.": at}
    for name in ("fast", "linalg", "random", "fft", "distributed"):
        owners[f"{name}."] = getattr(mx, name)
    for prefix, owner in owners.items():
        for name in dir(owner):
            special = name.startswith("__") and isinstance(owner, type)
            if special and getattr(owner, name) is getattr(object, name, None):
                continue
            if (special and name not in _EVERY_TYPE) or not name.startswith("_"):
                yield prefix + name


#: What Python gives every type, and nanobind every class.
_EVERY_TYPE = {"__class__", "__doc__", "__init__", "__init_subclass__", "__module__", "__new__"} | {
    "__subclasshook__",
    "__hash__",
    "__dict__",
    "__weakref__",
}


def _namespaces() -> set[str]:
    return {"fast", "linalg", "random", "fft", "distributed"}


def missing() -> set[str]:
    covered = {name.split("/")[0] for name in load()}
    return set(operations()) - covered - NOT_OPERATIONS.keys() - PENDING - _namespaces()


def test_every_operation_has_a_case():
    assert not missing(), f"neither a case nor a reason: {' '.join(sorted(missing()))}"


def test_methods_in_place_syntax_and_places_are_enumerated():
    found = set(operations())
    assert {"add", "fast.rope", "linalg.qr", "random.normal", "fft.fft"} <= found
    assert {"array.sum", "array.T", "array.__setitem__", "array.__iadd__"} <= found
    assert {"array.at.add", "array.at.multiply", "array.__matmul__", "array.__iter__"} <= found


@pytest.mark.parametrize(
    "where, name",
    [
        (mx, "frobnicate"),
        (mx.fast, "fused_frobnicate"),
        (mx.linalg, "frobnicate"),
        (mx.fft, "frobnicate"),
        (mx.random, "frobnicate"),
        (mx.array, "frobnicate"),
        (mx.array, "__irfrob__"),
        (type(mx.zeros(1).at[0]), "frobnicate"),
    ],
    ids=["core", "fast", "linalg", "fft", "random", "methods", "in place", "at"],
)
def test_a_new_operation_does_not_slip_past(monkeypatch: pytest.MonkeyPatch, where: Any, name: str):
    before = missing()
    monkeypatch.setattr(where, name, lambda *_: None, raising=False)
    (new,) = missing() - before
    assert new.endswith(name)


def test_what_has_a_case_needs_no_excuse():
    covered = {name.split("/")[0] for name in load()}
    excused = covered & (NOT_OPERATIONS.keys() | PENDING)
    assert not excused, f"have a case and are excused too: {' '.join(sorted(excused))}"
    twice = NOT_OPERATIONS.keys() & PENDING
    assert not twice, f"are excused twice: {' '.join(sorted(twice))}"
