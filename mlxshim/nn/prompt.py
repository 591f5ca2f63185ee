"""Attention over a prompt that all rows share and a continuation that each has for itself."""

from __future__ import annotations

import mlx.core as mx


def prompt_attention(
    queries: mx.array,
    prompt: tuple[mx.array, mx.array],
    keys: mx.array,
    values: mx.array,
    *,
    scale: float,
) -> mx.array:
    """Causal attention over keys and values in two parts, which are not brought together.

    Under `vmap` with the prompt unmapped its keys and values are read as they are: nothing of the
    prompt's size is written for a row. Concatenating the two would copy the prompt for every row.

    Args:
        queries: (..., heads, length, dim), those of the last `length` positions.
        prompt: Keys and values of the prompt: (..., kv_heads, prompt, dim) each. All queries see
            all of them. heads is a multiple of kv_heads.
        keys: (..., kv_heads, continuation, dim), the ones of the queries' positions last.
        values: Likewise.
        scale: Of the scores.

    Returns:
        (..., heads, length, dim).

    Raises:
        ValueError: heads no multiple of kv_heads.

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
    *lead, heads, length, dim = queries.shape
    kv_heads, own = keys.shape[-3], keys.shape[-2]
    if heads % kv_heads:
        raise ValueError(
            f"[prompt_attention] {heads} query heads are no multiple of {kv_heads} key heads."
        )
    # The queries of a group are rows of one product with its keys.
    q = mx.reshape(queries * scale, (*lead, kv_heads, -1, dim))
    shared = q @ mx.swapaxes(prompt[0], -1, -2)
    mine = q @ mx.swapaxes(keys, -1, -2)
    if length > 1:
        seen = mx.arange(own)[None] <= mx.arange(own - length, own)[:, None]
        mask = mx.where(seen, 0.0, mx.finfo(mine.dtype).min).astype(mine.dtype)
        mine = mine + mx.concatenate([mask] * (heads // kv_heads))
    weights = mx.softmax(mx.concatenate([shared, mine], axis=-1), axis=-1, precise=True)
    size = prompt[0].shape[-2]
    out = weights[..., :size] @ prompt[1] + weights[..., size:] @ values
    return mx.reshape(out, (*lead, heads, length, dim))
