"""axis_size, chunk_size and the loop that stands in for a missing batching rule."""

from __future__ import annotations

import warnings

import mlx.core as mx
import pytest

from mlxshim import (
    ArgumentError,
    ConcretizationError,
    NoBatchingRule,
    PerformanceWarning,
    grad,
    jacrev,
    vmap,
)
from mlxshim import map as mapped_one_by_one
from mlxshim.core.errors import no_rule
from mlxshim.core.interception import in_place
from mlxshim.testing import loop


def ruleless():
    """An operation that MLX differentiates and cannot batch, however new MLX is."""
    op = mx.custom_function(lambda x: mx.sin(x))

    def refuse(x, axis):
        raise RuntimeError("[Ruleless::vmap] NYI")

    op.vmap(refuse)
    op.vjp(lambda primal, cotangent, output: cotangent * mx.cos(primal))
    return op


def close(a, b):
    assert a.shape == b.shape and a.dtype == b.dtype
    assert mx.allclose(a, b, rtol=1e-5, atol=1e-6), (a, b)


# The loop --------------------------------------------------------------------------------------


def test_a_missing_rule_becomes_a_loop_and_is_named():
    op, x = ruleless(), mx.random.normal((3, 4))
    with pytest.warns(PerformanceWarning, match="Ruleless") as caught:
        got = vmap(lambda x: op(x).sum())(x)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    close(got, mx.sin(x).sum(axis=1))


def test_the_loop_serves_general_arguments():
    op, x, y = ruleless(), mx.random.normal((4, 3)), mx.random.normal((4,))

    def f(arguments, scale, *, bias):
        return {"a": op(arguments["x"]) * scale, "b": (arguments["y"] + bias, None)}

    bias = mx.random.normal((3, 4))
    with pytest.warns(PerformanceWarning) as caught:
        got = vmap(f, in_axes=({"x": 1, "y": None}, None), out_axes={"a": -1, "b": 0})(
            {"x": x, "y": y}, 2.0, bias=bias
        )
    assert caught[0].filename == __file__
    close(got["a"], mx.sin(x) * 2.0)
    close(got["b"][0], y + bias)
    assert got["b"][1] is None


def test_fallback_error_refuses():
    op = ruleless()
    with pytest.raises(NoBatchingRule, match="Ruleless"):
        vmap(op, fallback="error")(mx.ones((3, 2)))
    assert not in_place()


def test_a_way_out_is_named_with_the_missing_rule():
    qr, early = mx.linalg.qr, mx.checkpoint(lambda x: mx.sin(x).sum())
    for f, hint in (
        (lambda x: qr(x, stream=mx.cpu)[1], "imported by value"),
        (lambda x: grad(early)(x), "mlxshim.checkpoint"),
        (ruleless(), "imported by value"),
    ):
        xs = mx.random.normal((2, 3, 3))
        with pytest.warns(PerformanceWarning, match=hint):
            got = vmap(f)(xs)
        close(got, mx.stack([f(x) for x in xs]))


def test_a_kernel_of_ones_own_is_told_of_primitives():
    """MLX has kernels of a user's own on a GPU alone: here it is its words that are asked."""
    assert "mlxshim.primitive" in no_rule("[Primitive::vmap] Not implemented for CustomKernel.")


@pytest.mark.filterwarnings("ignore::mlxshim.PerformanceWarning")
def test_the_loop_composes():
    op = ruleless()
    x, y = mx.random.normal((3, 4)), mx.random.normal((5, 4))
    close(vmap(grad(lambda x: op(x).sum()))(x), mx.cos(x))
    close(grad(lambda x: (vmap(op)(x) ** 2).sum())(x), 2 * mx.sin(x) * mx.cos(x))

    def f(x, y):
        return op(x * y).sum()

    got = vmap(vmap(f, in_axes=(None, 0)), in_axes=(0, None))(x, y)
    close(got, loop(loop(f, (None, 0)), (0, None))(x, y))
    close(mx.compile(vmap(op))(x), mx.sin(x))
    close(vmap(mx.compile(lambda x: op(x) + 1))(x), mx.sin(x) + 1)


def test_a_value_that_is_read_becomes_a_loop():
    x = mx.array([[1.0, 2.0], [-3.0, 1.0]])
    with pytest.warns(PerformanceWarning, match="reads the value"):
        got = vmap(lambda x: x if x.sum() > 0 else -x)(x)
    close(got, mx.array([[1.0, 2.0], [3.0, -1.0]]))


