"""What a vmap learns from its own traces: it may save work, and must never change a number."""

from __future__ import annotations

import functools

import mlx.core as mx
import pytest

import mlxshim
from mlxshim.core.primitive import Primitive
from mlxshim.rules import _devices, attention
from mlxshim.testing import loop

CALLS = 6


class Cube:
    """x^3 as a primitive that counts how often its value is built."""

    def __init__(self) -> None:
        self.built = self.lowered = 0

        def value(x, *, scale):
            self.built += 1
            return [scale * x * x * x]

        def lowering(x, *, scale):
            self.lowered += 1
            return [scale * x * x * x]

        def batch(size, arrays, axes, *, scale):
            return self.primitive(*arrays, scale=scale), list(axes)

        def vjp(primals, cotangents, outputs, *, scale):
            return [3 * scale * cotangents[0] * primals[0] * primals[0]]

        self.primitive = Primitive(
            "cube", decomposition=value, lowering=lowering, batch=batch, vjp=vjp
        )

    def __call__(self, x: mx.array, scale: float = 1.0) -> mx.array:
        return self.primitive(x, scale=scale)[0]


def close(got: mx.array, want: mx.array) -> bool:
    return got.shape == want.shape and bool(mx.allclose(got, want, rtol=1e-5, atol=1e-5))


@pytest.mark.parametrize(
    "transform", ["vmap", "vmap(grad)", "vmap(vmap)", "vmap(jvp)", "grad(vmap)"]
)
def test_values_are_built_no_more(transform):
    cube = Cube()
    f = {
        "vmap": mlxshim.vmap(lambda x: cube(x) + cube(cube(x), 0.5)),
        "vmap(grad)": mlxshim.vmap(mlxshim.grad(lambda x: (cube(x) ** 2).sum())),
        "vmap(vmap)": mlxshim.vmap(mlxshim.vmap(lambda x: cube(cube(x), 0.5))),
        "vmap(jvp)": mlxshim.vmap(lambda x: mlxshim.jvp(lambda y: cube(y, 2.0), [x], [x])[1][0]),
        "grad(vmap)": mlxshim.grad(lambda x: mlxshim.vmap(cube)(x).sum()),
    }[transform]

    def want(x):
        return {
            "vmap": x**3 + 0.5 * x**9,
            "vmap(grad)": 6 * x**5,
            "vmap(vmap)": 0.5 * x**9,
            "vmap(jvp)": 6 * x**3,
            "grad(vmap)": 3 * x**2,
        }[transform]

    x = mx.random.uniform(0.5, 1.0, (3, 4))
    for _ in range(CALLS):
        assert close(f(x), want(x))
    before = cube.built
    assert close(f(x), want(x))
    if transform in ("vmap", "vmap(grad)"):
        assert cube.built == before, "a value that is thrown away was built again"
    for shape in ((5, 4), (3, 2), (3, 4)):  # other shapes are other traces
        y = mx.random.uniform(0.5, 1.0, shape)
        assert close(f(y), want(y))


def test_what_is_unmapped_stays_unmapped():
    cube, shared = Cube(), mx.array([2.0, 3.0])
    f = mlxshim.vmap(lambda x: (cube(x), cube(shared)), out_axes=(0, None))
    x = mx.random.normal((3, 2))
    for _ in range(CALLS):
        mapped, unmapped = f(x)
        assert close(mapped, x**3) and close(unmapped, shared**3)


@pytest.mark.parametrize("differentiated", [False, True])
def test_a_call_that_was_mapped_and_is_no_more(differentiated):
    """It looks like the noted one in everything but that."""
    cube, shared, use_shared = Cube(), mx.array([2.0, 3.0]), False

    def f(x):
        y = shared + 0.0 if use_shared else x
        if differentiated:
            return x + mlxshim.grad(lambda y: cube(y).sum())(y)
        return x + cube(y)

    mapped, x = mlxshim.vmap(f), mx.random.normal((3, 2))
    for use_shared in [False] * CALLS + [True] * 3 + [False] * 2 + [True]:
        y = mx.broadcast_to(shared, x.shape) if use_shared else x
        assert close(mapped(x), x + (3 * y**2 if differentiated else y**3))


