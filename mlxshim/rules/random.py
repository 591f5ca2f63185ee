"""Random numbers: every sample of a vmap draws its own, as a loop over the samples would.

    key   = the key that MLX's global state gives to this call
    key_i = split(key, N)[i]                 for sample i of a vmap over N samples
    draw_i = mx.random.<name>(..., key=key_i)

once more for every vmap around that one, outermost first: N * M draws in a vmap of a vmap. The
draw itself is MLX's own, whose batching rule takes a key for each sample. A call that brings its
own key is left alone: it means what it means in a loop.

Source: python/src/random.cpp (how the state moves on), mlx/primitives.cpp (`RandomBits::vmap`);
the modes of randomness are those of torch.func.vmap.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable
from typing import Any

import mlx.core as mx

from ..core import levels, replay
from ..core.interception import intercept, original
from ..core.primitive import Arrays, Axes, Node
from ._opaque import Opaque


def _key_position(name: str) -> int | None:
    """Where `mx.random.<name>` takes its optional key; None for whatever does not draw."""
    signature = getattr(getattr(mx.random, name), "__nb_signature__", None)
    if not signature:
        return None
    arguments = ast.parse(signature[0][0] + ": ...").body[0].args  # pyright: ignore
    names = [argument.arg for argument in arguments.args]
    optional = names[len(names) - len(arguments.defaults) :]
    return names.index("key") if "key" in optional else None


#: Every function of MLX that draws, new ones included.
DRAWS = {name: position for name in dir(mx.random) if (position := _key_position(name)) is not None}


def _own_draws(name: str, position: int) -> Callable[..., Any]:
    special = _SPECIAL.get(name)

    def draw(*args: Any, **kwargs: Any) -> Any:
        raw = original(mx.random, name)
        vmaps = levels.vmaps()
        if not vmaps and replay.chain() is None:
            return raw(*args, **kwargs)
        if len(args) > position:
            if args[position] is None:
                key = _key_for_each(name, vmaps)
                args = (*args[:position], key, *args[position + 1 :])
        elif kwargs.get("key") is None:
            kwargs["key"] = _key_for_each(name, vmaps)
        return (special or raw)(*args, **kwargs)

    return draw


def _categorical(
    logits: mx.array,
    axis: int = -1,
    shape: Any = None,
    num_samples: int | None = None,
    key: mx.array | None = None,
    stream: Any = None,
) -> mx.array:
    """MLX's, but for one distribution: it searches the cumulative weights, and cannot if mapped.

    Source: mlx/random.cpp, `categorical_inverse_cdf` (as old as `mx.searchsorted`).
    """
    wanted = _shape_of_one(logits, axis, shape, num_samples)
    if not wanted:
        return original(mx.random, "categorical")(logits, axis, shape, num_samples, key, stream)
    with mx.stream(stream or mx.default_device()):
        x = mx.stop_gradient(mx.reshape(logits, (-1,)))
        x = x if x.dtype == mx.float64 else x.astype(mx.float32)
        top = mx.max(x)
        # exp(x - top) is NaN where top is infinite: any of the largest is as likely then.
        weights = mx.where(mx.isinf(top), (x == top).astype(x.dtype), mx.exp(x - top))
        u = mx.random.uniform(shape=wanted, key=key) * mx.sum(weights)
        starts = mx.cumsum(weights, inclusive=False)
        return search(starts, u)[0] - mx.array(1, mx.uint32)


def _shape_of_one(logits: Any, axis: int, shape: Any, num_samples: int | None) -> tuple[int, ...]:
    """The shape of the draws if `logits` holds one distribution, which MLX then searches."""
    if not isinstance(logits, mx.array) or not -logits.ndim <= axis < logits.ndim:
        return ()
    ones = (1,) * (logits.ndim - 1)
    if logits.size != logits.shape[axis] or logits.size == 0:
        return ()
    if shape is not None:
        return () if num_samples is not None or len(shape) < len(ones) else tuple(shape)
    return ones if num_samples is None else (*ones, num_samples)


def _search(starts: mx.array, values: mx.array) -> list[mx.array]:
    """How many of the ascending `starts` are no larger than each value."""
    return [original(mx, "searchsorted")(starts, values, side="right")]


def _search_batch(size: int, arrays: Arrays, axes: Axes) -> list[mx.array]:
    starts, values = [mx.moveaxis(x, a, 0) if a is not None else x for x, a in zip(arrays, axes)]
    if axes[0] is None:
        return search(starts, values)
    # One bit of the answer after the other, highest first.
    shape = (size, *values.shape[axes[1] is not None :])
    values = mx.reshape(mx.broadcast_to(values, shape), (size, -1))
    last = starts.shape[1] - 1
    found = mx.zeros(values.shape, mx.int32)
    for bit in reversed(range(starts.shape[1].bit_length())):
        longer = found + (1 << bit)
        start = mx.take_along_axis(starts, mx.minimum(longer - 1, last), axis=1)
        fits = mx.logical_and(longer - 1 <= last, start <= values)
        found = mx.where(fits, longer, found)
    return [mx.reshape(found.astype(mx.uint32), shape)]


def _permutation(
    x: int | mx.array, axis: int = 0, key: mx.array | None = None, stream: Any = None
) -> mx.array:
    """MLX's own choice is `take`, whose backward pass corrupts memory under vmap where the
    cotangent is mapped behind the axis (`Scatter::vmap`)."""
    raw = original(mx.random, "permutation")
    if not isinstance(x, mx.array) or not -x.ndim <= axis < x.ndim:
        return raw(x, axis, key, stream)
    order = raw(x.shape[axis], 0, key, stream)
    with mx.stream(stream or mx.default_device()):
        order = mx.reshape(order, [-1] + [1] * (x.ndim - 1 - axis % x.ndim))
        return mx.take_along_axis(x, mx.broadcast_to(order, x.shape), axis)


search = Opaque(
    "random.categorical",
    lowering=_search,
    batch=_search_batch,
    vjp=lambda primals, cotangents, outputs: [mx.zeros_like(x) for x in primals],
    jvp=lambda primals, tangents, outputs: [mx.zeros_like(x) for x in outputs],
)

_SPECIAL: dict[str, Callable[..., mx.array]] = {"permutation": _permutation}
if hasattr(mx, "searchsorted"):
    _SPECIAL["categorical"] = _categorical

for _name, _position in DRAWS.items():
    intercept(mx.random, _name)(_own_draws(_name, _position))


@intercept(mx.random, "seed")
def seed(*args: Any, **kwargs: Any) -> None:
    # A loop would seed before every sample: from here on they all draw the same.
    for level in levels.vmaps():
        if level.randomness == "different":
            level.randomness = "same"
    chain = replay.chain()
    if chain is not None:
        chain[0] = mx.random.key(*args, **kwargs)
        return
    original(mx.random, "seed")(*args, **kwargs)


def _key_for_each(name: str, vmaps: list[levels.VmapLevel]) -> mx.array:
    """One key from the global state, split at each level where the samples are to differ."""
    if any(level.randomness == "error" for level in vmaps):
        raise ValueError(
            f"[vmap] mx.random.{name} draws a random number in a vmap with randomness='error': "
            "pass it a key, or choose randomness='different' or 'same'."
        )
    key = _next_key()
    for level in vmaps:
        if level.randomness == "different":
            if level.mapped is None:
                raise ValueError(
                    f"[random.{name}] draws in a function that MLX maps by calling it again: "
                    "a checkpoint or a custom function made outside the vmap."
                )
            key = _split_over(level.size)(key, level.mapped)
    return key


def _next_key() -> mx.array:
    """The key that the next draw of MLX's would use, and the global state moved on past it."""
    chain = replay.chain()
    state: mx.array = mx.random.state[0] if chain is None else chain[0]  # pyright: ignore
    if levels.is_abstract():
        return state  # nothing is drawn
    if chain is not None:
        chain[0], key = mx.random.split(state)
        return key
    original(mx.random, "permutation")(1)  # the cheapest draw: only a draw moves the state
    return mx.random.split(state)[1]


@functools.lru_cache(maxsize=64)
def _split_over(size: int) -> Callable[..., Any]:
    """A key that is mapped because a tracer of the level is; the tracer's value plays no part."""

    def batch(arrays: tuple[mx.array, mx.array], axes: Any) -> tuple[mx.array, int]:
        return mx.random.split(arrays[0], size), 0

    node = Node(lambda key, mapped: key)
    node.vmap(batch)
    return node
