"""A rule of one's own: the README's ten lines, each kind of rule, and a checker that can fail."""

from __future__ import annotations

import mlx.core as mx
import pytest

import mlxshim
from mlxshim.testing import MODES, Nonconforming, check, conformance


def swish():
    @mlxshim.primitive
    def swish(x, y, *, beta=1.0):
        return y * x * mx.sigmoid(beta * x)

    return swish


X, Y = mx.random.normal((3, 4)), mx.random.normal((4,))


def test_a_decomposition_is_enough():
    assert check(swish(), X, Y) > 80


def test_an_elementwise_operation_is_lowered_once():
    op, calls = swish(), []

    @op.def_lowering
    def _(x, y, *, beta=1.0):
        calls.append((x.shape, y.shape))
        return y * x * mx.sigmoid(beta * x)

    op.def_elementwise()
    mlxshim.vmap(lambda x: op(x, Y, beta=2.0), in_axes=2)(mx.random.normal((3, 4, 5)))
    assert calls == [((5, 3, 4), (5, 3, 4))]
    calls.clear()
    mlxshim.vmap(lambda y: op(X, y))(mx.random.normal((5, 4)))
    assert calls == [((5, 3, 4), (5, 3, 4))]
    check(op, X, Y)


def test_a_vjp_rule_is_used_and_mapped():
    op, calls = swish(), []

    @op.def_vjp
    def _(primals, cotangents, outputs, *, beta=1.0):
        (x, y), (ct,) = primals, cotangents
        calls.append(beta)
        s = mx.sigmoid(beta * x)
        return ct * y * (s + beta * x * s * (1 - s)), ct * x * s

    op.def_elementwise()
    mlxshim.vmap(mlxshim.grad(lambda x: op(x, Y, beta=3.0).sum()))(mx.random.normal((2, 3, 4)))
    assert calls == [3.0]
    check(op, X, Y)
    check(lambda x, y: op(x, y, beta=0.5), X, Y)


def test_rules_given_after_a_call_count():
    op, calls = swish(), []
    mapped = mlxshim.vmap(lambda x: op(x, Y, beta=2.0))
    mapped(mx.random.normal((5, 3, 4)))

    @op.def_batch
    def _(size, arrays, axes, *, beta):
        calls.append(axes)
        x, y = arrays
        return op(mx.moveaxis(x, axes[0], 0), y, beta=beta), 0

    mapped(mx.random.normal((6, 3, 4)))
    assert calls == [(0, None)]


def test_static_values_may_have_any_name():
    names = ("size", "arrays", "axes", "primals", "cotangents", "outputs", "value", "batch", "key")
    static = dict(zip(names, (0.5 * (n + 1) for n in range(len(names)))))

    @mlxshim.primitive
    def op(x, **static):
        return x * x * sum(static.values())

    def applied(x):
        return op(x, **static).sum()

    xs = mx.random.normal((3, 4))
    for rules in (lambda: None, op.def_elementwise, lambda: op.def_vjp(double)):
        rules()
        for _ in range(3):  # the second trace goes by what the first has noted
            got = mlxshim.vmap(mlxshim.grad(applied))(xs)
            assert mx.allclose(got, 2 * xs * sum(static.values()))
        check(lambda x: op(x, **static), X)


def double(primals, cotangents, outputs, /, **static):
    return 2 * primals[0] * sum(static.values()) * cotangents[0]


def test_several_outputs_and_a_rule_that_folds():
    @mlxshim.primitive
    def both(x):
        return mx.sin(x), x.sum(0)

    @both.def_batch
    def _(size, arrays, axes):
        s, t = both(mx.moveaxis(arrays[0], axes[0], 1))
        return [s, t], [1, 0]

    check(both, X)


def test_the_checker_finds_a_wrong_rule():
    op = swish()
    op.def_lowering(lambda x, y, *, beta=1.0: x * y)
    with pytest.raises(Nonconforming, match="call of one sample float32: output 0 differs"):
        check(op, X, Y)

    op = swish()
    op.def_vjp(lambda primals, cotangents, outputs, *, beta=1.0: [cotangents[0], primals[1]])
    with pytest.raises(Nonconforming, match="grad"):
        check(op, X, Y)

    op = swish()
    op.def_batch(lambda size, arrays, axes, *, beta=1.0: (op(*arrays, beta=beta), 0))
    with pytest.raises(Nonconforming, match="vmap in_axes"):
        check(op, X, Y)


def test_the_checker_measures_a_loop_in_half_precision_by_float32():
    def waves(total, factor=1.0):
        return lambda x, w: mx.tanh(x @ w) * mx.sin(factor * total(x))

    def backwards(x):  # the same sum, rounded off in another order
        s = mx.zeros((), x.dtype)
        for value in mx.flatten(x)[::-1]:
            s = s + value
        return s

    mx.random.seed(1)
    x, w = mx.random.normal((4, 3)) + 1, mx.random.normal((3, 4))
    options = {"reference": waves(backwards), "dtypes": [mx.bfloat16], "modes": MODES[1:4]}
    results = list(conformance(waves(mx.sum), x, w, **options))
    assert any(r.share > 1 for r in results)  # further from the loop than the tolerance
    assert not any(r.error for r in results)
    said = "output 0 differs by .* from float32 output 0 is off by .*, the loop by "
    with pytest.raises(Nonconforming, match=said):
        check(waves(mx.sum, 1.05), x, w, **options)


def test_the_checker_refuses_to_pass_on_nothing():
    def broken(x):
        raise RuntimeError("always")

    with pytest.raises(ValueError, match="nothing was compared"):
        check(broken, X)


def test_mlx_own_transforms_see_the_rules_too():
    op = swish()
    op.def_vjp(lambda primals, cotangents, outputs, *, beta=1.0: [primals[0] * 7, primals[1]])
    assert mx.array_equal(mx.grad(lambda x: op(x, Y).sum())(X), X * 7)


def test_an_operation_that_returns_an_array_twice():
    @mlxshim.primitive
    def twice(x):
        y = mx.broadcast_to(mx.sin(x), (3, 2))
        return y, y

    x = mx.random.normal((2, 4))
    one, other = mlxshim.vmap(twice, in_axes=1)(x)
    want = mx.stack([mx.broadcast_to(mx.sin(v), (3, 2)) for v in x.T])
    assert mx.array_equal(one, want) and mx.array_equal(other, want)
