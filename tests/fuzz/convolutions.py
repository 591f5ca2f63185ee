"""Convolutions of one, two and three dimensions, with every option."""

from __future__ import annotations

from .builder import Builder
from .operations import operation


def _sizes(b: Builder, count: int) -> tuple[int, int, tuple[int, ...], int, int, int]:
    groups = b.choose([1, 1, 2, 3])
    within, features = b.choose([1, 2] if count > 1 else [1, 2, 3]), b.choose([1, 2])
    longest = {1: (4, 3, 5, 1), 2: (3, 4, 2, 1), 3: (2, 3, 1)}[count]
    extents = tuple(b.choose(longest) for _ in range(count))
    return b.choose([1, 2]), groups * within, extents, groups * features, within, groups


@operation("convolution", 4)
def convolution(b: Builder):
    count = b.choose([1, 1, 2, 2, 3])
    batch, channels, extents, features, within, groups = _sizes(b, count)
    kernel = tuple(b.choose([2, 1, 3] if count < 3 else [1, 2]) for _ in range(count))
    dtype = b.choose(["float32", "float32", "float32", "float16"])
    x = b.like("normal", (batch, *extents, channels), dtype)
    w = b.like("normal", (features, *kernel, within), dtype)

    def each(*values: int) -> list[int]:
        return [b.choose(values) for _ in range(count)]

    options = {"stride": each(1, 1, 2), "padding": each(1, 0, 2)}
    if b.chance(3):
        options["dilation"] = each(1, 2)
    if groups > 1:
        options["groups"] = groups
    if b.chance(4):
        options["padding"] = (options["padding"], each(0, 1, 2))
    if b.chance(4):
        options["input_dilation"] = each(1, 2)
    if b.chance(5):
        options["flip"] = True
    said = "".join(f", {name}={value}" for name, value in options.items())
    b.let(f"t.convolution({x}, {w}{said})")


@operation("convolution", 2)
def transposed(b: Builder):
    count = b.choose([1, 1, 2, 3])
    batch, channels, extents, features, within, groups = _sizes(b, count)
    kernel = tuple(b.choose([2, 1, 3] if count < 3 else [1, 2]) for _ in range(count))
    x = b.like("normal", (batch, *extents, channels))
    w = b.like("normal", (features, *kernel, within))
    options = {"stride": [b.choose([1, 2]) for _ in range(count)]}
    options["padding"] = [b.number(0, min(1, k - 1)) for k in kernel]
    if b.chance(3):
        options["dilation"] = [b.choose([1, 2]) for _ in range(count)]
    if groups > 1:
        options["groups"] = groups
    said = "".join(f", {name}={value}" for name, value in options.items())
    b.let(f"t.transposed_convolution({x}, {w}{said})")
