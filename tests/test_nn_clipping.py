"""Norms and clipped sums against the gradients of MLX's own nn.value_and_grad, sample by sample."""

from __future__ import annotations

import math

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map
from nn_models import CASES, LoRA, close, close_trees, dense_case, loop, mixed_case, snapshot
from nn_models import squares as squares_loss

from mlxshim.nn import (
    _parts,
    _tape,
    clipped_grad,
    clipping,
    per_sample_norms,
    per_sample_value_and_grad,
)


def norms_of(grads):
    """{name: (samples,)}"""
    return {n: mx.linalg.norm(g.reshape(len(g), -1), axis=1) for n, g in grads.items()}


def flat_norm(grads):
    return mx.sqrt(sum(n.square() for n in norms_of(grads).values()))


def clipped(grads, factors):
    def weigh(g, f):
        return (g * f.reshape(-1, *(1 for _ in g.shape[1:]))).sum(axis=0)

    return {n: weigh(g, factors[n]) for n, g in grads.items()}


def flat_clip(grads, bound):
    factor = mx.minimum(1, bound / flat_norm(grads))
    return clipped(grads, dict.fromkeys(grads, factor))


@pytest.fixture(params=["by rows", "by gradients", "kept", "as it comes"])
def way(request, monkeypatch):
    """Each way to a norm forced, and the choice."""
    if request.param != "as it comes":
        monkeypatch.setattr(_tape, "KEPT_TIMES", math.inf if request.param == "kept" else 0)
        by_rows = request.param == "by rows"
        monkeypatch.setattr(_parts, "_prefers_rows", lambda parameter: by_rows)
    if request.param == "by gradients":  # one sample at a time
        monkeypatch.setattr(_parts, "HELD", 1)
        monkeypatch.setattr(_parts, "HELD_SHARE", 0)
    return request.param


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("form", ["plain", "compiled", "chunked"])
def test_as_the_loop(name, form, way):
    if form == "compiled" and (name != "mixed" or way == "as it comes"):
        pytest.skip("compiling takes seconds on a CPU")
    model, loss, data = CASES[name]()
    before = snapshot(model)
    losses, grads = loop(model, loss, data)
    bound = float(flat_norm(grads).mean())  # some are clipped, some are not
    chunk_size = 3 if form == "chunked" else None

    def both(*data):
        found = clipped_grad(model, loss, bound, chunk_size=chunk_size)(model, *data)
        return found, per_sample_norms(model, loss, chunk_size=chunk_size)(model, *data)

    before = snapshot(model)
    got, (again, norms) = (mx.compile(both) if form == "compiled" else both)(*data)
    assert snapshot(model) == before
    close(got[0], losses)
    close(again, losses)
    close(got[2], flat_norm(grads), 1e-4)
    close(norms, flat_norm(grads), 1e-4)
    close_trees(got[1], flat_clip(grads, bound), 1e-4)


@pytest.mark.parametrize("name", CASES)
def test_per_layer(name, way):
    model, loss, data = CASES[name]()
    _, grads = loop(model, loss, data)
    want = norms_of(grads)
    _, norms = per_sample_norms(model, loss, per_layer=True)(model, *data)
    close_trees(norms, want, 1e-4)
    bound = 0.5 * float(flat_norm(grads).mean())
    share = bound / math.sqrt(len(grads))
    _, got, norms = clipped_grad(model, loss, bound, per_layer=True)(model, *data)
    close_trees(norms, want, 1e-4)
    factors = {n: mx.minimum(1, share / mx.maximum(v, 1e-30)) for n, v in want.items()}
    close_trees(got, clipped(grads, factors), 1e-4)
    bounds = tree_map(lambda x: 0.1 * (1 + x.ndim), model.trainable_parameters())
    _, got, _ = clipped_grad(model, loss, bounds, per_layer=True)(model, *data)
    factors = {
        n: mx.minimum(1, 0.1 * grads[n].ndim / mx.maximum(v, 1e-30)) for n, v in want.items()
    }
    close_trees(got, clipped(grads, factors), 1e-4)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_precision(dtype, way):
    model, loss, data = mixed_case()
    model.set_dtype(dtype)
    model.update(tree_map(lambda x: x.astype(mx.float32).astype(dtype), model.parameters()))
    _, got, norms = clipped_grad(model, loss, 0.5)(model, *data)
    model.set_dtype(mx.float32)
    _, grads = loop(model, loss, data)
    assert norms.dtype == mx.float32
    close(norms, flat_norm(grads), 0.03)
    want = flat_clip(grads, 0.5)
    for name, g in tree_flatten(got):
        assert g.dtype == dtype
        close(g.astype(mx.float32), want[name], 0.08)


