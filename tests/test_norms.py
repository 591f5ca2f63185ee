"""Norms, positions and losses as on a GPU: the rules that the CPU has no reason to take."""

from __future__ import annotations

import io
import re
from collections import Counter

import mlx.core as mx
import mlx.nn as nn
import pytest
from conformance.case import load

import mlxshim
from mlxshim.core import levels
from mlxshim.rules import _devices, norms
from mlxshim.testing import check, loop

FAMILIES = ("fast.rms_norm", "fast.layer_norm", "fast.rope", "fast.cross_entropy")
CASES = {name: c for name, c in load().items() if name.split("/")[0] in FAMILIES}
ROPE = {"traditional": False, "base": 10.0, "scale": 1.0}

pytestmark = pytest.mark.usefixtures("as_on_a_gpu")


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_devices, "gpu", lambda: True)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes that fused calls see outside every trace; each such call is one node, a Sin."""
    shapes: list[tuple[int, ...]] = []

    def kernel(x: mx.array, *_: object, **__: object) -> mx.array:
        if not levels.active():
            shapes.append(x.shape)
        return mx.sin(x)

    for name in ("rms_norm", "layer_norm", "rope"):
        monkeypatch.setattr(mx.fast, name, kernel)
    return shapes


def normal(*shape: int) -> mx.array:
    x = mx.random.normal(shape)
    mx.eval(x)  # so that drawing it is not among the operations
    return x


def operations(*outputs: mx.array) -> dict[str, int]:
    """What is computed for these outputs: names of MLX's primitives, and how often each."""
    dot = io.StringIO()
    mx.export_to_dot(dot, *outputs)
    return dict(Counter(re.findall(r'label ="(\w+)", shape=rectangle', dot.getvalue())))


@pytest.mark.parametrize("name", CASES)
def test_the_rules_equal_the_loop(name: str):
    case = CASES[name]
    assert check(case.fun, *case.arrays, **case.options) > 0


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_norms_are_one_fused_call_and_nothing_else(kernels, axis):
    x, w = normal(4, 3, 2, 8), mx.ones(8)
    y = mlxshim.vmap(lambda x: mx.fast.rms_norm(x, w, 1e-5), axis, axis)(x)
    assert operations(y) == {"Sin": 1}
    y = mlxshim.vmap(lambda x: mx.fast.layer_norm(x, w, w, 1e-5), axis, axis)(x)
    assert operations(y) == {"Sin": 1}
    assert kernels == [x.shape] * 2


def test_a_mapped_weight_is_one_multiply_after_one_row(kernels):
    x, w = normal(3, 8), normal(5, 8)
    y = mlxshim.vmap(lambda w: mx.fast.rms_norm(x, w, 1e-5))(w)
    assert y.shape == (5, 3, 8) and kernels == [(3, 8)]
    counts = operations(y)
    assert counts["Sin"] == counts["Multiply"] == 1
    assert counts.keys() <= {"Sin", "Multiply", "ExpandDims", "Broadcast"}


def test_nested_levels_are_one_fused_call(kernels):
    x, w = normal(4, 3, 2, 8), mx.ones(8)
    y = mlxshim.vmap(mlxshim.vmap(lambda x: mx.fast.rms_norm(x, w, 1e-5)))(x)
    assert operations(y) == {"Sin": 1} and kernels == [x.shape]


def test_rope_is_one_fused_call_and_nothing_else(kernels):
    x, offsets = normal(4, 1, 3, 5, 8), mx.arange(4)
    y = mlxshim.vmap(lambda x: mx.fast.rope(x, 8, **ROPE, offset=3))(x)
    assert operations(y) == {"Flatten": 1, "Sin": 1, "Unflatten": 1}
    y = mlxshim.vmap(lambda x, i: mx.fast.rope(x, 8, **ROPE, offset=i))(x, offsets)
    assert operations(y) == {"Flatten": 1, "Sin": 1, "Unflatten": 1}
    assert kernels == [(4, 3, 5, 8)] * 2


def test_the_gradient_of_an_unmapped_weight_is_per_sample():
    x, w = normal(4, 3, 8), normal(8)

    def loss(w, x):
        return mx.square(mx.fast.rms_norm(x, w, 1e-5)).sum()

    got = mlxshim.vmap(mlxshim.grad(loss), in_axes=(None, 0))(w, x)
    assert mx.allclose(got, loop(mx.grad(loss), (None, 0))(w, x), atol=1e-4)


