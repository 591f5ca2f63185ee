"""Calls that an earlier trace has looked into: what they came to is taken from the vmap's plan."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import mlx.core as mx

from ..core import levels
from ..core.primitive import Primitive


def planned(
    words: Hashable,
    given: list[mx.array],
    stream: Any,
    call: Callable[[], tuple[mx.array, list[mx.array]]],
) -> mx.array:
    """The one output of `call()`, which gives the arrays, too, that it bound a primitive to.

    `words` and the shapes and dtypes of the `given` arrays are all that the call depends on. It is
    known the next time, if it bound a primitive to those very arrays, and not to casts of them.
    """
    if stream is not None or "vmap" not in levels.active():
        return call()[0]
    known = Primitive.again(words, *given)
    if known is not None:
        return known[0]
    out, bound = call()
    if len(bound) == len(given) and all(x is y for x, y in zip(bound, given)):
        Primitive.asked(words)
    return out