def test_rows_that_cancel(way):
    """Two rows whose gradients are opposite: the norm is zero, not the rounding of large terms."""
    model = nn.Linear(16, 8, bias=False)
    model.set_dtype(mx.bfloat16)
    x = mx.random.normal((3, 1, 16)).astype(mx.bfloat16)
    x = mx.concatenate([x, -x, 1e-3 * mx.ones_like(x)], axis=1)
    loss = lambda m, x: (m(x) * mx.array([1.0] * 8, mx.bfloat16)).sum()  # noqa: E731
    _, norms = per_sample_norms(model, loss)(model, x)
    want = mx.full((3,), math.sqrt(16 * 8) * float(x[0, 2, 0].astype(mx.float32)))
    close(norms, want, 0.05)


def test_zero_gradients_and_no_clipping():
    model, loss, data = dense_case()
    _, grads = loop(model, loss, data)
    _, got, _ = clipped_grad(model, loss, 1e9)(model, *data)
    close_trees(got, {n: g.sum(axis=0) for n, g in grads.items()})
    _, got, norms = clipped_grad(model, lambda *a: 0 * loss(*a), 1.0)(model, *data)
    assert float(norms.max()) == 0
    assert all(float(mx.abs(g).max()) == 0 for _, g in tree_flatten(got))


def test_the_bound_may_be_an_array():
    model, loss, data = dense_case()
    fun = mx.compile(lambda c, *data: clipped_grad(model, loss, c)(model, *data)[1])
    _, grads = loop(model, loss, data)
    for bound in (0.5, 2.0):
        close_trees(fun(mx.array(bound), *data), flat_clip(grads, bound), 1e-4)


def test_no_samples():
    model, loss, data = mixed_case()
    losses, grads, norms = clipped_grad(model, loss, 1.0)(model, *(x[:0] for x in data))
    assert losses.shape == norms.shape == (0,)
    for name, g in tree_flatten(grads):
        assert float(mx.abs(g).max()) == 0, name


def test_unknown_layers_go_in_chunks(monkeypatch):
    monkeypatch.setattr(clipping, "HELD_BYTES", 0)
    monkeypatch.setattr(clipping, "HELD_TIMES", 2)
    model = LoRA()
    x = mx.random.normal((7, 2, 64))
    data, calls = (x, mx.random.normal(x.shape)), []

    def counted(*args):
        calls.append(1)
        return squares_loss(*args)

    _, got, norms = clipped_grad(model, counted, 1.0)(model, *data)
    assert len(calls) == 1 + 4  # one to find out, then two samples at a time
    _, grads = loop(model, squares_loss, data)
    close(norms, flat_norm(grads), 1e-4)
    close_trees(got, flat_clip(grads, 1.0), 1e-4)


def peak(fun, *data):
    """Bytes above what there is already, once what is compiled or kept is there."""
    if mx.default_device().type == mx.gpu:
        pytest.skip("a GPU's queue holds what is in flight (benchmarks.models)")
    mx.eval(fun(*data), *data)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(fun(*data))
    return mx.get_peak_memory() - before


