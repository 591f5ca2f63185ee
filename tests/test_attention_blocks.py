"""Attention in blocks: against the loop, the decomposed path, and what it may hold in memory."""

from __future__ import annotations

import functools
import math

import mlx.core as mx
import pytest
from attention_cases import CASES, SAMPLES, Case, arguments, assert_close, loop

import mlxshim
from mlxshim import attention_budget
from mlxshim.rules import attention as rules
from mlxshim.rules import attention_blocks, attention_long
from mlxshim.rules.attention_plain import decompose

#: Blocks of (rows, keys, bytes): some that cut every length, and some that cut heads as well.
SIZES = [(2, 3, 1 << 20), (3, 2, 100), (64, 64, 1 << 20)]
MORE = [
    Case("two-blocks-bool", heads=6, q_length=9, k_length=7, mask="bool", mask_shape=(2, 6, 9, 7)),
    Case("batch-mask", mask="additive", mask_shape=(2, 1, 5, 5)),
    Case("key-mask", kv_heads=1, mask="additive", mask_shape=(5,)),
    Case("one-number", mask="additive", mask_shape=()),
    Case("causal-sinks-short", q_length=3, k_length=8, mask="causal", sinks=True),
]
ALL = [*CASES, *MORE]


def set_sizes(monkeypatch, *sizes):
    for name, size in zip(("ROWS", "KEYS", "BYTES"), sizes):
        monkeypatch.setattr(attention_blocks, name, size)
        monkeypatch.setattr(attention_blocks, f"{name}_GPU", size)


@pytest.fixture(params=SIZES, ids=["cut", "one-head", "whole"], autouse=True)
def small(request, monkeypatch):
    """Small blocks, whatever the budget says, and a count of how often they serve."""
    rows, keys, size = request.param
    set_sizes(monkeypatch, rows, keys, size)
    monkeypatch.setattr(rules, "_fuses", lambda *_: False)
    calls = {"forward": 0, "backward": 0, "mask": 0}

    def counted(name, fun):
        @functools.wraps(fun)
        def count(*arrays, **static):
            calls[name] += 1
            return fun(*arrays, **static)

        return count

    for name, operation in (
        ("forward", attention_long.attention),
        ("backward", attention_long.attention_vjp),
        ("mask", attention_long.mask_vjp),
    ):
        monkeypatch.setattr(operation, "lowering", counted(name, operation.lowering))
        for cached in ("_node", "_outside"):
            fresh = getattr(operation, cached).__wrapped__
            monkeypatch.setattr(operation, cached, fresh)
    with attention_budget(0):
        yield calls


def weights(case: Case) -> mx.array:
    key = mx.random.key(7)
    return mx.random.normal((case.batch, case.heads, case.q_length, case.value_dim), key=key)


def value_and_gradient(case, fun, ms):
    w, floating = weights(case), case.floating()

    def loss(*xs):
        out = fun(*xs).astype(mx.float32)
        return (out * w + 0.1 * out * out).sum()

    def both(*xs):
        value, grads = ms.value_and_grad(loss, argnums=floating)(*xs)
        return [value, *grads]

    return both


def test_gradient_of_one_sample(small):
    for case in ALL:
        arrays, _ = arguments(case, (False,) * len(case.names), 0)
        got = value_and_gradient(case, case.call, mlxshim)(*arrays)
        want = value_and_gradient(case, case.reference, mx)(*arrays)
        assert_close(got, want, mx.float32)
    assert small["forward"] == small["backward"] == len(ALL)


@pytest.mark.parametrize("case", ALL, ids=lambda c: c.name)
def test_vmap_equals_the_loop(case, small):
    n = len(case.names)
    alone = [tuple(i == j for j in range(n)) for i in range(n)]
    but_one = [tuple(i != j for j in range(n)) for i in range(n)]
    for number, mapped in enumerate([*alone, *but_one, (True,) * n]):
        arrays, axes = arguments(case, mapped, (0, -1, 1)[number % 3])
        in_axes = tuple(axes)
        got = mlxshim.vmap(case.call, in_axes)(*arrays)
        assert_close([got], loop(lambda *xs: [case.reference(*xs)], arrays, axes), mx.float32)
        got = mlxshim.vmap(value_and_gradient(case, case.call, mlxshim), in_axes)(*arrays)
        want = loop(value_and_gradient(case, case.reference, mx), arrays, axes)
        assert_close(got, want, mx.float32)
    assert small["forward"] and small["backward"]
    assert bool(small["mask"]) == (case.mask == "additive")


