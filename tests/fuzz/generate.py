"""Whole programs: a function of random operations under random transforms, and its inputs."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import hypothesis
import mlx.core as mx
from hypothesis import strategies as st

from . import control_flow as control_flow
from . import convolutions as convolutions
from . import listed as listed
from . import more_operations as more_operations
from . import places as places
from .builder import Argument, Builder, Unfit, is_floating
from .operations import OPERATIONS

PRELUDE = Path(__file__).with_name("prelude.py")
KINDS = ("vmap", "vmap", "grad", "vjp", "jvp", "compile", "checkpoint", "vmap")
ROUNDOFF = {"bfloat16": 8, "float16": 11}  # 2 to the power of minus this; of float32, 24
Kind = tuple[tuple[int, ...], str]  # of an output: shape and dtype


@st.composite
def programs(
    draw: Any, families: Collection[str] = (), depth: int = 4, kinds: Sequence[str] = KINDS
) -> str:
    """The text of a program, without the prelude."""
    b = Builder(draw)
    table = [op for f in sorted(families or OPERATIONS) for op in OPERATIONS[f]]
    for _ in range(draw(st.integers(1, 8))):
        op = draw(st.sampled_from(table))
        try:
            op(b)
        except _ENGINE:
            raise
        except Exception:  # MLX does not take these shapes
            continue
    if not b.lines:
        name = next(iter(b.arguments), None) or b.argument("normal", (2,))
        try:
            b.let(f"{name} * 1")
        except Unfit:
            hypothesis.reject()
    made = [name for line in b.lines for name in line.makes if name in b.arrays]
    outputs = [made[-1]]
    outputs += [n for n in dict.fromkeys(made[:-1]) if draw(st.integers(1, 4)) == 4][:3]
    body, arguments = _alive(b, outputs)
    if not arguments:
        name = b.argument("normal", (2,)) if not b.arguments else next(iter(b.arguments))
        arguments = {name: b.arguments[name]}
    stack = _Stack(draw, arguments, [b.arrays[n] for n in outputs])
    for rest in reversed(range(draw(st.integers(1, depth)))):
        kind = draw(st.sampled_from(kinds))
        if kind == "compile" and not rest and draw(st.integers(1, 6)) < 6:
            kind = "vmap"  # for what is compiled last MLX calls a C++ compiler
        stack.push(kind)
    if not stack.levels:
        stack.levels.append("t.compile(f)")
    texts = (*body, *map(str, stack.arguments))
    roundoff = next((r for d, r in ROUNDOFF.items() if any(d in text for text in texts)), 24)
    head = f"    def f({', '.join(arguments)}):\n"
    lines = "".join(f"        {line}\n" for text in body for line in text.splitlines())
    end = f"        return [{', '.join(outputs)}]\n\n"
    levels = "".join(f"    g = {level}\n" for level in stack.levels)
    calls = 2 if "compile" in levels or "mx.compile" in lines else 1
    kinds = "".join(f"    {tuple(a)!r},\n" for a in stack.arguments)
    return (
        f"def program(t):\n{head}{lines}{end}{levels}    return g\n\n\nINPUTS = [\n{kinds}]\n"
        f"ROUNDOFF, CALLS = 2**-{roundoff}, {calls}\n"
    )


def whole(program: str) -> str:
    """A program that runs as it stands."""
    return (
        PRELUDE.read_text() + "\n\n# The program\n\n\n" + program + "\n"
        'if __name__ == "__main__":\n'
        "    print(compare(program, INPUTS, roundoff=ROUNDOFF, calls=CALLS) or 'as the loop')\n"
    )


def _engine_exceptions() -> tuple[type[BaseException], ...]:
    from hypothesis.errors import HypothesisException, StopTest, UnsatisfiedAssumption

    return (HypothesisException, StopTest, UnsatisfiedAssumption)


_ENGINE = _engine_exceptions()


def _alive(b: Builder, outputs: list[str]) -> tuple[list[str], dict[str, Argument]]:
    """The lines that the outputs need, and the arguments that those need."""
    live, kept = set(outputs), []
    for line in reversed(b.lines):
        if live & set(line.makes):
            live |= line.takes
            kept.append(line.text)
    return kept[::-1], {name: a for name, a in b.arguments.items() if name in live}


class _Stack:
    """Transforms around a function, innermost first; what goes in and out at the top."""

    def __init__(self, draw: Any, arguments: dict[str, Argument], outputs: list[mx.array]) -> None:
        self.draw = draw
        self.levels: list[str] = []
        self.arguments = list(arguments.values())
        self.outputs: list[Kind] = [
            (y.shape, str(y.dtype).removeprefix("mlx.core.")) for y in outputs
        ]
        self.samples = 1
        self.derivatives = 0

    @property
    def inner(self) -> str:
        return "g" if self.levels else "f"

    def push(self, kind: str) -> None:
        if kind in ("compile", "checkpoint"):
            self.levels.append(f"t.{kind}({self.inner})")
        elif kind == "vmap":
            self._vmap()
        elif self.derivatives < 3:
            self._derivative(kind)

    def _vmap(self) -> None:
        size = self.draw(st.sampled_from([2, 3, 1, 2, 3, 0]))
        if self.samples * size > 27:
            return
        mapped = [self.draw(st.integers(0, 3)) > 0 for _ in self.arguments]
        if not any(mapped):
            mapped[0] = True
        in_axes, arguments = [], []
        for a, is_mapped in zip(self.arguments, mapped):
            place = self._place(len(a.shape)) if is_mapped else None
            in_axes.append(place)
            arguments.append(a._replace(shape=_inserted(a.shape, place, size)))
        if sum(mx.zeros(a.shape).size for a in arguments) > 4000:
            return
        out_axes = [self._place(len(shape)) for shape, _ in self.outputs]
        forms = ["plain", "plain", "plain", "tree", "nested", "chunks"]
        if len(in_axes) > 1 and set(in_axes[1:]) == {0} and in_axes[0] is not None:
            forms.append("keywords")
        form = self.draw(st.sampled_from(forms))
        said = "" if form == "plain" else f", form={form!r}"
        self.levels.append(f"t.vmap({self.inner}, {tuple(in_axes)}, {out_axes}{said})")
        self.arguments = arguments
        self.outputs = [(_inserted(s, a, size), d) for (s, d), a in zip(self.outputs, out_axes)]
        self.samples *= max(size, 1)

    def _place(self, ndim: int) -> int:
        place = self.draw(st.integers(0, ndim))
        return place - ndim - 1 if self.draw(st.integers(1, 4)) == 4 else place

    def _derivative(self, kind: str) -> None:
        floating = [i for i, a in enumerate(self.arguments) if "float" in a.dtype]
        values = [(shape, dtype) for shape, dtype in self.outputs if "float" in dtype]
        if not floating or not values:
            return
        some = [i for i in floating if self.draw(st.booleans())] or floating[:1]
        gradients = [(self.arguments[i].shape, self.arguments[i].dtype) for i in some]
        self.derivatives += 1
        if kind == "grad":
            dtype = str(sum(mx.zeros((), getattr(mx, d)) for _, d in values).dtype)
            self.levels.append(f"t.value_and_grad({self.inner}, {some})")
            self.outputs = [((), dtype.removeprefix("mlx.core.")), *gradients]
            return
        if kind == "vjp":
            vectors, products = values, gradients
            self.levels.append(f"t.vjp({self.inner}, {some}, {len(values)})")
        else:
            vectors, products = gradients, values
            self.levels.append(f"t.jvp({self.inner}, {some})")
        self.arguments += [Argument("normal", shape, dtype) for shape, dtype in vectors]
        self.outputs = [*values, *products]


def _inserted(shape: tuple[int, ...], place: int | None, size: int) -> tuple[int, ...]:
    if place is None:
        return shape
    place %= len(shape) + 1
    return (*shape[:place], size, *shape[place:])


__all__ = ["is_floating", "programs", "whole"]
