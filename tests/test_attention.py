"""Attention under every transform, for every subset of mapped arguments, against the loop."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import pytest
from attention_cases import CASES, SAMPLES, Case, arguments, assert_close, loop, subsets

import mlxshim
from mlxshim.rules import attention as rules
from mlxshim.rules import attention_plain, attention_ragged

Fun = Callable[..., list[mx.array]]


@pytest.fixture(params=["device", "fused"])
def lowering(request, monkeypatch):
    """The path of this device, and the one of a device with fused kernels, rules and all."""
    if request.param == "fused":
        monkeypatch.setattr(rules, "_fuses", lambda arrays, static, stack: "jvp" not in stack)
        monkeypatch.setattr(rules, "padding", to_four)
    return request.param


def to_four(q, k, v, causal):
    """A tile of four, where CUDA's is of 128."""
    if causal and q.shape[2] > k.shape[2]:
        return None
    return attention_ragged.filling(q.shape[2], k.shape[2], causal, 4)


def weights(case: Case) -> mx.array:
    key = mx.random.key(7)
    return mx.random.normal((case.batch, case.heads, case.q_length, case.value_dim), key=key)


# Each transform twice: with mlxshim over the operation, and its meaning for one sample, written
# with MLX's own derivatives over the reference.


def loss(case: Case, fun: Callable) -> Callable:
    w = weights(case)
    return lambda *xs: (fun(*xs).astype(mx.float32) * w).sum()


def tangents(xs):
    return [mx.zeros_like(x) if x.dtype == mx.bool_ else 0.5 * x + 0.1 for x in xs]


def forward(case: Case, fun: Callable, ms) -> Fun:
    return lambda *xs: [fun(*xs)]


def gradient(case: Case, fun: Callable, ms) -> Fun:
    g = ms.grad(loss(case, fun), argnums=case.floating())
    return lambda *xs: list(g(*xs))


def pullback(case: Case, fun: Callable, ms) -> Fun:
    def of_one(*xs):
        floating = case.floating()

        def partial(*some):
            full = list(xs)
            for i, x in zip(floating, some):
                full[i] = x
            return fun(*full).astype(mx.float32)

        out, grads = ms.vjp(partial, [xs[i] for i in floating], [weights(case)])
        return [*out, *grads]

    return of_one


def pushforward(case: Case, fun: Callable, ms) -> Fun:
    def of_one(*xs):
        out, dout = ms.jvp(fun, list(xs), tangents(xs))
        return [*out, *dout]

    return of_one


def hessian_product(case: Case, fun: Callable, ms) -> Fun:
    def square(*xs):
        return (fun(*xs).astype(mx.float32) ** 2 * weights(case)).sum()

    g = ms.grad(square, argnums=case.floating())

    def of_one(*xs):
        return list(ms.jvp(lambda *ys: list(g(*ys)), list(xs), tangents(xs))[1])

    return of_one


def second_gradient(case: Case, fun: Callable, ms) -> Fun:
    g = ms.grad(loss(case, fun), argnums=case.floating())

    def norm(*xs):
        return sum((x.astype(mx.float32) ** 2).sum() for x in g(*xs))

    h = ms.grad(norm, argnums=case.floating())
    return lambda *xs: list(h(*xs))


MEANINGS = {
    "forward": forward,
    "grad": gradient,
    "vjp": pullback,
    "jvp": pushforward,
    "hvp": hessian_product,
    "grad-grad": second_gradient,
}


def subset_params(names: tuple[str, ...] = tuple(MEANINGS)):
    return [
        pytest.param(
            case,
            mapped,
            name,
            id=f"{case.name}-{''.join(n[0] for n, m in zip(case.names, mapped) if m)}-{name}",
        )
        for case in CASES
        for mapped in subsets(len(case.names))
        for name in names
    ]


@pytest.mark.parametrize("case, mapped, meaning", subset_params())
def test_vmap_of_everything_equals_the_loop(case, mapped, meaning, lowering):
    make = MEANINGS[meaning]
    ours, meant = make(case, case.call, mlxshim), make(case, case.reference, mx)
    for axis in (0, -1, 2):
        arrays, axes = arguments(case, mapped, axis)
        got = mlxshim.vmap(ours, in_axes=tuple(axes))(*arrays)
        assert_close(got, loop(meant, arrays, axes), mx.float32)


