"""Low-rank adapters, and batches in which every row has its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map, tree_unflatten

from ..transforms.vmap import vmap
from .functional import functional_call

Tree = Any


class LoRA(nn.Module):
    """A linear layer, dense or quantized, and scale * (x A) B beside it.

    Example:
        >>> import mlx.core as mx
        >>> import mlx.nn as nn
        >>> from mlxshim.nn import LoRA
        >>> layer = LoRA(nn.Linear(4, 3), rank=2)
        >>> layer(mx.ones((5, 4))).shape
        (5, 3)

    Source: Hu et al. 2021, "LoRA: low-rank adaptation of large language models".
    """

    def __init__(self, linear: nn.Module, rank: int = 8, scale: float = 2.0) -> None:
        super().__init__()
        outputs, inputs = linear["weight"].shape
        if isinstance(linear, nn.QuantizedLinear):
            inputs = inputs * 32 // linear.bits
        self.linear: Any = linear
        self.scale: float = scale
        bound = 1 / math.sqrt(inputs)
        self.lora_a: mx.array = mx.random.uniform(-bound, bound, (inputs, rank))
        self.lora_b: mx.array = mx.zeros((rank, outputs))

    def __call__(self, x: mx.array) -> mx.array:
        y = self.linear(x)
        return y + (self.scale * ((x @ self.lora_a) @ self.lora_b)).astype(y.dtype)


def add_lora(
    model: nn.Module,
    rank: int = 8,
    *,
    scale: float = 2.0,
    where: Callable[[str, nn.Module], bool] = lambda path, layer: True,
) -> nn.Module:
    """Freeze a model, and give its linear layers adapters, which alone are trainable.

    Args:
        model: Changed in place.
        rank: Of the adapters.
        scale: Of what they add.
        where: `where(path, layer)` says which `nn.Linear` and `nn.QuantizedLinear` get one; all do
            by default.

    Returns:
        The model. Its `trainable_parameters()` are the adapters.

    Raises:
        ValueError: no layer gets an adapter.

    Example:
        >>> import mlx.core as mx
        >>> import mlx.nn as nn
        >>> from mlx.utils import tree_flatten
        >>> from mlxshim.nn import add_lora
        >>> model = add_lora(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), rank=2)
        >>> sum(x.size for _, x in tree_flatten(model.trainable_parameters()))
        28
    """
    model.freeze()
    chosen = [
        (path, LoRA(layer, rank, scale))
        for path, layer in model.named_modules()
        if path and isinstance(layer, (nn.Linear, nn.QuantizedLinear)) and where(path, layer)
    ]
    if not chosen:
        raise ValueError("[add_lora] The model has no linear layer to adapt.")
    model.update_modules(tree_unflatten(chosen))  # pyright: ignore
    return model


def stack_adapters(adapters: Sequence[Tree]) -> Tree:
    """Several models' `trainable_parameters()`, alike in shape, with a leading axis of adapters.

    Args:
        adapters: Trees of arrays, at least one.

    Raises:
        ValueError: no adapters, or adapters whose arrays differ in shape.

    Example:
        >>> import mlx.core as mx
        >>> from mlxshim.nn import stack_adapters
        >>> stack_adapters([{"lora_b": mx.zeros((2, 4))}] * 3)["lora_b"].shape
        (3, 2, 4)
    """
    adapters = list(adapters)
    if not adapters:
        raise ValueError("[stack_adapters] There must be at least one adapter.")
    return tree_map(lambda *leaves: mx.stack(list(leaves)), *adapters)


def per_row(model: nn.Module, adapters: Tree, *, in_axes: Any = 0) -> Callable[..., Any]:
    """One model over a batch in which every row has an adapter of its own.

    The base runs once over all rows, dense or quantized; only the adapters' small products are one
    for each row. What all rows share, such as a prompt's keys and values, is not copied.

    Args:
        model: It is left as it was.
        adapters: `stack_adapters`' tree: what takes the place of the model's arrays, several times.
        in_axes: Which axis of each of the model's arguments has the rows, None for what they share.

    Returns:
        A function of `rows`, (batch,) integers that say which adapter each row has, and of the
        model's arguments, that returns what the model returns, with a leading axis of rows. The
        model sees one row at a time.

    Raises:
        ValueError: by its call, an adapter that does not fit the model, or axes that do not fit.

    Example:
        >>> import mlx.core as mx
        >>> import mlx.nn as nn
        >>> from mlxshim.nn import add_lora, per_row, stack_adapters
        >>> model = add_lora(nn.Sequential(nn.Linear(4, 4)), rank=2)
        >>> adapters = stack_adapters([model.trainable_parameters() for _ in range(3)])
        >>> per_row(model, adapters)(mx.array([0, 2, 1, 0]), mx.ones((4, 4))).shape
        (4, 4)
    """

    kept: dict[int, Callable[..., Any]] = {}

    def one(adapter: Tree, *inputs: Any) -> Any:
        return functional_call(model, adapter, *inputs)

    def call(rows: mx.array, *args: Any) -> Any:
        several = isinstance(in_axes, (list, tuple))
        axes = tuple(in_axes) if several else (in_axes,) * len(args)
        if len(axes) not in kept:
            kept[len(axes)] = vmap(one, in_axes=(0, *axes))  # kept: it learns from its traces
        return kept[len(axes)](tree_map(lambda leaf: leaf[rows], adapters), *args)

    return call