def deep_case(samples=48, rows=1, dim=256, depth=6):
    layers = [layer for _ in range(depth) for layer in (nn.Linear(dim, dim), nn.Tanh())]
    model, x = nn.Sequential(*layers), mx.random.normal((samples, rows, dim))
    mx.eval(model.parameters())
    return model, (x, mx.random.normal(x.shape))


def test_gradients_are_not_held():
    """The gradients of all samples would be 48 times the parameters."""
    model, data = deep_case()
    held = sum(p.nbytes for _, p in tree_flatten(model.parameters()))
    clip = clipped_grad(model, squares_loss, 1.0)
    assert held < peak(lambda *data: clip(model, *data), *data) < 6 * held


@pytest.mark.parametrize("compiled", [False, True])
def test_memory_is_that_of_a_batch(compiled):
    # Deep, for MLX queues ten operations, whatever these hold.
    model, data = deep_case(16, 64, 128, depth=96)
    parameters = model.parameters()

    def ordinary(*data):
        found = nn.value_and_grad(model, squares_loss)(model, *data)
        model.update(parameters)  # MLX leaves its tracers in it
        return found

    clip = clipped_grad(model, squares_loss, 1.0)
    both = [ordinary, lambda *data: clip(model, *data)]
    batch, clipped = (peak(mx.compile(fun) if compiled else fun, *data) for fun in both)
    assert clipped < 1.1 * batch


def test_what_a_loss_is_made_of_is_not_held():
    """24 arrays of logits, and their cotangents, are not in memory together."""
    model = nn.Sequential(*(nn.Linear(16, 4096, bias=False) for _ in range(24)))
    loss = lambda m, x: sum(mx.logsumexp(layer(x), axis=-1).sum() for layer in m.layers)  # noqa: E731
    clip = clipped_grad(model, loss, 1.0)
    x = mx.random.normal((8, 16, 16))
    logits = 4 * 8 * 16 * 4096
    assert peak(lambda x: clip(model, x), x) < 36 * logits


def test_rows_of_norms_are_not_held(monkeypatch):
    """A chain of norms needs what it normalises, and not the cotangents of all."""
    monkeypatch.setattr(_tape._devices, "gpu", lambda *_: True)
    model = nn.Sequential(*(nn.RMSNorm(128) for _ in range(12)))
    clip = clipped_grad(model, lambda m, x: m(x).square().sum(), 1.0)
    x = mx.random.normal((8, 64, 128))
    assert peak(lambda x: clip(model, x), x) < 32 * x.nbytes


def test_gradients_that_are_small_are_made_once(monkeypatch):
    """They take no more memory than what they are made of: no product is left to do."""
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8, bias=False))
    x = mx.random.normal((5, 12, 8))
    data = x, mx.random.normal(x.shape)
    _, grads = loop(model, squares_loss, data)
    bound = float(flat_norm(grads).mean())
    monkeypatch.setattr(_parts, "product_gradient", None)
    _, got, norms = clipped_grad(model, squares_loss, bound)(model, *data)
    close(norms, flat_norm(grads), 1e-4)
    close_trees(got, flat_clip(grads, bound), 1e-4)


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16, mx.float32])
def test_weights_are_not_rounded(dtype):
    weights = mx.full((3,), 0.5 + 0.49 / 256)  # 0.5 in bfloat16
    gradients = mx.ones((3, 4, 2), dtype)
    got = _parts._sum_of_kept(gradients, weights, _parts._Halves(weights))
    close(got.astype(mx.float32), mx.full((4, 2), 1.505742).astype(dtype).astype(mx.float32), 1e-6)


