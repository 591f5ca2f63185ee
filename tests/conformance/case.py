"""The table of cases, and the samples they are drawn from."""

from __future__ import annotations

import importlib
import pkgutil
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from mlxshim.testing import HALVES, MODES

CASES: dict[str, Case] = {}


@dataclass(frozen=True)
class Case:
    """`fun` of one sample, with a source for each argument, and options of `conformance`."""

    fun: Callable[..., Any]
    arrays: tuple[Any, ...]
    options: dict[str, Any] = field(default_factory=dict)
    #: Modes that are tried only where all are asked for.
    left: tuple[str, ...] = ()

    def in_all_modes(self) -> dict[str, Any]:
        """The options, with the modes that are left too."""
        modes = {"modes": [*self.options["modes"], *self.left]} if self.left else {}
        return {**self.options, **modes}


def case(
    name: str, fun: Callable[..., Any], *arrays: Any, half: bool = True, **options: Any
) -> None:
    """Put an operation through the suite, in one line.

    `name` is the public name below `mlx.core` ("fast.rms_norm", "array.__setitem__"), with a
    variant after a slash where there are several ("conv2d/grouped"). Where there are `dtypes` the
    case says itself in which it is tried; else it is tried in both dtypes of two bytes too, unless
    `half` is False, which is for what MLX has in float32 alone, and says why.

    Of those two one, which the name decides, is tried in all modes, the other in `_FEW`; the rest
    of the modes, and the one in which a C++ compiler takes most of the time, are `left`.
    """
    assert name not in CASES, f"{name} is there twice"
    CASES[name] = Case(_late(fun), arrays, options)
    if not half or "dtypes" in options or not _floating(arrays):
        return
    asked = options.get("modes", _IN_HALF)
    turn = zlib.crc32(name.encode()) % 2
    for n, dtype in enumerate(HALVES):
        tried = _IN_HALF if n == turn else _FEW
        in_half = {**options, "dtypes": (dtype,), "tolerance": None}
        in_half["modes"] = [mode for mode in asked if mode in tried]
        left = tuple(mode for mode in asked if mode not in tried and mode != "call")
        if in_half["modes"]:
            CASES[f"{name}/{_name(dtype)}"] = Case(_late(fun), arrays, in_half, left)


#: What one sample comes to is MLX's own in every dtype.
_IN_HALF = tuple(mode for mode in MODES if mode not in ("call", "compile(vmap)"))
_FEW = ("vmap", "vmap(grad)")


def in_half(name: str) -> bool:
    """Whether this is a case of another one in two bytes."""
    return name.endswith(tuple(f"/{_name(dtype)}" for dtype in HALVES))


def _name(dtype: mx.Dtype) -> str:
    return str(dtype).split(".")[-1]


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
