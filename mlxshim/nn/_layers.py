"""The layers whose calls a tape knows: they go to its nodes while a loss is traced."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ._nodes import running
from ._tape import Tape


def _linear(tape: Tape, layer: Any, x: mx.array) -> mx.array | None:
    weight = tape.find(layer.get("weight"))
    if weight is None:
        return None
    return _shifted(tape, layer, weight.product(x))


def _shifted(tape: Tape, layer: Any, y: mx.array) -> mx.array:
    if "bias" not in layer:
        return y
    bias = tape.find(layer["bias"])
    return y + layer["bias"] if bias is None else bias.shift(y)


def _embedding(tape: Tape, layer: Any, ids: Any) -> mx.array | None:
    weight = tape.find(layer.get("weight"))
    if weight is None or not isinstance(ids, mx.array) or not mx.issubdtype(ids.dtype, mx.integer):
        return None
    return weight.lookup(ids)


def _as_linear(tape: Tape, layer: Any, x: mx.array) -> mx.array | None:
    weight = tape.find(layer.get("weight"))
    return None if weight is None else weight.product(x)


def _rms_norm(tape: Tape, layer: Any, x: mx.array) -> mx.array | None:
    weight = tape.find(layer.get("weight"))
    return None if weight is None else weight.norm(x, "rms_norm", layer.eps)


def _layer_norm(tape: Tape, layer: Any, x: mx.array) -> mx.array | None:
    weight = tape.find(layer.get("weight"))
    if weight is None:
        return None
    return _shifted(tape, layer, weight.norm(x, "layer_norm", layer.eps))


_KNOWN: list[tuple[type, str, Callable[[Tape, Any, Any], Any]]] = [
    (nn.Linear, "__call__", _linear),
    (nn.Embedding, "__call__", _embedding),
    (nn.Embedding, "as_linear", _as_linear),
    (nn.RMSNorm, "__call__", _rms_norm),
    (nn.LayerNorm, "__call__", _layer_norm),
]


@functools.cache
def _watched_class(cls: type) -> type | None:
    """A class whose calls are nodes of the tape that runs; None if nothing of `cls` is known."""
    methods = {
        name: _watched(getattr(cls, name), call)
        for base, name, call in _KNOWN
        if issubclass(cls, base) and getattr(cls, name) is getattr(base, name)
    }
    if not methods:
        return None
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return type(cls.__name__, (cls,), {**names, **methods})


def _watched(original: Any, call: Callable[[Tape, Any, Any], Any]) -> Any:
    @functools.wraps(original)
    def method(self: Any, x: Any) -> Any:
        tape = running()
        y = None if tape is None else call(tape, self, x)
        return original(self, x) if y is None else y

    return method


Known = list[tuple[nn.Module, type, type]]


def known(nodes: Sequence[Any]) -> Known:
    """The modules among these whose calls are known, with their class and the one that watches."""
    modules = [node for node in nodes if isinstance(node, nn.Module)]
    classes = [(module, type(module), _watched_class(type(module))) for module in modules]
    return [(module, cls, new) for module, cls, new in classes if new is not None]


@contextmanager
def watched(modules: Known) -> Iterator[None]:
    """The calls of these layers go to the tape that runs."""
    put = object.__setattr__  # a module's own looks for arrays
    done = 0
    try:
        for module, _, new in modules:
            put(module, "__class__", new)
            done += 1
        yield
    finally:
        for module, cls, _ in modules[:done]:
            put(module, "__class__", cls)
