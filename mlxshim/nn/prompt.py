"""Attention over a prompt that all rows share and a continuation that each has for itself."""

from __future__ import annotations

import math

import mlx.core as mx

from ..core import levels
from ..rules._dtypes import promoted
from ..rules.attention_parts import prompt as of_prompt


def prompt_attention(
    queries: mx.array,
    prompt: tuple[mx.array, mx.array],
    keys: mx.array,
    values: mx.array,
    *,
    scale: float,
) -> mx.array:
    """Causal attention over keys and values in two parts, which are not brought together.

    Under `vmap` with the prompt unmapped its keys and values are read once, as they are: the
    queries of all rows are rows of one product with them, and nothing of the prompt's size is
    written for a row. Concatenating the two would copy the prompt for every row. The same is done
    for rows in a leading dimension that the prompt does not have.

    Gradients are those of attention over the concatenated keys and values. The gradient of the
    queries reads the prompt once as well; those of the prompt's keys and values, under
    `vmap(grad)`, are as many as there are rows.

    Args:
        queries: (..., heads, length, dim), those of the last `length` positions.
        prompt: Keys and values of the prompt: (..., kv_heads, prompt, dim) each, or without the
            leading dimensions, for all of them. All queries see all of it. heads is a multiple of
            kv_heads; the values may have a dim of their own.
        keys: (..., kv_heads, continuation, dim), the ones of the queries' positions last.
        values: Likewise.
        scale: Of the scores.

    Returns:
        (..., heads, length, dim of the values).

    Raises:
        ValueError: heads no multiple of kv_heads, or shapes that do not go together.

    References:
        Juravsky et al., "Hydragen: High-Throughput LLM Inference with Shared Prefixes", 2024.

    Example:
        >>> import mlx.core as mx
        >>> from mlxshim import vmap
        >>> from mlxshim.nn import prompt_attention
        >>> prompt = mx.random.normal((2, 100, 8)), mx.random.normal((2, 100, 8))
        >>> q, k, v = (mx.random.normal((16, h, 1, 8)) for h in (4, 2, 2))
        >>> def attend(q, k, v):
        ...     return prompt_attention(q, prompt, k, v, scale=8**-0.5)
        >>> vmap(attend)(q, k, v).shape
        (16, 4, 1, 8)
    """
    arrays = _checked(queries, *prompt, keys, values)
    *lead, heads, length, _ = queries.shape
    # Sizes and not -1: there may be no prompt, and then there is nothing to share.
    flat = [mx.reshape(x, (math.prod(x.shape[:-3]), *x.shape[-3:])) for x in arrays]
    if not prompt[0].shape[-2]:
        q, _, _, k, v = flat
        out = mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask="causal")
        return mx.reshape(out, (*lead, heads, length, values.shape[-1]))
    bind = of_prompt if "vmap" in levels.active() else of_prompt.differentiable
    out = bind(*flat, scale=float(scale))[0]
    return mx.reshape(out, (*lead, heads, length, values.shape[-1]))


def _checked(*arrays: mx.array) -> list[mx.array]:
    """Queries, the prompt's keys and values, own keys and values: of one dtype, if they fit."""
    q, shared_k, shared_v, k, v = arrays
    shapes = ", ".join(str(x.shape) for x in arrays)
    given = f"queries, prompt, keys and values have shapes {shapes}"
    if any(x.ndim < 3 for x in arrays):
        raise ValueError(f"[prompt_attention] heads, positions and dim are needed: {given}.")
    *lead, heads, length, dim = q.shape
    kv_heads = k.shape[-3]
    if heads % kv_heads:
        raise ValueError(
            f"[prompt_attention] {heads} query heads are no multiple of {kv_heads} key heads."
        )
    for name, a, b in (("keys and values", k, v), ("the prompt's", shared_k, shared_v)):
        if a.shape[:-1] != b.shape[:-1] or a.shape[-1] != dim or a.shape[-3] != kv_heads:
            raise ValueError(f"[prompt_attention] {name} do not go together: {given}.")
    if [*k.shape[:-3]] != lead or v.shape[-1] != shared_v.shape[-1]:
        raise ValueError(f"[prompt_attention] keys and values do not fit the queries: {given}.")
    if shared_k.ndim > 3 and [*shared_k.shape[:-3]] != lead and math.prod(shared_k.shape[:-3]) != 1:
        raise ValueError(
            f"[prompt_attention] the prompt has the leading dimensions of the queries, or none: "
            f"{given}."
        )
    if k.shape[-2] < length:
        raise ValueError(
            f"[prompt_attention] {length} queries have keys of {k.shape[-2]} positions: the last "
            f"ones are those of the queries' own; put them there."
        )
    dtype = promoted(*arrays)
    if dtype is None:
        dtypes = ", ".join(str(x.dtype) for x in arrays)
        raise ValueError(f"[prompt_attention] takes floating point, not {dtypes}.")
    return [x.astype(dtype) for x in arrays]