@pytest.mark.parametrize("case", ALL[::2], ids=lambda c: c.name)
def test_nested(case):
    mapped = (True,) * len(case.names)
    arrays, axes = arguments(case, mapped, 0)
    nested = [mx.stack([x, x + x if x.dtype != mx.bool_ else x]) for x in arrays]
    one = value_and_gradient(case, case.call, mlxshim)
    want = loop(
        lambda *xs: loop(value_and_gradient(case, case.reference, mx), xs, axes), nested, axes
    )
    assert_close(mlxshim.vmap(mlxshim.vmap(one))(*nested), want, mx.float32)


@pytest.mark.parametrize("small", SIZES[2:], indirect=True, ids=["whole"])
def test_compiled():
    """The graph; one size, because a CPU has to build each kernel that is new to it."""
    case = ALL[2]
    arrays, axes = arguments(case, (True,) * len(case.names), 0)
    compiled = mx.compile(mlxshim.vmap(value_and_gradient(case, case.call, mlxshim)))
    want = loop(value_and_gradient(case, case.reference, mx), arrays, axes)
    for _ in range(2):
        assert_close(compiled(*arrays), want, mx.float32)


def test_derivatives_of_a_vmap(small):
    for case in ALL:
        arrays, axes = arguments(case, (True,) * len(case.names), 1)
        w = mx.random.normal((SAMPLES, *weights(case).shape))
        mapped = mlxshim.vmap(case.call, in_axes=tuple(axes))
        floating = case.floating()

        def ours(*xs, mapped=mapped, w=w):
            return (mapped(*xs) * w).sum()

        def meant(*xs, case=case, axes=axes, w=w):
            return (loop(lambda *ys: [case.reference(*ys)], xs, axes)[0] * w).sum()

        got = mlxshim.grad(ours, argnums=floating)(*arrays)
        assert_close(got, mx.grad(meant, argnums=floating)(*arrays), mx.float32)
        # MLX's own grad sees a node, and its derivative is in blocks as well.
        before = small["backward"]
        got = mx.grad(ours, argnums=floating)(*arrays)
        assert_close(got, mx.grad(meant, argnums=floating)(*arrays), mx.float32)
        assert small["backward"] > before


@pytest.mark.parametrize("ours", [mlxshim, mx], ids=["mlxshim", "mx"])
def test_second_derivatives(ours):
    """Ours around ours are decomposed; MLX's around ours go through the rules of the blocks."""
    for case in ALL[::2]:
        arrays, _ = arguments(case, (False,) * len(case.names), 0)
        floating = case.floating()

        def norm(g, w=0.7):
            return lambda *xs: sum((w * x.astype(mx.float32) ** 2).sum() for x in g(*xs)[1:])

        inner = value_and_gradient(case, case.call, mlxshim)
        meant = value_and_gradient(case, case.reference, mx)
        got = ours.grad(norm(inner), argnums=floating)(*arrays)
        want = mx.grad(norm(meant), argnums=floating)(*arrays)
        assert_close(got, want, mx.float32)


def test_rules_of_the_rules():
    """What second derivatives would take if nothing told that they will be taken."""
    for case in (ALL[2], ALL[10], ALL[15], ALL[-4], ALL[-1]):
        arrays, _ = arguments(case, (False,) * len(case.names), 0)
        static = {
            "scale": 0.4, "causal": case.mask == "causal", "has_mask": "mask" in case.names,
        }  # fmt: skip
        plain = functools.partial(decompose, **static)
        in_blocks = functools.partial(attention_long.attention, **static)
        w = weights(case)

        def out(fun):
            return lambda *xs: fun(*xs)[:1]

        def pulled(fun, w=w):
            return lambda *xs: mx.vjp(out(fun), list(xs), [w])[1]

        tangents = [0.5 * x + 0.1 for x in arrays]
        got, want = (mx.jvp(f, arrays, tangents) for f in (out(in_blocks), plain))
        assert_close([*got[0], *got[1]], [*want[0], *want[1]], mx.float32)
        got, want = (mx.jvp(pulled(f), arrays, tangents) for f in (in_blocks, plain))
        assert_close([*got[0], *got[1]], [*want[0], *want[1]], mx.float32)
        stacked = [mx.stack([x, 2 * x]) for x in arrays]
        got, want = (mx.vmap(pulled(f))(*stacked) for f in (in_blocks, plain))
        assert_close(got, want, mx.float32)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
