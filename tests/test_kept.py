"""Graphs that are kept: under `mx.compile` a trace may cost more, for as few nodes as by hand."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from test_norms import operations

import mlxshim
from mlxshim.core import levels, tracers
from mlxshim.core.versions import MLX, MOVED_SHAPE_BUG
from mlxshim.testing import loop

ROOT = Path(__file__).parents[1]
since_0_32 = pytest.mark.skipif(MLX < (0, 32, 0), reason="products are MLX's own before")


def normal(*shape: int) -> mx.array:
    x = mx.random.normal(shape)
    mx.eval(x)
    return x


def same(got: mx.array, want: mx.array) -> bool:
    return got.shape == want.shape and bool(mx.allclose(got, want, rtol=1e-4, atol=1e-4))


# When ------------------------------------------------------------------------------------------


def test_only_under_compile():
    seen = []

    def look(x):
        seen.append(levels.is_kept())
        return x * 2

    nested = mlxshim.vmap(lambda x: mlxshim.grad(lambda y: mlxshim.vmap(look)(y).sum())(x))
    xs = normal(2, 3, 4)
    for fun, want in (
        (mlxshim.vmap(look), False),
        (nested, False),
        (mx.compile(mlxshim.vmap(look)), True),
        (mx.compile(nested), True),
        (mx.compile(mlxshim.vmap(look, chunk_size=1)), True),
        (mlxshim.vmap(look), False),
    ):
        seen.clear()
        fun(xs)
        assert set(seen) == {want}
    assert not levels.is_kept()


def test_what_is_compiled_for_any_shapes_may_look_at_none():
    w, v, seen = normal(6, 7), normal(4, 6, 7), []

    def f(x, v):
        seen.append(levels.is_kept())
        if MLX < (0, 32, 0):  # whose products are of those shapes that it has seen
            return mx.sin(x.reshape(-1, 6))
        return mx.sin(x.reshape(-1, 6) @ w) + x @ v

    fixed = mx.compile(mlxshim.vmap(f))
    free = mx.compile(mlxshim.vmap(f), shapeless=True)
    for length in (3, 5):
        x = normal(4, 1, length, 6)
        for fun in (fixed, free):
            assert same(fun(x, v), mx.stack([f(x, v) for x, v in zip(x, v)]))
    assert seen[0] and sum(seen) == 2


def test_a_derivative_around_is_no_compile():
    w, xs, seen = normal(3, 3), normal(2, 4, 3), []

    def loss(w):
        def f(x):
            seen.append(levels.is_kept())
            return x @ w

        return mlxshim.vmap(f)(xs).sum()

    mx.grad(loss)(w)
    mlxshim.grad(loss)(w)
    assert seen and not any(seen)


@pytest.mark.parametrize("on", [True, False])
def test_the_switch_of_compilation_is_where_it_was(on):
    """The probe tells whether MLX compiles, so that this is not asked again."""
    calls = []

    @mx.compile
    def count(x):
        calls.append(None)
        return x + 1

    x = mx.ones(3)
    (mx.enable_compile if on else mx.disable_compile)()
    try:
        for _ in range(3):
            mlxshim.vmap(lambda x: x * 2)(x)
        for _ in range(3):
            count(x)
        assert len(calls) == (1 if on else 3)
    finally:
        mx.enable_compile()


@pytest.mark.parametrize("shapeless", [False, True])
def test_what_has_unmapped_parts_is_exported(tmp_path, shapeless):
    """MLX exports no custom function, which a node is that nothing has mapped."""
    x, w = normal(4, 2, 3, 5), normal(5, 6)
    c = normal(2, 3, 5)

    def grads(x):
        return mlxshim.grad(lambda x: mx.tanh(x @ w).reshape(-1).sum())(x)

    for i, f in enumerate(
        (
            lambda x: mx.tanh(x) + c.reshape(3, 10).reshape(2, 3, 5),
            lambda x: mx.tanh(x).sum() + c @ w,
            lambda x: mx.tanh(x).sum() + mx.fast.rms_norm(c, None, 1e-5),
            lambda x: (x, c, c, c),
            grads,
        )
    ):
        mapped = mlxshim.vmap(f)
        if f is grads:  # whose first cotangent is a constant, which nothing tells in a derivative
            mx.disable_compile()
        try:
            mx.export_function(str(tmp_path / f"{i}"), mapped, x, shapeless=shapeless)
        finally:
            mx.enable_compile()
        got, want = mx.import_function(str(tmp_path / f"{i}"))(x), mapped(x)
        want = want if isinstance(want, tuple) else (want,)
        assert len(got) == len(want) and all(same(y, z) for y, z in zip(got, want))


def test_an_output_of_shared_arguments_is_exported(tmp_path):
    """However often it is there, and whatever else is."""
    x, s, c = normal(4, 2), normal(2), normal(2)
    for i, f in enumerate(
        (lambda x, s: (x.sum(), s, s, mx.sin(s), c), lambda x, s: (x, s, s, mx.sin(s), c, x))
    ):
        mapped = mlxshim.vmap(f, (0, None))
        mx.export_function(str(tmp_path / f"{i}"), mapped, x, s)
        got = mx.import_function(str(tmp_path / f"{i}"))(x, s)
        want = [mx.stack(list(ys)) for ys in zip(*(f(y, s) for y in x))]
        assert len(got) == len(want) and all(same(y, z) for y, z in zip(got, want))


def test_another_stream_is_no_trace():
    """MLX's cache, which tells what a tracer is, has an entry for each default stream."""
    xs, seen = normal(2, 3, 1, 3), []

    def look(x):
        seen.append(levels.is_kept())
        return x @ mx.ones((3, 3))

    compiled = mx.compile(lambda x: mlxshim.vmap(look)(x))
    for _ in range(2):
        with mx.stream(mx.new_stream(mx.cpu)):
            assert not tracers.is_tracer(xs)
            mx.eval(mlxshim.vmap(look)(xs), compiled(xs))
            assert not tracers.in_trace()
    mx.eval(mlxshim.vmap(look)(xs))
    assert seen == [False, True, False, True, False]