def test_norms_take_turns(monkeypatch):
    """The gradients of one sample at a time."""
    monkeypatch.setattr(_parts, "HELD", 1)
    monkeypatch.setattr(_parts, "HELD_SHARE", 0)
    monkeypatch.setattr(_parts, "_prefers_rows", lambda parameter: False)
    monkeypatch.setattr(_tape, "KEPT_TIMES", 0)
    rows, dim, samples, depth = 2, 256, 16, 32
    model, data = deep_case(samples, rows, dim, depth)
    norms = per_sample_norms(model, squares_loss)
    parts = 2 * depth * 4 * samples * rows * dim
    # MLX queues ten.
    assert peak(lambda *data: norms(model, *data), *data) < parts + 14 * 4 * dim**2


@pytest.mark.parametrize("bound", [0, -1.0, "1", True, mx.ones((2,)), {"weight": 1.0}])
def test_bounds_are_checked(bound):
    with pytest.raises(ValueError, match=r"\[clipped_grad\] max_norm"):
        clipped_grad(nn.Linear(2, 2), squares_loss, bound)


def test_a_bound_is_missing():
    model, loss, data = dense_case()
    with pytest.raises(ValueError, match=r"no bound for layers\.2\.weight, layers\.2\.bias"):
        bounds = {"layers": [{"weight": 1.0, "bias": 1.0}, {}, {}]}
        clipped_grad(model, loss, bounds, per_layer=True)(model, *data)


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
@pytest.mark.parametrize("shape", [(96, 64), (64, 1024), (512, 1024), (1024, 3), (7, 5)])
def test_sums_of_squares(gpu, dtype, shape, monkeypatch):
    largest = 2 if dtype == mx.float16 else 9
    scales = 10 ** mx.random.uniform(-largest, largest, (4, *(1 for _ in shape)))
    x = (mx.random.normal((4, *shape)) * scales).astype(dtype)
    exact = np.array(x.astype(mx.float32), np.float64).reshape(4, -1)
    want = mx.array((exact**2).sum(axis=1).astype(np.float32))
    monkeypatch.setattr(_parts._devices, "gpu", lambda *_: gpu)
    # Which a CPU would take seconds to compile, and 0.31 compiles wrongly there in half precision.
    monkeypatch.setattr(_parts, "_squared", lambda x: x.astype(mx.float32).square())
    squares = _parts._sums_of_squares(x)
    got = _parts._summed([squares, squares[:, :1]]) - squares[:, 0].astype(mx.float32)
    assert got.dtype == mx.float32 and got.shape == (4,)
    # Of bfloat16 the sum of each row is rounded; those of float16 a CPU adds up one by one.
    tolerance = {mx.bfloat16: 1e-3, mx.float16: 5e-4, mx.float32: 1e-5}[dtype]
    close(got / want, mx.ones((4,)), tolerance)


def test_what_is_not_used_takes_no_memory():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(1024, 1024))
    clip = clipped_grad(model, lambda m, x: m.layers[0](x).square().sum(), 1.0)
    assert peak(lambda x: clip(model, x), mx.ones((8, 4))) < 3 * 4 * 1024**2


@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize("of", ["norms", "gradients", "clipped"])
def test_a_derivative_of_mlx_around(of, chunk_size):
    model = nn.Linear(3, 2)
    x = mx.random.normal((6, 3)) * mx.array([0.3, 0.3, 0.3, 3, 3, 3])[:, None]

    def total(s):
        def loss(model, x):
            return (s * model(x) ** 2).sum()

        functions = {
            "norms": lambda: per_sample_norms(model, loss, chunk_size=chunk_size),
            "gradients": lambda: per_sample_value_and_grad(model, loss, chunk_size=chunk_size),
            "clipped": lambda: clipped_grad(model, loss, 1.0, chunk_size=chunk_size),
        }
        found = functions[of]()(model, x)[1]
        return sum(g.square().sum() for _, g in tree_flatten([found]))

    step = 1e-2
    about = (total(mx.array(0.3 + step)) - total(mx.array(0.3 - step))) / (2 * step)
    close(mx.grad(total)(mx.array(0.3)), about, 1e-2)