@pytest.mark.parametrize("case, mapped, meaning", subset_params(("forward", "grad")))
def test_compile_outside_and_inside(case, mapped, meaning, lowering):
    make = MEANINGS[meaning]
    ours, meant = make(case, case.call, mlxshim), make(case, case.reference, mx)
    arrays, axes = arguments(case, mapped, 1)
    want = loop(meant, arrays, axes)
    outside = mx.compile(mlxshim.vmap(ours, in_axes=tuple(axes)))
    for _ in range(2):  # the trace, then the cached graph
        assert_close(outside(*arrays), want, mx.float32)
    inside = mlxshim.vmap(mx.compile(ours), in_axes=tuple(axes))
    assert_close(inside(*arrays), want, mx.float32)


@pytest.mark.parametrize("case, mapped, meaning", subset_params(("forward",)))
def test_derivatives_of_vmap(case, mapped, meaning, lowering):
    arrays, axes = arguments(case, mapped, 1)
    w = mx.random.normal((SAMPLES, *weights(case).shape))
    floating = case.floating()
    mapped_call = mlxshim.vmap(case.call, in_axes=tuple(axes))

    def ours(*xs):
        return (mapped_call(*xs) * w).sum()

    def meant(*xs):
        return (loop(lambda *ys: [case.reference(*ys)], xs, axes)[0] * w).sum()

    got = mlxshim.grad(ours, argnums=floating)(*arrays)
    assert_close(got, mx.grad(meant, argnums=floating)(*arrays), mx.float32)
    out, dout = mlxshim.jvp(ours, arrays, tangents(arrays))
    want, dwant = mx.jvp(meant, arrays, tangents(arrays))
    assert_close([*out, *dout], [*want, *dwant], mx.float32)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
@pytest.mark.parametrize("meaning", ["forward", "grad", "jvp"])
def test_nested_vmap(case, meaning, lowering):
    """Every pair of subsets would be 900 a case; all against all-but-one and the lone ones."""
    make = MEANINGS[meaning]
    ours, meant = make(case, case.call, mlxshim), make(case, case.reference, mx)
    n = len(case.names)
    alone = [tuple(i == j for j in range(n)) for i in range(n)]
    but_one = [tuple(i != j for j in range(n)) for i in range(n)]
    for inner in [*alone, *but_one, (True,) * n]:
        for outer in [*alone, (True,) * n]:
            arrays, in_axes, out_axes = [], [], []
            for name, i, o in zip(case.names, inner, outer):
                x = case.array(name, (2,) * o + (3,) * i, mx.float32)
                # The inner axis comes last for one sample; the outer stays in front.
                arrays.append(mx.moveaxis(x, int(o), -1) if i else x)
                in_axes.append(-1 if i else None)
                out_axes.append(0 if o else None)
            nested = mlxshim.vmap(
                mlxshim.vmap(ours, in_axes=tuple(in_axes)), in_axes=tuple(out_axes)
            )
            want = loop(lambda *xs, axes=in_axes: loop(meant, xs, axes), arrays, out_axes)
            assert_close(nested(*arrays), want, mx.float32)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize("meaning", ["forward", "grad", "jvp"])
def test_half_precision(case, dtype, meaning, lowering):
    make = MEANINGS[meaning]
    ours, meant = make(case, case.call, mlxshim), make(case, case.reference, mx)
    arrays, axes = arguments(case, (True,) * len(case.names), 0, dtype)
    got = mlxshim.vmap(ours, in_axes=tuple(axes))(*arrays)
    assert got[0].dtype == (dtype if meaning != "vjp" else mx.float32)
    assert_close(got, loop(meant, arrays, axes), dtype)


