"""What is asked of a model, as functions of one sample, and the samples."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map

SAMPLES, LENGTH = 3, 6


class Question(NamedTuple):
    """`fun(*arguments)` of one sample, for arguments that are all stacked or all shared trees."""

    mode: str
    fun: Callable[..., Any]
    arguments: tuple[Any, ...]
    in_axes: tuple[int | None, ...]
    gradient: bool = False


def randomized(model: Any) -> Any:
    """No parameter is left at a zero or a one that hides its gradient or another's."""
    model.update(
        tree_map(
            lambda x: (
                x + 0.02 * mx.random.normal(x.shape).astype(x.dtype) if x.dtype == mx.float32 else x
            ),
            model.parameters(),
        )
    )
    mx.eval(model.parameters())
    return model


def quantized(model: Any) -> Any | None:
    """The model with 4 bits for what can have them; None where nothing can."""
    predicate = getattr(model, "quant_predicate", None) or (lambda path, module: True)

    def suitable(path: str, module: Any) -> Any:
        takes = inspect.signature(getattr(module, "to_quantized", lambda: None)).parameters
        if "mode" not in takes or module["weight"].shape[-1] % 32:
            return False
        wanted = predicate(path, module)  # it may say how: {"group_size": 64, "bits": 8}
        if isinstance(wanted, dict) and module["weight"].shape[-1] % wanted.get("group_size", 32):
            return False
        return wanted

    before = {id(m) for m in model.modules()}
    nn.quantize(model, group_size=32, bits=4, class_predicate=suitable)
    mx.eval(model.parameters())
    return model if {id(m) for m in model.modules()} - before else None


def questions(make: Callable[[], Any], vocabulary: int) -> Iterator[Question]:
    """Everything that is asked; each of a model of its own, for some keep what they were told."""
    tokens = mx.random.randint(1, vocabulary, (SAMPLES, LENGTH + 1))
    yield _forward(make().eval(), tokens)
    if tree_flatten(make().trainable_parameters()):
        yield _gradient(make(), tokens)
        yield _own_parameters(make().eval(), tokens)
    yield from _decoding(make().eval(), tokens)


def _forward(model: Any, tokens: mx.array) -> Question:
    return Question("forward", lambda x: model(x[None])[0], (tokens,), (0,))


def _gradient(model: Any, tokens: mx.array) -> Question:
    def loss(parameters: Any, tokens: mx.array) -> mx.array:
        model.update(parameters)
        return nn.losses.cross_entropy(model(tokens[None, :-1])[0], tokens[1:], reduction="mean")

    parameters = model.trainable_parameters()
    return Question("vmap(grad)", loss, (parameters, tokens), (None, 0), gradient=True)


def _own_parameters(model: Any, tokens: mx.array) -> Question:
    def logits(parameters: Any, tokens: mx.array) -> mx.array:
        model.update(parameters)
        return model(tokens[None])[0]

    several = tree_map(
        lambda x: x + 0.02 * mx.random.normal((SAMPLES, *x.shape)).astype(x.dtype),
        model.trainable_parameters(),
    )
    return Question("own-parameters", logits, (several, tokens), (0, 0))


def _decoding(model: Any, tokens: mx.array) -> Iterator[Question]:
    """One more token, each sample with a cache of its own, and all with the same one."""
    from mlx_lm.models.cache import make_prompt_cache

    caches = []
    for sample in tokens:
        cache = make_prompt_cache(model)
        model(sample[None, :-1], cache=cache)
        caches.append(cache)
    arrays = [_arrays(cache) for cache in caches]
    mx.eval(arrays)
    skeleton = caches[0]

    def step(token: mx.array, arrays: list[mx.array]) -> Any:
        rest = iter(arrays)
        # Writing in place into what the caller holds is no function: + 0 makes it a new array.
        cache = _rebuilt(skeleton, lambda _: next(rest) + 0)
        out = model(token[None, None], cache=cache)
        return [out[0], *_arrays(cache)]

    last = tokens[:, -1]
    if len({tuple(x.shape for x in xs) for xs in map(tuple, arrays)}) == 1:
        stacked = [mx.stack(list(column)) for column in zip(*arrays)]
        yield Question("decode", step, (last, stacked), (0, 0))
    yield Question("decode-shared", step, (last, arrays[0]), (0, None))


