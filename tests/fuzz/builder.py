"""Programs are written line by line; each line is run at once, so that shapes are known."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import mlx.core as mx
from hypothesis import strategies as st

from .prelude import Meant

LARGEST = 600  # entries of one array
FLOATING = ("float32", "float32", "float32", "float32", "float16", "bfloat16")
EXTENTS = (2, 3, 1, 4, 2, 3, 5, 1, 2, 3, 4, 0)


class Unfit(Exception):
    """An operation for which the program has no arguments."""


class Argument(NamedTuple):
    kind: str
    shape: tuple[int, ...]
    dtype: str


class Line(NamedTuple):
    text: str
    makes: tuple[str, ...]
    takes: frozenset[str]


class Builder:
    """The body of a function: its arguments, its lines, and the arrays that they make."""

    def __init__(self, draw: Callable[[Any], Any]) -> None:
        self.draw = draw
        self.arguments: dict[str, Argument] = {}
        self.lines: list[Line] = []
        self.arrays: dict[str, mx.array] = {}
        self.namespace: dict[str, Any] = {"mx": mx, "t": Meant}

    # Choices: each shrinks to the first, the least, or no.

    def choose(self, options: Any) -> Any:
        return self.draw(st.sampled_from(options))

    def number(self, low: int, high: int) -> int:
        return self.draw(st.integers(low, high))

    def chance(self, one_in: int) -> bool:
        return self.number(1, one_in) == one_in

    def subset(self, options: Any) -> list[Any]:
        return [x for x in options if self.draw(st.booleans())]

    def draw_some(self, options: Any, count: int) -> list[Any]:
        """So many of the options, or all, in order."""
        rest = list(options)
        while len(rest) > count:
            rest.pop(self.number(0, len(rest) - 1))
        return rest

    def axis(self, ndim: int) -> int:
        if not ndim:
            raise Unfit
        return self.number(0, ndim - 1) - (ndim if self.chance(3) else 0)

    def shape(self, least: int = 0, most: int = 3) -> tuple[int, ...]:
        return tuple(self.choose(EXTENTS) for _ in range(self.number(least, most)))

    # Arrays

    def argument(self, kind: str, shape: tuple[int, ...], dtype: str = "") -> str:
        """A new argument of the function."""
        if len(self.arguments) >= 6:
            raise Unfit
        dtype = dtype or {"integers": "int32", "booleans": "bool_", "bits": "uint32"}.get(
            kind, "float32"
        )
        name = "abcdefgh"[len(self.arguments)]
        self.arguments[name] = Argument(kind, shape, dtype)
        array = mx.ones(shape, getattr(mx, dtype))
        self.arrays[name] = self.namespace[name] = array
        return name

    def some(self, fits: Callable[[mx.array], bool]) -> str | None:
        names = [name for name, x in self.arrays.items() if fits(x)]
        return self.choose(names) if names else None

    def floating(self, least: int = 0, fits: Callable[[mx.array], bool] | None = None) -> str:
        """An array of floats with at least so many dimensions, perhaps a new argument."""
        name = self.some(lambda x: is_floating(x) and x.ndim >= least and (not fits or fits(x)))
        if name is not None and not self.chance(5):
            return name
        new = self.argument("normal", self.shape(least, max(least, 3)), self.choose(FLOATING))
        if fits and not fits(self.arrays[new]):
            raise Unfit
        return new

    def like(self, kind: str, shape: tuple[int, ...], dtype: str = "") -> str:
        """An array of that very shape and kind."""
        wanted = getattr(mx, dtype) if dtype else None

        def fits(x: mx.array) -> bool:
            category = {"integers": mx.int32, "booleans": mx.bool_, "bits": mx.uint32}.get(kind)
            of_kind = x.dtype == category if category else is_floating(x)
            return x.shape == shape and of_kind and (wanted is None or x.dtype == wanted)

        name = self.some(fits) if kind in ("normal", "booleans") else None
        return name or self.argument(kind, shape, dtype)

    def partner(self, name: str, kind: str = "normal") -> str:
        """An array that broadcasts with another, or that array."""
        x = self.arrays[name]
        want_float = kind == "normal"
        found = self.some(
            lambda y: broadcast(x, y) and (is_floating(y) if want_float else y.dtype == x.dtype)
        )
        if found is not None and not self.chance(3):
            return found
        shape = [1 if self.chance(4) else n for n in x.shape][self.number(0, x.ndim) :]
        return self.argument(kind, tuple(shape), self.dtype(name))

    def dtype(self, name: str) -> str:
        dtype = self.arrays[name].dtype
        return "bool_" if dtype == mx.bool_ else str(dtype).removeprefix("mlx.core.")

    # Lines

    def let(self, expression: str, *, setup: str = "", rebinds: str = "") -> str | list[str]:
        """A line that names what the expression gives: an array, or several.

        `setup` comes before it; `rebinds` is an array that it changes in place.
        """
        scratch = dict(self.namespace)
        if setup:
            exec(setup, scratch)
        value = eval(expression, scratch)
        values = [value] if isinstance(value, mx.array) else list(value)
        if any(x.size > LARGEST or x.ndim > 5 for x in values):
            raise Unfit
        start = sum(len(line.makes) for line in self.lines)
        names = [f"v{start + i}" for i in range(len(values))]
        targets = (
            ", ".join(names) if isinstance(value, mx.array) else "".join(f"{n}, " for n in names)
        )
        text = f"{setup}\n" * bool(setup) + f"{targets.rstrip()} = {expression}"
        takes = frozenset(re.findall(r"\b([a-h]|v\d+)\b", text)) & self.arrays.keys()
        makes = (*names, rebinds) if rebinds else tuple(names)
        self.lines.append(Line(text, makes, takes))
        self.namespace.update(zip(names, values))
        self.arrays.update(zip(names, values))
        if rebinds:
            self.namespace[rebinds] = self.arrays[rebinds] = scratch[rebinds]
        return names[0] if isinstance(value, mx.array) else names


def is_floating(x: mx.array) -> bool:
    return mx.issubdtype(x.dtype, mx.floating)


def is_integer(x: mx.array) -> bool:
    return mx.issubdtype(x.dtype, mx.integer) and x.dtype != mx.uint32


def broadcast(x: mx.array, y: mx.array) -> bool:
    return all(m == n or 1 in (m, n) for m, n in zip(x.shape[::-1], y.shape[::-1]))
