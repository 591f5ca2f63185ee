"""The table of cases, and the samples they are drawn from."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

CASES: dict[str, Case] = {}


@dataclass(frozen=True)
class Case:
    """`fun` of one sample, with a source for each argument, and options of `conformance`."""

    fun: Callable[..., Any]
    arrays: tuple[Any, ...]
    options: dict[str, Any] = field(default_factory=dict)


def case(
    name: str, fun: Callable[..., Any], *arrays: Any, half: bool = True, **options: Any
) -> None:
    """Put an operation through the suite, in one line.

    `name` is the public name below `mlx.core` ("fast.rms_norm", "array.__setitem__"), with a
    variant after a slash where there are several ("conv2d/grouped"). Where there are `dtypes` the
    case says itself in which it is tried; else it is tried in one of two bytes too, unless `half`
    is False.
    """
    assert name not in CASES, f"{name} is there twice"
    CASES[name] = Case(_late(fun), arrays, options)
    if half and "dtypes" not in options and _floating(arrays):
        dtype = (mx.float16, mx.bfloat16)[len(CASES) % 2]
        modes = [mode for mode in options.get("modes", _IN_HALF) if mode in _IN_HALF]
        if modes:
            options = {**options, "dtypes": (dtype,), "modes": modes, "tolerance": None}
            CASES[f"{name}/{str(dtype).split('.')[-1]}"] = Case(_late(fun), arrays, options)


_IN_HALF = ("vmap", "vmap(grad)")


def _floating(sources: tuple[Any, ...]) -> bool:
    drawn = (x if isinstance(x, mx.array) else x() for x in sources)
    return any(x.dtype == mx.float32 for x in drawn)


def _late(fun: Callable[..., Any]) -> Callable[..., Any]:
    """One of MLX's functions looked up at every call, as library code does it."""
    if type(fun).__name__ != "nb_func":
        return fun
    module, name = importlib.import_module(fun.__module__), fun.__name__
    return lambda *args, **kwargs: getattr(module, name)(*args, **kwargs)


def normal(*shape: int) -> Callable[[], mx.array]:
    return lambda: mx.random.normal(shape)


def uniform(*shape: int, low: float = 0.1, high: float = 0.9) -> Callable[[], mx.array]:
    return lambda: mx.random.uniform(low, high, shape)


def integers(*shape: int, low: int = 0, high: int = 4, dtype: Any = mx.int32) -> Callable[[], Any]:
    return lambda: mx.random.randint(low, high, shape).astype(dtype)


def booleans(*shape: int) -> Callable[[], mx.array]:
    return lambda: mx.random.bernoulli(0.6, shape)


def load() -> dict[str, Case]:
    """Every case of every family module beside this one."""
    for module in pkgutil.iter_modules(__import__(__package__).__path__):
        if module.name not in ("__main__", "case", "worker") and not module.name.startswith(
            "test_"
        ):
            importlib.import_module(f"{__package__}.{module.name}")
    return CASES