def _arrays(node: Any) -> list[mx.array]:
    found: list[mx.array] = []
    _rebuilt(node, lambda x: found.append(x) or x)
    return found


def _rebuilt(node: Any, of_array: Callable[[mx.array], mx.array]) -> Any:
    """A cache with other arrays: lists, dicts and objects all the way down."""
    if isinstance(node, mx.array):
        return of_array(node)
    if isinstance(node, (list, tuple)):
        return type(node)(_rebuilt(child, of_array) for child in node)
    if isinstance(node, dict):
        return {key: _rebuilt(child, of_array) for key, child in node.items()}
    if type(node).__module__.startswith("mlx_lm."):
        new = copy.copy(node)
        for key, child in vars(node).items():
            setattr(new, key, _rebuilt(child, of_array))
        return new
    return node


def answer(question: Question, transforms: Any) -> list[tuple[str, mx.array]]:
    """Under `transforms`' vmap (and grad)."""
    fun = transforms.grad(question.fun) if question.gradient else question.fun
    in_axes = question.in_axes if len(question.in_axes) > 1 else question.in_axes[0]
    out = transforms.vmap(fun, in_axes=in_axes)(*question.arguments)
    return _evaluated(out)


def loop(question: Question) -> list[tuple[str, mx.array]]:
    """Sample by sample, with MLX's own gradient."""
    fun = mx.grad(question.fun) if question.gradient else question.fun
    rows = []
    for i in range(SAMPLES):
        arguments = [
            arg if axis is None else tree_map(lambda x, i=i: x[i], arg)
            for arg, axis in zip(question.arguments, question.in_axes)
        ]
        rows.append(_evaluated(fun(*arguments)))
    return [(name, mx.stack([dict(row)[name] for row in rows])) for name, _ in rows[0]]


def _evaluated(out: Any) -> list[tuple[str, mx.array]]:
    leaves = tree_flatten(out if not isinstance(out, mx.array) else [out])
    mx.eval(leaves)
    return leaves  # pyright: ignore


def difference(got: list[tuple[str, mx.array]], want: list[tuple[str, mx.array]]) -> str | None:
    """What differs beyond rounding in float32, in words."""
    if [name for name, _ in got] != [name for name, _ in want]:
        return f"leaves {[n for n, _ in got]} where the loop has {[n for n, _ in want]}"
    reach = max((_reach(w) for _, w in want), default=0.0)
    for (name, g), (_, w) in zip(got, want):
        if g.shape != w.shape or g.dtype != w.dtype:
            return f"{name} is {g.dtype}{g.shape}, the loop's {w.dtype}{w.shape}"
        if not mx.issubdtype(w.dtype, mx.floating):
            if not mx.array_equal(g, w):
                return f"{name} differs"
            continue
        off = mx.where(g == w, 0, g.astype(mx.float32) - w.astype(mx.float32))
        error = mx.abs(off).max().item() if w.size else 0.0
        # A gradient that is zero but for rounding is measured by the others.
        allowed = 1e-3 * _reach(w) + 1e-5 * reach
        if w.dtype != mx.float32:
            allowed += 2e-2 * _reach(w)
        if not error <= allowed:
            return f"{name} differs by {error:.2g} where it reaches {_reach(w):.2g}"
    return None


def _reach(x: mx.array) -> float:
    """The largest magnitude, infinities left out."""
    size = mx.abs(x.astype(mx.float32))
    return mx.where(mx.isinf(size), 0, size).max().item() if x.size else 0.0
