"""Shapes at which CUDA has fused kernels, forward and backward: half precision, L = 128, D = 64,
and lengths that are brought to them.

They are right everywhere; where there is a kernel they are run through it.
"""

from __future__ import annotations

import mlx.core as mx
import pytest
from attention_cases import Case, arguments, assert_close, loop

import mlxshim

SHAPE = {"batch": 1, "q_length": 128, "k_length": 128, "dim": 64, "value_dim": 64}
RAGGED = {"batch": 1, "q_length": 100, "k_length": 100, "dim": 64, "value_dim": 64}
CASES = [
    Case("gqa", **SHAPE),
    Case("gqa-causal", mask="causal", **SHAPE),
    Case("mqa-causal", kv_heads=1, mask="causal", **SHAPE),
    Case("gqa-additive", mask="additive", mask_shape=(1, 1, 128, 128), **SHAPE),
    Case("gqa-additive-heads", mask="additive", mask_shape=(4, 128, 128), **SHAPE),
    Case("gqa-bool", mask="bool", mask_shape=(128, 128), **SHAPE),
    Case("gqa-sinks", sinks=True, **SHAPE),
    Case("gqa-sinks-causal", sinks=True, mask="causal", **SHAPE),
    Case("gqa-value-dim", mask="causal", **{**SHAPE, "value_dim": 128}),
    Case("ragged", **RAGGED),
    Case("ragged-causal", mask="causal", **RAGGED),
    Case("ragged-causal-longer-keys", mask="causal", **{**RAGGED, "k_length": 203}),
    Case("ragged-additive", mask="additive", mask_shape=(1, 1, 100, 100), **RAGGED),
    Case("ragged-additive-keys", mask="additive", mask_shape=(100,), **RAGGED),
    Case("ragged-bool", mask="bool", mask_shape=(100, 100), **RAGGED),
    Case("ragged-sinks-causal", sinks=True, mask="causal", **RAGGED),
    Case("gqa-longer-keys", mask="causal", **{**SHAPE, "k_length": 256}),
    Case("ragged-keys", **{**SHAPE, "k_length": 100}),
    Case("ragged-keys-causal", mask="causal", **{**SHAPE, "k_length": 200}),
    Case("ragged-keys-bool", mask="bool", mask_shape=(128, 200), **{**SHAPE, "k_length": 200}),
    Case("ragged-mask-of-one", mask="additive", mask_shape=(100, 1), **RAGGED),
]


def subsets(case: Case):
    """All, each one alone, and all but each one."""
    n = len(case.names)
    alone = [tuple(i == j for j in range(n)) for i in range(n)]
    return [(True,) * n, *alone, *(tuple(not x for x in s) for s in alone)]


PARAMS = [
    pytest.param(case, mapped, id=f"{case.name}-{''.join('m' if m else '.' for m in mapped)}")
    for case in CASES
    for mapped in subsets(case)
]


@pytest.mark.parametrize("case, mapped", PARAMS)
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=["f16", "bf16"])
def test_forward(case, mapped, dtype):
    arrays, axes = arguments(case, mapped, 0, dtype)
    got = mlxshim.vmap(case.call, in_axes=tuple(axes))(*arrays)
    assert got.dtype == dtype
    assert_close([got], loop(lambda *xs: [case.reference(*xs)], arrays, axes), dtype)


@pytest.mark.parametrize("case, mapped", PARAMS)
@pytest.mark.parametrize("kind", ["weighted", "sum", "square"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_gradient(case, mapped, kind, compiled):
    """A sum has a cotangent of stride zero; a square needs the value; all in bfloat16."""
    arrays, axes = arguments(case, mapped, 0, mx.bfloat16)
    w = mx.random.normal((case.heads, case.q_length, case.value_dim))

    def loss(fun):
        def of_one(*xs):
            out = fun(*xs).astype(mx.float32)
            return {"weighted": out * w, "sum": out, "square": out * out * w}[kind].sum()

        return of_one

    numbers = case.floating()
    mine = mlxshim.vmap(mlxshim.grad(loss(case.call), argnums=numbers), in_axes=tuple(axes))
    if compiled:
        mine = mx.compile(mine)
    got = mine(*arrays)
    one = mx.grad(loss(case.reference), argnums=numbers)
    assert_close(list(got), loop(lambda *xs: list(one(*xs)), arrays, axes), mx.bfloat16)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
@pytest.mark.parametrize("kind", ["weighted", "sum"])
def test_plain_gradient(case, kind):
    arrays = [case.array(n, (), mx.bfloat16) for n in case.names]
    w = mx.random.normal((case.heads, case.q_length, case.value_dim))

    def loss(fun):
        return lambda *xs: (fun(*xs).astype(mx.float32) * (w if kind == "weighted" else 1.0)).sum()

    numbers = case.floating()
    got = mlxshim.grad(loss(case.call), argnums=numbers)(*arrays)
    want = mx.grad(loss(case.reference), argnums=numbers)(*arrays)
    assert_close(list(got), list(want), mx.bfloat16)


def test_two_levels():
    case = CASES[1]
    q, k, v = (mx.random.normal((2, 3, *case.shape(n))).astype(mx.bfloat16) for n in "qkv")

    def loss(fun):
        return lambda *xs: (fun(*xs).astype(mx.float32) ** 2).sum()

    mine = mlxshim.grad(loss(case.call), argnums=[0, 1, 2])
    one = mx.grad(loss(case.reference), argnums=[0, 1, 2])
    got = mlxshim.vmap(mlxshim.vmap(mine, in_axes=(0, None, 0)), in_axes=(None, 0, 0))(
        q[0], k[:, 0], v
    )
    inner = lambda q, k, v: loop(lambda *xs: list(one(*xs)), [q, k, v], [0, None, 0])  # noqa: E731
    assert_close(list(got), loop(inner, [q[0], k[:, 0], v], [None, 0, 0]), mx.bfloat16)