def test_a_compiled_trace_takes_no_call_for_that_of_another(recwarn):
    x, w, c = normal(4, 2, 3, 5), normal(5, 6), normal(2, 3, 5)

    def f(x, shared):
        a = c if shared else x
        r, p = a.reshape(3, 10), a @ w
        more = r.sum().item() + p.sum().item() if shared else 0
        return r + more + x.reshape(3, 10), p

    shared = [False]
    g = mlxshim.vmap(lambda x: f(x, shared[0]))
    for shared[0] in (False, False, False, False, True, True, False):
        got = mx.compile(lambda x: g(x))(x)
        want = [mx.stack(list(ys)) for ys in zip(*(f(y, shared[0]) for y in x))]
        assert all(same(y, z) for y, z in zip(got, want))
    assert not recwarn.list


# Products --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16])
@pytest.mark.parametrize("lead", [(1,), (3,), (2, 3), (1, 1)])
@pytest.mark.parametrize("axes", [(0, None), (1, None), (-1, None), (None, 0), (0, 1), (-1, -1)])
def test_products(lead, axes, dtype):
    if MOVED_SHAPE_BUG and axes[0] is None:
        pytest.skip("MLX's own product, broadcast")

    def place(x, axis):
        return x[..., 0] if axis is None else mx.moveaxis(x, -1, axis)

    x, w = (place(normal(*s, 4).astype(dtype), a) for s, a in zip(((*lead, 5, 6), (6, 7)), axes))
    scale = normal(*lead, 5, 7).astype(dtype)

    def loss(x, w):
        return (mx.matmul(x, w) * scale * (x @ w)).astype(mx.float32).sum()

    tolerance = 2e-4 if dtype == mx.float32 else 3e-2
    for fun in (lambda x, w: x @ w, mlxshim.grad(loss), mlxshim.grad(loss, 1)):
        got = mx.compile(mlxshim.vmap(fun, axes))(x, w).astype(mx.float32)
        want = loop(fun, axes)(x, w).astype(mx.float32)
        assert got.shape == want.shape
        assert mx.abs(got - want).max() <= tolerance * max(1.0, mx.abs(want).max().item())