def test_a_trace_that_differs_in_length_and_static_arguments():
    cube = Cube()
    depth, scale = 1, 1.0

    def f(x):
        for _ in range(depth):
            x = cube(x, scale)
        return x.sum() if depth % 2 else mx.stack([x.sum(), x.max()])

    mapped, x = mlxshim.vmap(f), mx.random.uniform(0.5, 1.0, (3, 2))
    forms = [(1, 1.0)] * 5 + [(2, 1.0)] * 3 + [(3, 0.5)] * 3 + [(1, 2.0), (2, 1.0)]
    for form in forms:
        depth, scale = form
        assert close(mapped(x), mx.stack([f(row) for row in x]))


def test_an_error_in_a_trace_that_learns():
    cube, fails = Cube(), False

    def f(x):
        y = cube(x)
        if fails:
            raise KeyError("on purpose")
        return cube(y)

    mapped, x = mlxshim.vmap(f), mx.random.uniform(0.5, 1.0, (3, 2))
    for fails in (False, True, True, False, True, False, False):
        if fails:
            with pytest.raises(KeyError):
                mapped(x)
        else:
            assert close(mapped(x), x**9)


def test_compiled_before_and_after():
    cube = Cube()
    mapped, x = mlxshim.vmap(mlxshim.grad(lambda x: cube(x).sum())), mx.random.normal((3, 2))
    compiled = mx.compile(mapped)
    for f in (compiled, mapped, mapped, compiled, mapped, mapped, compiled):
        assert close(f(x), 3 * x**2)
    assert close(mx.compile(mapped)(x), 3 * x**2)


def test_chunks_share_a_plan():
    cube, x = Cube(), mx.random.normal((10, 2))
    mapped = mlxshim.vmap(cube, chunk_size=3)
    for _ in range(3):
        assert close(mapped(x), x**3)


@pytest.mark.parametrize("mapped", [(True, True), (True, False), (False, True)])
def test_a_layer_on_a_gpu(monkeypatch, mapped):
    """Norm, rotation and attention as they are traced for a GPU, over many traces."""
    monkeypatch.setattr(_devices, "gpu", lambda stream=None: True)
    monkeypatch.setattr(attention, "_fuses", lambda arrays, static, stack: "jvp" not in stack)
    w, x = mx.random.normal((8,)), mx.random.normal((3, 1, 4, 5, 8))

    def loss(w, x):
        y = mx.fast.rms_norm(x, w, 1e-5)
        q = mx.fast.rope(y, 8, traditional=False, base=1e4, scale=1.0, offset=0)
        k = mx.fast.layer_norm(x[:, :2], w, w, 1e-5)
        out = mx.fast.scaled_dot_product_attention(q, k, y[:, 2:], scale=0.3, mask="causal")
        return (out * out).sum()

    arguments = (mx.random.normal((3, 8)) if mapped[0] else w, x if mapped[1] else x[0])
    axes = tuple(0 if m else None for m in mapped)
    f = mlxshim.vmap(mlxshim.grad(loss, argnums=(0, 1)), in_axes=axes)
    one = mx.grad(loss, argnums=[0, 1])
    samples = [[a[i] if m else a for a, m in zip(arguments, mapped)] for i in range(3)]
    want = [mx.stack(column) for column in zip(*(one(*sample) for sample in samples))]
    for _ in range(4):
        for got, expected in zip(f(*arguments), want):
            assert bool(mx.allclose(got, expected, rtol=1e-3, atol=1e-3))


