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


def memory_of_gpu():
    """In bytes; 0 without a CUDA GPU."""
    if mx.default_device() != mx.gpu or mx.metal.is_available():
        return 0
    info = mx.device_info()
    return info.get("total_memory") or info.get("memory_size") or 0


@pytest.mark.skipif(
    memory_of_gpu() < 40 << 30, reason="calls of a real size: needs a CUDA GPU of 40 GiB"
)
@pytest.mark.parametrize("length", [4096, 8192])
@pytest.mark.parametrize("mapped", [True, False], ids=["vmap", "batch"])
def test_gpu(mapped, length):
    """The workspace of all samples is beyond MLX, that of one is not."""
    check_samples(mapped, 16, length)


@pytest.mark.parametrize("mapped", [True, False], ids=["vmap", "batch"])
def test_the_check_of_samples(mapped):
    """The same comparison at a size for every machine."""
    check_samples(mapped, 4, 64)


def check_samples(mapped, samples, length):
    """The gradients of all samples at once are MLX's own of one sample at a time."""

    def draw(*shape):
        return mx.random.normal(shape).astype(mx.bfloat16)

    heads = (32, 8, 8)
    qkv = [draw(samples, 1, n, length, 128) for n in heads]
    weight = draw(32, length, 128)

    def loss(q, k, v):
        out = mx.fast.scaled_dot_product_attention(q, k, v, scale=128**-0.5, mask="causal")
        return (out * weight).astype(mx.float32).sum()

    def grad(transform):
        return transform(loss, argnums=(0, 1, 2))

    if mapped:
        got = mlxshim.vmap(grad(mlxshim.grad))(*qkv)
    else:
        got = [mx.expand_dims(g, 1) for g in grad(mlxshim.grad)(*(x[:, 0] for x in qkv))]
    mx.eval(got)
    for i in (0, samples // 2, samples - 1):
        want = grad(mx.grad)(*(x[i] for x in qkv))
        for g, w in zip(got, want):
            g, w = g[i].astype(mx.float32), w.astype(mx.float32)
            assert g.shape == w.shape
            assert mx.linalg.norm(g - w) <= 0.02 * mx.linalg.norm(w)
