"""Attention over a shared prompt, against attention over the concatenated keys and values."""

from __future__ import annotations

import itertools

import mlx.core as mx
import pytest
from attention_cases import assert_close, loop

import mlxshim
from mlxshim.nn import prompt_attention
from mlxshim.rules import attention_parts

ROWS, PROMPT, OWN, DIM = 3, 7, 5, 8
SCALE = 0.4


def arguments(lead=(), heads=4, kv_heads=2, length=3, value_dim=DIM, dtype=mx.float32):
    def of(n, positions, dim=DIM):
        return mx.random.normal((*lead, n, positions, dim)).astype(dtype)

    return [
        of(heads, length), of(kv_heads, PROMPT), of(kv_heads, PROMPT, value_dim),
        of(kv_heads, OWN), of(kv_heads, OWN, value_dim),
    ]  # fmt: skip


def in_parts(q, pk, pv, k, v):
    return prompt_attention(q, (pk, pv), k, v, scale=SCALE)


def concatenated(q, pk, pv, k, v):
    """Plain operations of float32: nothing shared with what is tested."""
    group = q.shape[-3] // k.shape[-3]
    keys, values = (
        mx.repeat(mx.concatenate(parts, axis=-2).astype(mx.float32), group, axis=-3)
        for parts in ((pk, k), (pv, v))
    )
    scores = (q.astype(mx.float32) * SCALE) @ keys.swapaxes(-1, -2)
    length, size = scores.shape[-2:]
    late = mx.arange(size)[None] > mx.arange(size - length, size)[:, None]
    return mx.softmax(scores - 1e9 * late.astype(mx.float32), axis=-1) @ values


def gradients(fun, ms):
    def loss(*xs):
        out = fun(*xs).astype(mx.float32)
        return (out * out).sum() + (out[..., 0] * mx.arange(out.shape[-2])).sum()

    return lambda *xs: list(ms.grad(loss, argnums=list(range(5)))(*xs))


def second(fun, ms):
    g = gradients(fun, ms)
    return lambda *xs: list(
        ms.grad(lambda *ys: sum((x * x).sum() for x in g(*ys)), argnums=list(range(5)))(*xs)
    )


def tangents(fun, ms):
    def both(*xs):
        out, dout = ms.jvp(lambda *ys: fun(*ys), list(xs), [0.5 * x + 0.1 for x in xs])
        return [*out, *dout]

    return both


SHAPES = [
    {},
    {"length": 1},
    {"kv_heads": 1, "value_dim": 12},
    {"kv_heads": 4, "length": OWN},
    {"lead": (2,), "length": 2},
]
MAPPED = [
    (True, False, False, True, True), (True,) * 5, (False, True, True, False, False),
    (False, False, False, True, False), (True, False, True, True, True), (True,) + (False,) * 4,
]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_one_row(shape):
    arrays = arguments(**shape)
    assert_close([in_parts(*arrays)], [concatenated(*arrays)], mx.float32)
    for meaning, of in itertools.product((gradients, tangents, second), (mlxshim, mx)):
        got, want = meaning(in_parts, of)(*arrays), meaning(concatenated, mx)(*arrays)
        assert_close(got, want, mx.float32)


@pytest.mark.parametrize("mapped", MAPPED, ids=lambda m: "".join("x-"[not i] for i in m))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_vmap_equals_the_loop(shape, mapped):
    arrays = arguments(**shape)
    arrays = [mx.stack([x, 2 * x, x - 1]) if m else x for x, m in zip(arrays, mapped)]
    axes = [0 if m else None for m in mapped]
    for meaning in (lambda fun, ms: lambda *xs: [fun(*xs)], gradients, tangents, second):
        got = mlxshim.vmap(meaning(in_parts, mlxshim), in_axes=tuple(axes))(*arrays)
        assert_close(got, loop(meaning(concatenated, mx), arrays, axes), mx.float32)

    def total(*xs):
        return (mlxshim.vmap(in_parts, in_axes=tuple(axes))(*xs) ** 2).sum()

    def meant(*xs):
        return (loop(lambda *ys: [concatenated(*ys)], xs, axes)[0] ** 2).sum()

    every = list(range(5))
    got, want = mlxshim.grad(total, every)(*arrays), mx.grad(meant, every)(*arrays)
    assert_close(got, want, mx.float32)


