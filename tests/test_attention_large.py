"""The gradient of attention by halves, against the gradient of the whole."""

from __future__ import annotations

import mlx.core as mx
import pytest

import mlxshim
from mlxshim.rules import attention, attention_large

MASKS = {
    "none": None,
    "causal": "causal",
    "whole": (3, 4, 8, 16),
    "heads": (4, 1, 16),
    "batch": (3, 1, 8, 1),
    "keys": (16,),
}


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("sinks", [False, True], ids=["", "sinks"])
@pytest.mark.parametrize("mask", MASKS)
def test_halves(monkeypatch, mask, sinks, kv_heads):
    """As small as they get: one row with one query head at a time."""
    q = mx.random.normal((3, 4, 8, 16))
    k, v = (mx.random.normal((3, kv_heads, 16, d)) for d in (16, 8))
    shape = MASKS[mask]
    extra = mx.random.normal(shape) if isinstance(shape, tuple) else shape
    sink = mx.random.normal((4,)) if sinks else None
    weight = mx.random.normal((3, 4, 8, 8))
    calls = []

    def loss(q, k, v):
        out = mx.fast.scaled_dot_product_attention(q, k, v, scale=0.3, mask=extra, sinks=sink)
        return (out * weight).sum()

    def seen(*arrays):
        calls.append(arrays[0].shape)
        return plain(*arrays)

    want = mx.grad(loss, argnums=(0, 1, 2))(q, k, v)
    plain = attention_large.is_large
    monkeypatch.setattr(attention_large, "WORKSPACE", 1)
    monkeypatch.setattr(attention, "is_large", seen)
    monkeypatch.setattr(attention, "_gpu", lambda *_: True)
    monkeypatch.setattr(attention, "padding", lambda *_: (0, 0))
    got = mlxshim.grad(loss, argnums=(0, 1, 2))(q, k, v)
    assert (1, 1, 8, 16) in calls
    for g, w in zip(got, want):
        assert g.shape == w.shape
        assert mx.allclose(g, w, rtol=1e-4, atol=1e-5)