@pytest.mark.skipif(mx.metal.is_available(), reason="Metal takes a cotangent of any strides")
@pytest.mark.parametrize("mapped", [False, True])
def test_a_cotangent_of_stride_zero_is_copied_before_cuda_writes_through_it(mapped):
    x = normal(4, 2, 3, 5, 8)[:, :, :, :, ::2]

    def loss(x):
        return mx.fast.rope(x, 4, **ROPE, offset=3).sum()

    got = (mlxshim.vmap(mlxshim.grad(loss)) if mapped else mlxshim.grad(loss))(x)
    with mx.stream(mx.cpu):
        want = mx.stack([mx.grad(loss)(y) for y in x]) if mapped else mx.grad(loss)(x)
    assert operations(got)["Contiguous"] == 1
    assert mx.allclose(got, want, atol=1e-5)


def test_samples_that_differ_by_their_offset_only_are_copies():
    x, offsets = normal(1, 3, 5, 8), mx.arange(4)
    y = mlxshim.vmap(lambda i: mx.fast.rope(x, 8, **ROPE, offset=i))(offsets)
    assert operations(y)["Contiguous"] == 1


@pytest.mark.parametrize(
    "module",
    [nn.RMSNorm(8), nn.LayerNorm(8), nn.LayerNorm(8, bias=False), nn.RoPE(8), nn.InstanceNorm(8)],
    ids=lambda m: type(m).__name__,
)
def test_modules(module):
    x = normal(4, 2, 3, 8)
    assert mx.allclose(mlxshim.vmap(module)(x), loop(module, (0,))(x), atol=1e-5)
    grad = mx.grad(lambda x: mx.sin(module(x)).sum())
    got = mlxshim.vmap(mlxshim.grad(lambda x: mx.sin(module(x)).sum()))(x)
    assert mx.allclose(got, loop(grad, (0,))(x), atol=1e-4)


def test_a_stream_is_taken():
    x, w = normal(4, 3, 8), mx.ones(8)
    got = mlxshim.vmap(lambda x: mx.fast.rms_norm(x, w, eps=1e-5, stream=mx.cpu))(x)
    assert mx.allclose(got, mx.fast.rms_norm(x, w, 1e-5), atol=1e-6)
    x = normal(4, 2, 3, 8)
    got = mlxshim.vmap(lambda x: mx.fast.rope(x, 8, **ROPE, offset=0, stream=mx.cpu))(x)
    assert mx.allclose(got, mx.fast.rope(x, 8, **ROPE, offset=0), atol=1e-6)


def test_what_mlx_refuses_is_refused_at_the_call_in_its_words():
    x = normal(4, 2, 3, 8)
    for wrong, said in (
        (lambda x: mx.fast.rms_norm(x, mx.ones(7), 1e-5), "rms_norm.*same size"),
        (lambda x: mx.fast.layer_norm(x, mx.ones((8, 1)), None, 1e-5), "layer_norm.*1 dimension"),
        (lambda x: mx.fast.rope(x, 7, **ROPE, offset=0), "dims must be even"),
        (lambda x: mx.fast.rope(x[0], 8, **ROPE, offset=0), "at least 3 dimensions"),
        (lambda x: mx.fast.rope(x, 8, **ROPE, offset=mx.zeros((3,))), "offset"),
        (lambda x: mx.fast.rope(x, 8, **ROPE, offset=1.5), "offset must be an integer"),
    ):
        with pytest.raises(ValueError, match=said):
            mlxshim.vmap(wrong)(x)


@pytest.mark.parametrize("width, written", [(6, True), (8, False)])
@pytest.mark.parametrize("mapped", [False, True], ids=["one", "vmap"])
def test_a_width_that_cuda_misreads_has_its_gradient_written_out(
    monkeypatch, width, written, mapped
):
    called, plain = [], norms._plain_vjp
    monkeypatch.setattr(norms, "_plain_vjp", lambda *a, **k: called.append(1) or plain(*a, **k))
    x, w, b = normal(4, 3, width), normal(width), normal(width)
    c = normal(3, width)

    def loss(x, w, b):
        return (mx.fast.layer_norm(x, w, b, 1e-5) * c).sum()

    grads = mlxshim.grad(loss, argnums=(0, 1, 2))
    got = mlxshim.vmap(grads, in_axes=(0, None, None))(x, w, b) if mapped else grads(x[0], w, b)
    assert bool(called) is written
    with mx.stream(mx.cpu):
        one = mx.grad(loss, argnums=[0, 1, 2])
        want = loop(lambda x: list(one(x, w, b)), (0,))(x) if mapped else one(x[0], w, b)
    for g, e in zip(got, want):
        assert mx.allclose(g, e, atol=1e-5), (g, e)