@pytest.mark.parametrize("meaning", list(MEANINGS))
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_without_vmap(case, meaning, lowering):
    make = MEANINGS[meaning]
    arrays, _ = arguments(case, (False,) * len(case.names), 0)
    if meaning == "forward":
        return  # no transform of ours takes part
    got = make(case, case.call, mlxshim)(*arrays)
    assert_close(got, make(case, case.reference, mx)(*arrays), mx.float32)


def test_mixed_dtypes_promote_as_in_mlx(lowering):
    q, k, v = (mx.random.normal((2, 1, 2, 4, 8)) for _ in range(3))
    half = k.astype(mx.float16)
    case = Case("mixed", heads=2, kv_heads=2, batch=1, q_length=4, k_length=4)
    got = mlxshim.vmap(case.call)(q, half, v)
    assert got.dtype == mx.float32
    assert_close([got], loop(lambda *xs: [case.call(*xs)], [q, half, v], [0, 0, 0]), mx.float32)


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16], ids=str)
def test_a_row_that_sees_nothing_is_what_mlx_makes_of_it(dtype, lowering):
    q, k, v = (mx.random.normal((3, 1, n, 4, 8)).astype(dtype) for n in (4, 2, 2))
    mask = mx.random.uniform(shape=(3, 4, 4)) < 0.5
    mask = mx.concatenate([mx.zeros((3, 1, 4), mx.bool_), mask[:, 1:]], axis=1)
    case = Case("nothing", mask="bool", mask_shape=(4, 4))
    got = mlxshim.vmap(case.call)(q, k, v, mask)
    want = loop(lambda *xs: [case.call(*xs)], [q, k, v, mask], [0] * 4)
    assert_close([got], want, dtype)


def test_captured_arrays_keep_their_level(lowering):
    """A mapped K/V, mask and sinks reach the inner function through its closure."""
    case = Case("closure", sinks=True, mask="additive", mask_shape=(5, 5))
    arrays, _ = arguments(case, (True,) * 5, 0)
    q, *others = arrays

    def outer(q, *others):
        return mlxshim.vmap(lambda scale: case.call(q * scale, *others))(mx.arange(1.0, 3.0))

    got = mlxshim.vmap(outer)(q, *others)
    scales = mx.arange(1.0, 3.0)
    want = loop(
        lambda q, *rest: [mx.stack([case.reference(q * s, *rest) for s in scales])],
        arrays,
        [0] * 5,
    )
    assert_close([got], want, mx.float32)


def test_zero_stride_cotangent_under_compile(lowering):
    case = Case("sum", mask="causal")
    arrays, axes = arguments(case, (True,) * 3, 0)
    g = mx.compile(mlxshim.vmap(mlxshim.grad(lambda *xs: case.call(*xs).sum(), argnums=[0, 1, 2])))
    want = loop(mx.grad(lambda *xs: case.reference(*xs).sum(), argnums=[0, 1, 2]), arrays, axes)
    assert_close(list(g(*arrays)), want, mx.float32)


def test_mlx_derivatives_inside_our_vmap(lowering):
    case = Case("mixed-transforms", mask="causal")
    arrays, axes = arguments(case, (True,) * 3, 0)
    g = mx.grad(loss(case, case.call), argnums=[0, 1, 2])
    want = loop(mx.grad(loss(case, case.reference), argnums=[0, 1, 2]), arrays, axes)
    assert_close(mlxshim.vmap(g)(*arrays), want, mx.float32)


def test_stream_keyword(lowering):
    case = Case("stream")
    arrays, axes = arguments(case, (True,) * 3, 0)

    def on_cpu(q, k, v):
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=0.4, stream=mx.cpu)

    got = mlxshim.vmap(on_cpu)(*arrays)
    assert_close([got], loop(lambda *xs: [case.reference(*xs)], arrays, axes), mx.float32)


# What must never happen ------------------------------------------------------------------------


def _poison(name):
    def poisoned(*args, **kwargs):
        raise AssertionError(f"{name} was called")

    return poisoned