def test_products_in_levels_within_and_around():
    w, x = normal(6, 7), normal(2, 3, 1, 5, 6)

    def f(w, x):
        return mx.tanh(mx.tanh(x @ w).reshape(1, 7, 5) @ w[:5]).sum()

    each = mlxshim.vmap(mlxshim.vmap(f, (None, 0)), (None, 0))
    of_each = mlxshim.vmap(mlxshim.vmap(mlxshim.grad(f), (None, 0)), (None, 0))
    flat = mx.flatten(x, 0, 1)
    assert same(mx.compile(each)(w, x).flatten(), loop(f, (None, 0))(w, flat))
    want = loop(mx.grad(f), (None, 0))(w, flat)
    assert same(mx.flatten(mx.compile(of_each)(w, x), 0, 1), want)
    # Around: MLX's own derivative of what was traced, and ours.
    for grad in (mx.grad, mlxshim.grad):
        got = mx.compile(grad(lambda w: each(w, x).sum()))(w)
        assert same(got, want.sum(0))
    # Second derivatives, and a tangent.
    twice = mlxshim.grad(lambda w, x: mlxshim.grad(f)(w, x).square().sum())
    want = loop(mx.grad(lambda w, x: mx.grad(f)(w, x).square().sum()), (None, 0))(w, flat)
    assert same(mx.compile(mlxshim.vmap(twice, (None, 0)))(w, flat), want)
    along = mlxshim.vmap(lambda x: mlxshim.jvp(functools.partial(f, w), [x], [x])[1][0])
    want = loop(lambda x: mx.jvp(functools.partial(f, w), [x], [x])[1][0], (0,))(flat)
    assert same(mx.compile(along)(flat), want)


def test_what_no_rule_serves_is_mlxs_own():
    xs, ints = normal(2, 1, 3, 4), mx.ones((4, 4), mx.int32)
    for other in (ints, normal(4, 4).astype(mx.float16), normal(1, 4, 4), mx.array([1j] * 4)):
        f = mx.compile(mlxshim.vmap(lambda x, o=other: x @ o))
        assert mx.allclose(f(xs), mx.stack([x @ other for x in xs]), atol=1e-4)
    for wrong in (normal(3, 4), 2.0):
        with pytest.raises((ValueError, TypeError)):
            mx.compile(mlxshim.vmap(lambda x, o=wrong: x @ o))(xs)


@since_0_32
def test_a_product_of_a_batch_of_one_is_flattened_once():
    w = normal(8, 8)
    f = mx.compile(mlxshim.vmap(lambda x: (x[None] @ w)[0]))
    assert {k: v for k, v in operations(f(normal(4, 3, 8))).items() if k != "Squeeze"} == {
        **{"ExpandDims": 1, "Flatten": 1, "Matmul": 1, "Unflatten": 1},
        **operations(),
    }


@pytest.mark.parametrize("axes", [(0, None), (0, 0), (None, 0)])
def test_derivatives_of_gradients(axes):
    """Forward over reverse, reverse over reverse, and a Hessian."""
    x, w = (normal(2, *s) if a == 0 else normal(*s) for a, s in zip(axes, ((1, 3, 4), (4, 4))))

    def f(x, w):
        return mx.sin((mx.tanh(x @ w).reshape(3, 4) @ w).reshape(1, 2, 6)).sum()

    def forward(ms, x, w):
        return ms.jvp(lambda x, w: list(ms.grad(f, argnums=[0, 1])(x, w)), [x, w], [x, w])[1]

    def reverse(ms, x, w):
        def slopes(x, w):
            return sum(g.square().sum() for g in ms.grad(f, argnums=[0, 1])(x, w))

        return ms.grad(slopes, argnums=[0, 1])(x, w)

    for product in (forward, reverse):
        fun = functools.partial(product, mlxshim)
        got = mx.compile(mlxshim.vmap(fun, axes))(x, w)
        want = loop(functools.partial(product, mx), axes)(x, w)
        assert all(same(y, z) for y, z in zip(got, want))


# Reshapes and outputs --------------------------------------------------------------------------


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_reshapes(axis):
    x = normal(6, 6, 6)
    for fun in (
        lambda x: x.reshape(2, -1) * 2,
        lambda x: mx.reshape(x, (3, 2, -1, 1)) * 2,
        mlxshim.grad(lambda x: (x.reshape(-1) * mx.reshape(x, [-1]).reshape((-1,))).sum()),
        mlxshim.vmap(lambda x: x.reshape(2, -1) * 2),
    ):
        assert same(mx.compile(mlxshim.vmap(fun, axis))(x), loop(fun, (axis % 3,))(x))
    with pytest.raises(ValueError, match="reshape"):
        mx.compile(mlxshim.vmap(lambda x: x.reshape(5, 5), axis))(x)