def test_half_precision_adds_up_in_float32(dtype):
    for case in ALL:
        arrays, axes = arguments(case, (True,) * len(case.names), 0, dtype)
        one = value_and_gradient(case, case.call, mlxshim)
        got = mlxshim.vmap(one)(*arrays)
        assert [g.dtype for g in got[1:]] == [arrays[i].dtype for i in case.floating()]
        assert_close(got, loop(value_and_gradient(case, case.reference, mx), arrays, axes), dtype)
        # As exact as the result's dtype allows: no sum in it was of half precision.
        exact = [x if x.dtype == mx.bool_ else x.astype(mx.float32) for x in arrays]
        got = mlxshim.vmap(case.call)(*arrays)
        want = mlxshim.vmap(case.call)(*exact).astype(dtype)
        assert_close([got], [want], mx.float16)


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("kind", ["bool", "causal", "additive"])
def test_rows_that_see_nothing(kind, sinks):
    """Uniform weights, as MLX has it, and no part in the gradient of the scores."""
    q = mx.random.normal((2, 4, 6, 8))
    k, v = (mx.random.normal((2, 2, 4, 8)) for _ in "kv")
    others = [mx.random.normal((4,))] if sinks else []
    seen = mx.arange(4)[None] < mx.array([[0], [4], [0], [1], [3], [2]])
    mask = {
        "bool": seen,
        "causal": "causal",
        "additive": mx.where(seen, 0.5, mx.finfo(mx.float32).min),
    }[kind]

    def loss(q, k, v, *sinks):
        out = mx.fast.scaled_dot_product_attention(
            q, k, v, scale=0.4, mask=mask, sinks=sinks[0] if sinks else None
        )
        return (out * mx.arange(6.0)[:, None]).sum() + (out * out).sum()

    every = list(range(3 + sinks))
    got = mlxshim.value_and_grad(loss, argnums=every)(q, k, v, *others)
    with attention_budget(math.inf):
        want = mlxshim.value_and_grad(loss, argnums=every)(q, k, v, *others)
    assert_close([got[0], *got[1][1:]], [want[0], *want[1][1:]], mx.float32)
    rows = mx.array([1, 3, 4, 5]) if kind != "causal" else mx.array([2, 3, 4, 5])
    assert_close([got[1][0][:, :, rows]], [want[1][0][:, :, rows]], mx.float32)


def test_infinite_masks():
    """-inf hides; a row of nothing but -inf is no number, here as in MLX."""
    q = mx.random.normal((1, 2, 5, 4))
    mask = mx.where(mx.arange(5)[None] < mx.array([[1], [3], [5], [2], [4]]), 0.0, -math.inf)

    def loss(q, mask):
        out = mx.fast.scaled_dot_product_attention(q, q, q, scale=1.0, mask=mask)
        return (out * out).sum()

    got = mlxshim.value_and_grad(loss, argnums=[0, 1])(q, mask)
    with attention_budget(math.inf):
        want = mlxshim.value_and_grad(loss, argnums=[0, 1])(q, mask)
    assert_close([got[0], *got[1]], [want[0], *want[1]], mx.float32)
    assert math.isnan(mlxshim.value_and_grad(loss)(q, mx.full((5, 5), -math.inf))[0].item())


def test_the_budget_decides(small):
    case = Case("budget", mask="causal")  # 2 * 4 * 5 * 5 scores of 4 bytes
    arrays, _ = arguments(case, (False,) * 3, 0)
    one = value_and_gradient(case, case.call, mlxshim)
    for budget, served in ((800, 0), (799, 1)):
        with attention_budget(budget):
            before = small["backward"]
            mx.eval(one(*arrays))
            assert small["backward"] - before == served
    stacked = [mx.stack([x] * 3) for x in arrays]
    for budget, served in ((2400, 0), (2399, 1)):
        with attention_budget(budget):
            before = small["backward"]
            mx.eval(mlxshim.vmap(one)(*stacked))
            assert small["backward"] - before == served
    for wrong in (-1, math.nan, "1 GiB"):
        with pytest.raises(ValueError, match="attention_budget"), attention_budget(wrong):
            pass


def test_memory_is_linear_in_the_length(small, monkeypatch):
    set_sizes(monkeypatch, 128, 128, 1 << 18)

    def loss(q, k):
        return mx.fast.scaled_dot_product_attention(q, k, k, scale=0.3, mask="causal").sum()

    def peak(length):
        arrays = [mx.random.normal((2, 1, h, length, 8)) for h in (4, 2)]
        mx.eval(arrays)
        mx.synchronize()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        mx.eval(mlxshim.vmap(mlxshim.grad(loss, argnums=[0, 1]))(*arrays))
        mx.synchronize()
        return mx.get_peak_memory() - before, 2 * 4 * length**2 * 4

    (short, _), (long, scores) = peak(512), peak(2048)
    assert long < 5 * short + (1 << 20)
    assert long < scores / 4