def test_a_call_in_other_words_is_another_call(monkeypatch):
    """One vmap, whose calls differ from time to time in what no array shows."""
    monkeypatch.setattr(_devices, "gpu", lambda *_: True)
    monkeypatch.setattr(attention, "_gpu", lambda *_: True)
    q = mx.random.normal((3, 1, 4, 6, 16)).astype(mx.float16)
    k, v = (mx.random.normal((3, 1, 2, 6, 16)).astype(mx.float16) for _ in range(2))
    mask = mx.random.normal((3, 4, 6, 6)).astype(mx.float16)
    words = {"scale": 0.5, "mask": None}

    def one(q, k, v, mask):
        extra = mask if words["mask"] == "array" else words["mask"]
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=words["scale"], mask=extra)

    mapped = mlxshim.vmap(one)
    derived = mlxshim.grad(lambda *xs: (mapped(*xs).astype(mx.float32) ** 2).sum())

    def by_loop(q):
        outs = [one(*xs).astype(mx.float32) for xs in zip(q, k, v, mask)]
        return sum((out**2).sum() for out in outs)

    told: list[bool] = []

    def again(*asked, known=Primitive.again):
        found = known(*asked)
        told.append(found is not None)
        return found

    monkeypatch.setattr(Primitive, "again", staticmethod(again))
    for words["scale"], words["mask"] in [
        *[(0.5, None)] * 5, (0.25, None), (0.5, "causal"), (0.5, "array"), *[(0.5, None)] * 2,
        *[(0.5, "array")] * 6, (0.25, "array"),
    ]:  # fmt: skip
        got = mapped(q, k, v, mask)
        want = mx.stack([one(*xs) for xs in zip(q, k, v, mask)])
        assert mx.allclose(got, want, rtol=2e-2, atol=2e-2), words
        got = derived(q, k, v, mask)
        want = mx.grad(by_loop)(q)
        assert mx.allclose(got, want, rtol=5e-2, atol=5e-2), words
    assert any(told) and not all(told)
    told.clear()
    with mlxshim.attention_budget(0):
        mapped(q, k, v, mask)
    assert told and not any(told)


def _quantized(x, w, s, i, turn):
    return mx.quantized_matmul(x, w[0], s[0], turn * s[0], group_size=32)


def _of_other_form(x, w, s, i, turn):
    part = x[..., :5] if turn % 2 else x
    return mx.quantized_matmul(part, w[0], s[0], s[0], turn % 2 == 0, group_size=32)


def _gathered(x, w, s, i, turn):
    biases = s if turn % 2 else 2 * s
    return mx.gather_qmm(x, w, s, biases, rhs_indices=i, group_size=32)


def _either_side(x, w, s, i, turn):
    given = {"lhs_indices" if turn % 2 else "rhs_indices": i % 2}
    return mx.gather_qmm(mx.stack([x, 2 * x]), w[:2], s[:2], s[:2], **given, group_size=32)


def _norms(x, w, s, i, turn):
    y = mx.fast.rms_norm(x, None if turn % 2 else x[0], 0.1 * (1 + turn))
    return mx.fast.layer_norm(y, x[1], None, 1e-3) + mx.fast.layer_norm(y, None, x[1], 1e-3)


@pytest.mark.parametrize("fun", [_quantized, _of_other_form, _gathered, _either_side, _norms])
@pytest.mark.parametrize(
    "place", [(0, None, None, None), (0, 0, 0, 0), (None, 0, None, None)], ids=str
)
def test_calls_that_are_known_are_those_that_are_asked_for(fun, place, monkeypatch):
    monkeypatch.setattr(_devices, "gpu", lambda stream=None: True)  # else norms are MLX's own
    packed = mx.random.randint(0, 2**31 - 1, (3, 4, 5, 8)).astype(mx.uint32)
    arrays = [mx.random.normal((3, 2, 64)), packed, mx.random.normal((3, 4, 5, 2))]
    arrays.append(mx.random.randint(0, 4, (3, 2)).astype(mx.uint32))
    arrays = [x if axis == 0 else x[0] for x, axis in zip(arrays, place)]
    turn = 0
    mapped = mlxshim.vmap(lambda *xs: fun(*xs, turn), in_axes=place)
    for turn in (0, 0, 0, 0, 0, 1, 2, 0, 3):
        got = mapped(*arrays)
        want = loop(functools.partial(fun, turn=turn), place)(*arrays)
        assert close(got, want), turn


def test_a_vector_stays_one_in_nested_vmaps():
    pack = mx.quantize(mx.random.normal((32, 64)), group_size=32, bits=4)

    def square(v: mx.array, _: mx.array) -> mx.array:
        y = mx.quantized_matmul(v, *pack, group_size=32, bits=4)
        return y @ y

    vs = mx.random.normal((3, 64))
    nested = mlxshim.vmap(mlxshim.vmap(square, in_axes=(0, None)), in_axes=(None, 0))
    got = nested(vs, mx.zeros(2))
    want = mx.stack([square(v, v) for v in vs])
    assert mx.allclose(got, mx.stack([want, want]), rtol=1e-4)