def test_nested_and_compiled():
    q, pk, pv, k, v = arguments()
    q, k, v = (mx.stack([mx.stack([x, x + 1]), mx.stack([2 * x, -x])]) for x in (q, k, v))
    axes = (0, None, None, 0, 0)
    one = gradients(in_parts, mlxshim)
    got = mlxshim.vmap(mlxshim.vmap(one, in_axes=axes), in_axes=axes)(q, pk, pv, k, v)
    want = loop(lambda *xs: loop(gradients(concatenated, mx), xs, axes), [q, pk, pv, k, v], axes)
    assert_close(got, want, mx.float32)
    compiled = mx.compile(mlxshim.vmap(in_parts, in_axes=axes))
    for _ in range(2):
        got = compiled(q[0], pk, pv, k[0], v[0])
        assert_close(
            [got], loop(lambda *xs: [concatenated(*xs)], [q[0], pk, pv, k[0], v[0]], axes),
            mx.float32,
        )  # fmt: skip


def test_rows_in_a_leading_dimension():
    _, pk, pv, _, _ = arguments()
    q, _, _, k, v = arguments(lead=(ROWS,))
    want = loop(lambda *xs: [concatenated(*xs)], [q, pk, pv, k, v], [0, None, None, 0, 0])
    assert_close([in_parts(q, pk, pv, k, v)], want, mx.float32)
    assert_close([in_parts(q, pk[None], pv[None], k, v)], want, mx.float32)


def test_rows_in_a_leading_dimension_of_each_sample():
    samples = [arguments(lead=(ROWS,)) for _ in range(2)]
    for xs in samples:
        xs[1:3] = [x[0] for x in xs[1:3]]
    arrays = [mx.stack(xs) for xs in zip(*samples)]
    by_row = (0, None, None, 0, 0)

    def meant(*xs):
        return loop(lambda *ys: [concatenated(*ys)], xs, by_row)[0]

    for mapped in ((0,) * 5, (0, 0, None, 0, 0), by_row):
        given = [x if a == 0 else x[0] for x, a in zip(arrays, mapped)]
        got = mlxshim.vmap(in_parts, in_axes=mapped)(*given)
        assert_close([got], loop(lambda *xs: [meant(*xs)], given, mapped), mx.float32)
        got = mlxshim.vmap(gradients(in_parts, mlxshim), in_axes=mapped)(*given)
        assert_close(got, loop(gradients(meant, mx), given, mapped), mx.float32)


@pytest.mark.parametrize("limit", [0, 1 << 30])
def test_the_lowering_of_a_gpu(limit, monkeypatch):
    """Little is copied for a fused call, much is not; here by the operations of this device."""
    raw, calls = mx.fast.scaled_dot_product_attention, []

    def counted(*args, **kwargs):
        calls.append(args[1].shape)
        return raw(*args, **kwargs)

    monkeypatch.setattr(attention_parts._devices, "gpu", lambda stream=None: True)
    monkeypatch.setattr(attention_parts, "SMALL_COPY", limit)
    monkeypatch.setattr(attention_parts, "original", lambda *_: counted)
    for length in (1, 3):
        arrays = arguments(lead=(ROWS,), length=length)
        arrays[1:3] = [x[0] for x in arrays[1:3]]
        axes = (0, None, None, 0, 0)
        got = mlxshim.vmap(in_parts, in_axes=axes)(*arrays)
        assert_close([got], loop(lambda *xs: [concatenated(*xs)], arrays, axes), mx.float32)
        got = mlxshim.vmap(gradients(in_parts, mlxshim), in_axes=axes)(*arrays)
        assert_close(got, loop(gradients(concatenated, mx), arrays, axes), mx.float32)
    assert set(calls) == ({(ROWS, 2, PROMPT + OWN, DIM)} if limit else set())


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
def test_half_precision(dtype):
    arrays = arguments(lead=(ROWS,), length=2, dtype=dtype)
    arrays[1:3] = [x[0] for x in arrays[1:3]]
    axes = (0, None, None, 0, 0)
    got = mlxshim.vmap(in_parts, in_axes=axes)(*arrays)
    assert got.dtype == dtype
    assert_close([got], loop(lambda *xs: [concatenated(*xs)], arrays, axes), dtype)
    got = mlxshim.vmap(gradients(in_parts, mlxshim), in_axes=axes)(*arrays)
    assert_close(got, loop(gradients(concatenated, mx), arrays, axes), dtype)


@pytest.mark.parametrize("gap", [30.0, -30.0, 200.0, -200.0])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
def test_one_part_outweighs_the_other(gap, dtype):
    q, pk, pv, k, v = arguments(dtype=dtype, length=1)
    arrays = [mx.ones_like(q), pk * 0 + gap / (SCALE * DIM), pv, k, v]  # the prompt's scores
    assert_close([in_parts(*arrays)], [concatenated(*arrays)], dtype)
    got, want = (f(*arrays) for f in (gradients(in_parts, mlxshim), gradients(concatenated, mx)))
    assert all(bool(mx.isfinite(x).all()) for x in got)
    if dtype == mx.float32:
        assert_close(got, want, dtype)