def test_a_value_that_is_read_in_a_named_axis():
    with pytest.raises(NoBatchingRule, match="with an axis_name there can be none"):
        vmap(lambda x: x if x.sum() > 0 else -x, axis_name="i")(mx.random.normal((2, 3)))


@pytest.mark.filterwarnings("ignore::mlxshim.PerformanceWarning")
def test_a_value_that_is_read_while_it_is_compiled():
    read = vmap(lambda x: x if x.sum() > 0 else -x)
    for f in (read, vmap(read), grad(lambda x: read(x).sum())):
        with pytest.raises(ConcretizationError, match="reads the value of an array"):
            mx.compile(f)(mx.random.normal((2, 3, 4)))
    shared = mx.random.normal((2, 3))  # what is not compiled can be read
    x = mx.random.normal((3,))
    close(
        mx.compile(lambda x: vmap(lambda y: y.sum().item() * x)(shared))(x),
        shared.sum(1)[:, None] * x,
    )


@pytest.mark.filterwarnings("ignore::mlxshim.PerformanceWarning")
@pytest.mark.parametrize("chunk_size", [None, 1])
@pytest.mark.parametrize(
    "one, other, words",
    [
        (lambda x: {"a": x}, lambda x: {"b": x}, ["same tree", "['a']", "['b']"]),
        (lambda x: x, lambda x: (x, x), ["same tree", "an array of shape (2,)", "tuple of 2"]),
        (lambda x: (x, None), lambda x: (x, x), ["same tree"]),
        (lambda x: [x], lambda x: [x[:1]], ["output[0]", "(2,)", "(1,)"]),
    ],
)
def test_samples_that_return_different_things_are_refused(one, other, words, chunk_size):
    def f(x):
        return one(x) if x[0].item() > 0 else other(x)

    with pytest.raises(ArgumentError) as raised:
        vmap(f, chunk_size=chunk_size)(mx.array([[1.0, 1.0], [-1.0, 2.0]]))
    assert all(word in str(raised.value) for word in ("[vmap]", *words)), raised.value


@pytest.mark.filterwarnings("ignore::mlxshim.PerformanceWarning")
@pytest.mark.parametrize("chunk_size", [None, 1])
def test_an_output_that_is_called_the_same_for_all_is_compared_in_a_loop(chunk_size):
    f = vmap(lambda x: mx.array(float(x.item() > 0)), out_axes=None, chunk_size=chunk_size)
    close(f(mx.array([1.0, 2.0])), mx.array(1.0))
    with pytest.raises(ArgumentError, match="out_axes is None"):
        f(mx.array([1.0, -2.0]))


def test_the_callers_own_errors_are_not_looped():
    def broken(x):
        raise RuntimeError("mine")

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeError, match="mine"):
            vmap(broken)(mx.ones((2, 2)))
        with pytest.raises(ValueError, match="out_axes is None"):
            vmap(lambda x: x, out_axes=None)(mx.ones((2, 2)))


def test_metal_and_cuda_kernels_have_no_rule():
    """Their node is a CustomKernel: the loop is what serves it, wherever it can run at all."""
    if not mx.metal.is_available():
        pytest.skip("needs Metal")
    kernel = mx.fast.metal_kernel(
        name="twice",
        input_names=["x"],
        output_names=["y"],
        source="uint i = thread_position_in_grid.x; y[i] = x[i] * 2;",
    )

    def twice(x):
        return kernel(
            inputs=[x],
            grid=(x.size, 1, 1),
            threadgroup=(x.size, 1, 1),
            output_shapes=[x.shape],
            output_dtypes=[x.dtype],
        )[0]

    x = mx.random.normal((3, 4))
    with pytest.warns(PerformanceWarning):
        close(vmap(twice)(x), x * 2)


# axis_size -------------------------------------------------------------------------------------


def test_axis_size_serves_a_function_of_nothing():
    x = mx.random.normal((2,))
    close(vmap(lambda: x * 2, axis_size=3)(), mx.broadcast_to(x * 2, (3, 2)))
    close(vmap(lambda y: y + 1, in_axes=None, axis_size=3)(x), mx.broadcast_to(x + 1, (3, 2)))


def test_axis_size_must_agree():
    with pytest.raises(ValueError, match=r"axis_size is 4.*has size 3"):
        vmap(lambda x: x, axis_size=4)(mx.ones((3, 2)))
    with pytest.raises(ValueError, match="positive int"):
        vmap(lambda x: x, axis_size=0)
    close(vmap(lambda x: x, axis_size=3)(mx.ones((3, 2))), mx.ones((3, 2)))


