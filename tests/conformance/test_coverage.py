"""No operation of MLX slips through: each has a case, or a reason to have none."""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx

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


def test_every_operation_has_a_case():
    covered = {name.split("/")[0] for name in load()}
    missing = set(operations()) - covered - NOT_OPERATIONS.keys() - PENDING - _namespaces()
    assert not missing, f"neither a case nor a reason: {' '.join(sorted(missing))}"


def test_what_has_a_case_needs_no_excuse():
    covered = {name.split("/")[0] for name in load()}
    excused = covered & (NOT_OPERATIONS.keys() | PENDING)
    assert not excused, f"have a case and are excused too: {' '.join(sorted(excused))}"
    twice = NOT_OPERATIONS.keys() & PENDING
    assert not twice, f"are excused twice: {' '.join(sorted(twice))}"