def test_the_prompt_is_read_once(monkeypatch):
    """Forward and for the gradient of the queries, its keys come to a product as they are."""
    seen = []
    matmul = mx.matmul

    def recorder(a, b):
        seen.append((a.shape, b.shape))
        return matmul(a, b)

    arrays = arguments(lead=(ROWS,), length=1)
    arrays[1:3] = [x[0] for x in arrays[1:3]]

    def loss(*xs):
        return (in_parts(*xs) ** 2).sum()

    call = mlxshim.vmap(mlxshim.grad(loss), in_axes=(0, None, None, 0, 0))
    mx.eval(call(*arrays))
    monkeypatch.setattr(attention_parts, "matmul", recorder)
    mx.eval(call(*arrays))
    of_prompt = [s for s in seen if PROMPT in s[0] + s[1] and s[0][0] == 1 and ROWS * 2 in s[0]]
    # Forward scores and output; backward scores, cotangents of weights, gradient of the queries.
    assert len(of_prompt) >= 5


def test_memory_of_the_gradient_of_the_queries():
    rows, size, dim = 64, 4096, 32
    prompt = [mx.random.normal((2, size, dim)) for _ in range(2)]
    q = mx.random.normal((rows, 4, 1, dim))
    k, v = (mx.random.normal((rows, 2, 1, dim)) for _ in range(2))
    mx.eval(prompt, q, k, v)
    call = mlxshim.vmap(
        mlxshim.grad(lambda q, k, v: (in_parts(q, *prompt, k, v) ** 2).sum(), argnums=[0, 1, 2])
    )
    mx.clear_cache()
    mx.synchronize()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(call(q, k, v))
    mx.synchronize()
    copies = rows * sum(x.nbytes for x in prompt)
    assert mx.get_peak_memory() - before < copies / 2


BAD = {
    "no multiple": [(3, 1, 4), (2, 6, 4), (2, 6, 4), (2, 1, 4), (2, 1, 4)],
    "do not go together": [(4, 1, 4), (2, 6, 4), (2, 5, 4), (2, 1, 4), (2, 1, 4)],
    "prompt's do not": [(4, 1, 4), (2, 6, 3), (2, 6, 4), (2, 1, 4), (2, 1, 4)],
    "do not fit the queries": [(2, 4, 1, 4), (2, 6, 4), (2, 6, 4), (2, 1, 4), (2, 1, 4)],
    "or none": [(2, 4, 1, 4), (3, 2, 6, 4), (3, 2, 6, 4), (2, 2, 1, 4), (2, 2, 1, 4)],
    "are needed": [(1, 4), (2, 6, 4), (2, 6, 4), (2, 1, 4), (2, 1, 4)],
    "put them there": [(4, 2, 4), (2, 6, 4), (2, 6, 4), (2, 1, 4), (2, 1, 4)],
}


@pytest.mark.parametrize("words", list(BAD))
def test_bad_shapes_are_refused(words):
    with pytest.raises(ValueError, match=words):
        in_parts(*(mx.zeros(s) for s in BAD[words]))
    with pytest.raises(ValueError, match="floating"):
        in_parts(*(x.astype(mx.int32) for x in arguments()))


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_a_long_prompt_in_half_precision(dtype):
    """The output of a long prompt is small, and a few own keys' is not: neither loses the other."""
    pk, pv = (mx.random.normal((2, 8192, 16)).astype(dtype) for _ in range(2))
    q, k, v = (mx.random.normal((3, h, 1 if h == 4 else 4, 16)).astype(dtype) for h in (4, 2, 2))
    got = mlxshim.vmap(lambda q, k, v: prompt_attention(q, (pk, pv), k, v, scale=0.1))(q, k, v)
    q, k, v, pk, pv = (x.astype(mx.float32) for x in (q, k, v, pk, pv))
    keys, values = (
        mx.concatenate([mx.broadcast_to(p, (3, *p.shape)), x], axis=2)
        for p, x in ((pk, k), (pv, v))
    )
    want = mx.fast.scaled_dot_product_attention(q, keys, values, scale=0.1)
    error = mx.linalg.norm(got.astype(mx.float32) - want) / mx.linalg.norm(want)
    assert float(error) < 1e-2