# chunk_size ------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 8])
@pytest.mark.parametrize(("in_axis", "out_axis"), [(0, 0), (1, -1), (-1, 1)])
def test_chunks_change_nothing(chunk, in_axis, out_axis):
    x, w = mx.random.normal((4, 7) if in_axis else (7, 4)), mx.random.normal((4, 5))

    def f(x, w):
        return {"y": mx.tanh(x @ w), "s": x.sum()[None]}

    def mapped(**options):
        return vmap(f, in_axes=(in_axis, None), out_axes=out_axis, **options)

    got, want = mapped(chunk_size=chunk)(x, w), mapped()(x, w)
    close(got["y"], want["y"])
    close(got["s"], want["s"])


def test_chunks_see_at_most_their_size():
    sizes = []

    def f(x):
        node = mx.custom_function(lambda x: x)

        def rule(x, axis):
            sizes.append(x.shape[axis])
            return x, axis

        node.vmap(rule)
        return node(x)

    x = mx.random.normal((7, 2))
    close(vmap(f, chunk_size=3)(x), x)
    assert sizes == [3, 3, 1]


def test_chunks_under_other_transforms():
    x = mx.random.normal((5, 3))

    def f(x):
        return (mx.sin(x) ** 2).sum()

    close(vmap(grad(f), chunk_size=2)(x), vmap(grad(f))(x))
    close(grad(lambda x: vmap(f, chunk_size=2)(x).sum())(x), vmap(grad(f))(x))
    close(mx.compile(vmap(f, chunk_size=2))(x), vmap(f)(x))
    y = mx.random.normal((2, 5, 3))
    close(vmap(vmap(f, chunk_size=2), chunk_size=1)(y), vmap(vmap(f))(y))


def test_chunks_bound_the_memory():
    """Each sample needs a megabyte on the way to one number."""
    x = mx.random.normal((32, 4))

    def f(x):
        big = mx.broadcast_to(x[:1], (1 << 18,)) + mx.arange(1 << 18)
        return mx.sort(big).sum()

    def peak(**options):
        mx.eval(x)
        before = mx.get_active_memory()  # other tests' arrays
        mx.reset_peak_memory()
        mx.eval(vmap(f, **options)(x))
        return mx.get_peak_memory() - before

    assert peak(chunk_size=2) < peak() / 4


def test_bad_options():
    for options in ({"chunk_size": 0}, {"randomness": "none"}, {"fallback": "pray"}):
        with pytest.raises(ValueError, match=next(iter(options))):
            vmap(lambda x: x, **options)
    with pytest.raises(ValueError, match="chunks"):
        vmap(lambda x: x, axis_name="i", chunk_size=2)


def test_no_samples():
    assert vmap(lambda x, y: (x * y).sum(), in_axes=(0, None))(
        mx.ones((0, 3)), mx.ones(3)
    ).shape == (0,)


# MLX's own derivatives around -------------------------------------------------------------------


def _inner(w: mx.array, xs: mx.array, chunk_size: int | None) -> mx.array:
    def one(x):
        return (grad(lambda v: (v * x).sum() ** 3)(w) * x).sum()

    return vmap(one, chunk_size=chunk_size)(xs).sum()


def _mapped(w: mx.array, xs: mx.array, chunk_size: int | None) -> mx.array:
    def one(x):
        return (grad(lambda v: (v * x).sum() ** 3)(w) * x).sum()

    return mapped_one_by_one(one, xs, batch_size=chunk_size).sum()


def _jacobian(w: mx.array, xs: mx.array, chunk_size: int | None) -> mx.array:
    return jacrev(lambda v: (xs @ v) ** 3, chunk_size=chunk_size)(w).square().sum()


@pytest.mark.parametrize("of", [_inner, _mapped, _jacobian])
def test_chunks_lose_nothing_to_a_derivative_of_mlx(of):
    # A chunk that were evaluated there would be a constant to it, and the gradient zero.
    w, xs, v = mx.random.normal((3,)), mx.random.normal((6, 3)), mx.random.normal((3,))
    want = mx.grad(lambda w: of(w, xs, None))(w)
    assert float(mx.abs(want).max()) > 1e-3
    assert mx.allclose(mx.grad(lambda w: of(w, xs, 2))(w), want, rtol=1e-4, atol=1e-4)
    slope = mx.jvp(lambda w: of(w, xs, 2), [w], [v])[1][0]
    assert mx.allclose(slope, (want * v).sum(), rtol=1e-4, atol=1e-3)