@pytest.mark.parametrize("meaning", list(MEANINGS))
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_no_broadcasting_matmul_in_a_trace(case, meaning, lowering, monkeypatch):
    """Clang builds up to 0.31.1 die in these; a trace of attention must contain none of them."""
    matmul, calls = mx.matmul, []

    def strict(a, b, **kwargs):
        calls.append((a.shape, b.shape))
        assert a.shape[:-2] == b.shape[:-2], f"broadcasting matmul of {a.shape} and {b.shape}"
        return matmul(a, b, **kwargs)

    monkeypatch.setattr(mx, "matmul", strict)
    monkeypatch.setattr(attention_plain, "matmul", strict)
    monkeypatch.setattr(mx, "take_along_axis", _poison("take_along_axis"))
    monkeypatch.setattr(mx, "put_along_axis", _poison("put_along_axis"))
    arrays, axes = arguments(case, (True,) * len(case.names), 0)
    ours = MEANINGS[meaning](case, case.call, mlxshim)
    mx.eval(mlxshim.vmap(ours, in_axes=tuple(axes))(*arrays))
    assert calls, "the decomposition was not reached: this test would prove nothing"


@pytest.mark.parametrize("case, mapped, meaning", subset_params(("forward", "grad")))
def test_the_raw_operation_is_never_mapped(case, mapped, meaning, lowering, monkeypatch):
    """MLX's own node, with a batching rule that fails: no transform of ours may reach it."""
    raw = mx.fast.scaled_dot_product_attention
    reached = []

    def poisoned(q, k, v, *, scale, mask=None, sinks=None, stream=None, **newer):
        extra = [x for x in (mask, sinks) if isinstance(x, mx.array)]

        def call(q, k, v, *extra):
            extra = list(extra)
            given = extra.pop(0) if isinstance(mask, mx.array) else mask
            given_sinks = extra.pop(0) if sinks is not None else None
            return raw(q, k, v, scale=scale, mask=given, sinks=given_sinks, **newer)

        def vmap(arrays, axes):
            raise AssertionError("the raw operation was mapped")

        def vjp(primals, cotangent, output):
            return mx.vjp(call, list(primals), [cotangent])[1]

        reached.append(q.shape)
        node = mx.custom_function(call)
        node.vmap(vmap)
        node.vjp(vjp)
        return node(q, k, v, *extra)

    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", poisoned)
    arrays, axes = arguments(case, mapped, 1)
    ours = MEANINGS[meaning](case, case.call, mlxshim)
    got = mlxshim.vmap(ours, in_axes=tuple(axes))(*arrays)
    want = loop(MEANINGS[meaning](case, case.reference, mx), arrays, axes)
    assert_close(got, want, mx.float32)
    one_of_kv = mapped[1] != mapped[2] and case.batch != 1
    if lowering == "fused" and not one_of_kv:
        assert reached, "the lowering was not reached: this test would prove nothing"


def test_unmapped_keys_and_values_are_not_copied(monkeypatch):
    """The fused call gets the caller's own K and V, not one for each sample."""
    monkeypatch.setattr(rules, "_fuses", lambda *_: True)
    raw, shapes = mx.fast.scaled_dot_product_attention, []

    def recorder(q, k, v, **kwargs):
        shapes.append((k.shape, v.shape))
        return raw(q, k, v, **kwargs)

    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", recorder)
    for case in CASES:
        shared = (True, False, False, *(True,) * (len(case.names) - 3))
        arrays, axes = arguments(case, shared, 0)
        shapes.clear()
        mx.eval(mlxshim.vmap(case.call, in_axes=tuple(axes))(*arrays))
        assert shapes == [(arrays[1].shape, arrays[2].shape)], case.name


# Bad input -------------------------------------------------------------------------------------

BAD = {
    "rank": ((2, 5, 8), (1, 2, 5, 8), (1, 2, 5, 8), None),
    "heads": ((1, 4, 5, 8), (1, 3, 5, 8), (1, 3, 5, 8), None),
    "kv heads differ": ((1, 4, 5, 8), (1, 2, 5, 8), (1, 4, 5, 8), None),
    "batch": ((2, 4, 5, 8), (1, 2, 5, 8), (1, 2, 5, 8), None),
    "head dim": ((1, 4, 5, 8), (1, 2, 5, 6), (1, 2, 5, 8), None),
    "key and value length": ((1, 4, 5, 8), (1, 2, 5, 8), (1, 2, 4, 8), None),
    "mask does not broadcast": ((1, 4, 5, 8), (1, 2, 5, 8), (1, 2, 5, 8), (3, 5)),
    "mask rank": ((1, 4, 5, 8), (1, 2, 5, 8), (1, 2, 5, 8), (1, 1, 1, 5, 5)),
}