def test_a_reshape_to_no_sizes_does_not_take_the_process_down():
    assert same(mlxshim.vmap(lambda x: x.reshape() * 2)(mx.array([[1.0], [2.0]])), mx.array([2, 4]))
    with pytest.raises(ValueError, match="reshape"):
        mlxshim.vmap(lambda x: x.reshape())(mx.ones((2, 3)))


def test_a_reshape_is_one_view():
    f = mx.compile(mlxshim.vmap(lambda x: mx.sin(x).reshape(2, 3)))
    assert operations(f(normal(4, 6))) == {"Sin": 1, "Reshape": 1}


@pytest.mark.parametrize("compiled", [False, True])
def test_an_output_that_is_there_more_than_once(compiled):
    x = normal(4, 3, 5)

    def f(x):
        y, c = mx.sin(x), mx.ones((3, 5))
        return {"a": [y] * 12, "b": (y, c, c), "c": x, "d": y.sum()}

    for out in (0, 1, 2):
        spec = {"a": out, "b": out, "c": out, "d": 0}
        for axes in (spec, 0) if out == 0 else (spec,):
            mapped = mlxshim.vmap(f, out_axes=axes)
            got = (mx.compile(mapped) if compiled else mapped)(x)
            want = mx.moveaxis(mx.sin(x), 0, out)
            assert all(same(y, want) for y in (*got["a"], got["b"][0]))
            ones = mx.ones(want.shape)
            assert same(got["b"][1], ones) and same(got["b"][2], ones)
            assert same(got["c"], mx.moveaxis(x, 0, out)) and same(got["d"], mx.sin(x).sum((1, 2)))


def test_outputs_of_one_shape_need_no_views():
    f = mx.compile(mlxshim.vmap(lambda x: [mx.sin(x * i) for i in range(20)]))
    assert "Transpose" not in operations(*f(normal(4, 6)))


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("around", [False, True])
def test_causal_layers_in_steps_of_training(steps, around):
    """Six times the same mask: MLX raises where it joins those of a layer in the wrong order."""

    def loss(weights, x):
        for i in range(2):
            q, k = (x @ weights[i])[None], x[None]
            x = mx.fast.scaled_dot_product_attention(q, k, k, scale=0.5, mask="causal")[0]
        return mx.square(x).mean()

    def train(weights, x, grad):
        for _ in range(steps):
            weights = weights - 0.5 * grad(loss)(weights, x)
        return mx.square(weights).sum() if around else weights

    weights, x = normal(3, 2, 4, 4), normal(3, 2, 5, 4)
    native = functools.partial(train, grad=mx.grad)
    ours = mlxshim.vmap(functools.partial(train, grad=mlxshim.grad))
    if around:
        native, mapped = mx.grad(native), ours
        ours = mlxshim.grad(lambda weights, x: mapped(weights, x).sum())
    want = mx.stack([native(weights[i], x[i]) for i in range(3)])
    assert same(mx.compile(ours)(weights, x), want)


# How many nodes --------------------------------------------------------------------------------


@since_0_32
@pytest.mark.parametrize("path", ["device", "gpu"])
def test_nodes_of_a_model(path, tmp_path):
    """Views too: at most those of the batch by hand and 5 %, but for what has no like there."""
    report = tmp_path / "trace.json"
    command = [sys.executable, "-m", "benchmarks.trace", "--layers", "12", "--minutes", "0.001"]
    command += ["--path", path, "--json", str(report)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    total: dict[tuple[str, str], int] = {}
    for row in json.loads(report.read_text())["rows"]:
        assert "note" not in row or row["contender"] == "mx.vmap", row
        total[row["section"], row["contender"]] = row.get("nodes", 0) + row.get("views", 0)

    ours, hand = total["vmap, compiled", "mlxshim"], total["vmap, compiled", "by hand"]
    # A fused call takes four dimensions: eight views a layer fold the samples into the batch, for
    # rope and attention.
    folds = 12 * 8 if path == "gpu" else 0
    assert hand < ours + 40 and ours <= 1.05 * hand + folds
    if path == "device":
        hand = total["vmap(grad), compiled", "by hand: of the sum"]
        assert total["vmap(grad), compiled", "mlxshim"] <= 1.05 * hand
    for section in ("vmap", "vmap, compiled"):
        assert total[section, "mlxshim"] < total[section, "mx.vmap"]
