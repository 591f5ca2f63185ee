"""What reads a value, or asks for it: evaluation, `item`, `tolist`, Python's conversions.

An array is cut off from its graph when it is evaluated, unless it is a tracer. A derivative takes
that mark from whatever its function has captured; a value that is read afterwards would be a
constant to the derivative around, and the gradient zero without a word. So after an inner
derivative values are read where MLX keeps every graph.

`mx.eval` of a mapped array is a hint that has no meaning yet.

Source: mlx/transforms.cpp (`eval_impl`, `vjp`, `jvp`), mlx/array.cpp (`array::is_tracer`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import mlx.core as mx

from ..core import levels
from ..core.interception import intercept, original
from ..core.native import keeping_graphs

_NOT_YET = ("eval an array during function transformations", "inside a graph transformation")


def _read(read: Callable[[], Any]) -> Any:
    return keeping_graphs(read) if levels.unmarked() else read()


def _evaluation(name: str) -> None:
    @intercept(mx, name)
    def call(*args: Any) -> None:
        # Nothing is scheduled ahead where every array counts as a tracer.
        evaluate = original(mx, "eval" if levels.unmarked() else name)
        try:
            _read(functools.partial(evaluate, *args))
        except ValueError as e:
            if not levels.vmaps() or not any(words in str(e) for words in _NOT_YET):
                raise


for _name in ("eval", "async_eval"):
    _evaluation(_name)


def _reader(owner: Any, name: str) -> None:
    @intercept(owner, name, late=owner is mx.array)
    def call(*args: Any, **kwargs: Any) -> Any:
        return _read(functools.partial(original(owner, name), *args, **kwargs))


_METHODS = (
    *("item", "tolist", "__repr__", "__format__", "__bytes__"),
    *("__array__", "__dlpack__", "__getstate__"),
    *("__bool__", "__int__", "__float__", "__complex__", "__index__"),
)

for _name in _METHODS:
    if _name in vars(mx.array):
        _reader(mx.array, _name)

for _name in ("save", "savez", "savez_compressed", "save_safetensors", "save_gguf"):
    _reader(mx, _name)