@pytest.mark.parametrize("what", list(BAD))
def test_bad_shapes_are_refused_at_the_call(what, lowering):
    *shapes, mask = BAD[what]
    arrays = [mx.random.normal((2, *s)) for s in shapes]
    mask = None if mask is None else mx.random.normal(mask)

    def call(q, k, v):
        with pytest.raises(ValueError, match=r"scaled_dot_product_attention|broadcast|matmul"):
            mx.fast.scaled_dot_product_attention(q, k, v, scale=1.0, mask=mask)
        raise RuntimeError("reached")

    with pytest.raises(RuntimeError, match="reached"):
        mlxshim.vmap(call)(*arrays)


@pytest.mark.parametrize(
    "keywords, error",
    [
        ({"mask": "diagonal"}, ValueError),
        ({"mask": 3}, TypeError),
        ({"sinks": mx.zeros((3,))}, ValueError),
        ({"unheard_of": True}, TypeError),
    ],
)
def test_bad_keywords_are_refused_with_the_class_that_mlx_has(keywords, error, lowering):
    q, k, v = (mx.random.normal((2, 1, 2, 4, 8)) for _ in range(3))

    def call(q, k, v):
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=1.0, **keywords)

    with pytest.raises(error):
        call(q[0], k[0], v[0])
    with pytest.raises(error):
        mlxshim.vmap(call)(q, k, v)


def test_integers_are_refused(lowering):
    q = mx.ones((2, 1, 2, 4, 8), mx.int32)
    with pytest.raises(ValueError, match="type"):
        mlxshim.vmap(lambda x: mx.fast.scaled_dot_product_attention(x, x, x, scale=1.0))(q)


def test_plain_grad_of_a_ragged_length_is_padded(monkeypatch):
    """On CUDA a plain gradient is brought to the kernel as well; its derivatives stay MLX's own."""
    monkeypatch.setattr(rules, "_gpu", lambda stream=None: True)
    monkeypatch.setattr(rules, "padding", to_four)
    lengths = []
    raw = mx.fast.scaled_dot_product_attention

    def spy(q, k, *args, **kwargs):
        lengths.append((q.shape[2], k.shape[2]))
        return raw(q, k, *args, **kwargs)

    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", spy)
    for case in CASES:
        arrays = [case.array(n, (), mx.float32) for n in case.names]
        numbers = case.floating()
        got = mlxshim.grad(loss(case, case.call), argnums=numbers)(*arrays)
        want = mx.grad(loss(case, case.reference), argnums=numbers)(*arrays)
        assert_close(list(got), list(want), mx.float32)
    whole = {(q, k) for q, k in lengths if q % 4 == k % 4 == 0}
    assert {(8, 8), (4, 8)} & whole and len(whole) < len(set(lengths)), set(lengths)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
@pytest.mark.parametrize("blind", [False, True], ids=["", "blind-row"])
def test_the_written_backward_pass_is_the_derivative(case, blind):
    arrays = [case.array(n, (), mx.float32) for n in case.names]
    if blind:
        if case.mask != "bool":
            pytest.skip("no mask to blind a row with")
        arrays[3] = mx.logical_and(arrays[3], mx.arange(arrays[3].shape[-1]) < 0)
    form = {"scale": 0.4, "causal": case.mask == "causal", "has_mask": "mask" in case.names}
    cotangent = mx.random.normal((case.batch, case.heads, case.q_length, case.value_dim))
    got = attention_plain.decompose_vjp(*arrays, cotangent, **form)
    _, want = mx.vjp(
        lambda *qkv: attention_plain.decompose(*qkv, *arrays[3:], **form), arrays[:3], [cotangent]
    )
    assert_close(got, want, mx.float32)
