"""grad, value_and_grad, vjp, jvp: what MLX's own accept, and JAX's argnums and has_aux."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from mlxshim import grad, jvp, value_and_grad, vjp, vmap


def loss(x, y, *, z=1.0):
    return (x * y * y * z).sum()


X, Y = mx.array([1.0, 2.0]), mx.array([3.0, 5.0])


def same(got, want):
    got, want = tree_flatten([got]), tree_flatten([want])
    assert [k for k, _ in got] == [k for k, _ in want]
    for (_, g), (_, w) in zip(got, want):
        if g is None or w is None:
            assert g is w
        else:
            assert g.shape == w.shape and bool(mx.allclose(g, w))


@pytest.mark.parametrize(
    "keywords",
    [{}, {"argnums": 0}, {"argnums": 1}, {"argnums": [0]}, {"argnums": [0, 1]}],
)
def test_as_mlx(keywords):
    same(grad(loss, **keywords)(X, Y), mx.grad(loss, **keywords)(X, Y))
    same(value_and_grad(loss, **keywords)(X, Y), mx.value_and_grad(loss, **keywords)(X, Y))


@pytest.mark.parametrize("argnames", ["z", ["z"], ["y", "z"]])
def test_argnames(argnames):
    z = mx.array(2.0)
    same(grad(loss, argnames=argnames)(X, y=Y, z=z), mx.grad(loss, argnames=argnames)(X, y=Y, z=z))


def test_tuples_are_answered_in_their_own_order():
    dx, dy = mx.grad(loss, argnums=[0, 1])(X, Y)
    same(grad(loss, argnums=(1, 0))(X, Y), (dy, dx))
    one = grad(loss, argnums=(1,))(X, Y)
    assert type(one) is tuple
    same(one, (dy,))
    same(grad(loss, argnums=-1)(X, Y), dy)
    same(grad(loss, argnums=(-1, -2))(X, Y), (dy, dx))
    value, grads = value_and_grad(loss, argnums=(1, 0))(X, Y)
    same((value, grads), (loss(X, Y), (dy, dx)))


def test_has_aux():
    def f(x):
        return (x**2).sum(), {"doubled": 2 * x, "name": "aux"}

    grads, aux = grad(f, has_aux=True)(X)
    same(grads, 2 * X)
    same(aux["doubled"], 2 * X)
    assert aux["name"] == "aux"
    (value, aux), grads = value_and_grad(f, has_aux=True)(X)
    same((value, grads, aux["doubled"]), ((X**2).sum(), 2 * X, 2 * X))
    with pytest.raises(ValueError, match="has_aux"):
        grad(lambda x: x.sum(), has_aux=True)(X)
    # MLX's own way: value_and_grad of a tuple, with no flag.
    same(value_and_grad(lambda x: (x.sum(), x))(X), mx.value_and_grad(lambda x: (x.sum(), x))(X))


def test_trees_and_modules():
    model = nn.Linear(2, 3)

    def of_parameters(parameters, x):
        model.update(parameters)
        return model(x).square().sum()

    p = model.parameters()
    same(grad(of_parameters)(p, X), mx.grad(of_parameters)(p, X))


def test_vjp_and_jvp_as_mlx():
    def f(x, y):
        return mx.sin(x) * y, x + y

    same(vjp(f, [X, Y], [X, Y]), mx.vjp(f, [X, Y], [X, Y]))
    same(jvp(f, (X, Y), (Y, X)), mx.jvp(f, (X, Y), (Y, X)))
    same(jvp(mx.sin, [X], [Y]), mx.jvp(mx.sin, [X], [Y]))


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: grad(loss, argnums=2)(X, Y), []),
        (lambda: grad(loss, argnums=(0, 2))(X, Y), ["argnums", "2 positional"]),
        (lambda: grad(loss, argnums=-3)(X, Y), ["argnums", "-3"]),
        (lambda: grad(loss, argnums=(0, -2))(X, Y), ["twice"]),
        (lambda: grad(loss, argnums="x"), ["argnums", "'x'"]),
        (lambda: grad(lambda x: x)(X), ["shape"]),
        (lambda: grad(lambda x: None)(X), []),
        (lambda: jvp(mx.sin, [X], [mx.array(1.0)]), ["shape"]),
    ],
)
def test_errors(call, words):
    with pytest.raises(ValueError) as raised:
        call()
    for word in words:
        assert word in str(raised.value)


def test_wrapped_functions_keep_their_names():
    assert grad(loss).__name__ == value_and_grad(loss).__name__ == "loss"


@pytest.mark.parametrize("how", ["grad", "dict", "complex", "vjp"])
def test_a_second_derivative_through_a_broadcast_of_axes_mapped_behind_others(how: str):
    """Where all sizes are the same, a misplaced axis would be a wrong number and no error."""
    x, b, us = (mx.random.normal(shape) for shape in ((2, 2, 2), (2,), (2, 2)))

    def first(b, u):
        """Along `u`, which alone is mapped."""

        def loss(b):
            return mx.sum(mx.sin(x + b))

        if how == "grad":
            slope = grad(loss)(b)
        elif how == "dict":
            slope = value_and_grad(lambda tree: loss(tree["b"]))({"b": b})[1]["b"]
        elif how == "complex":
            slope = grad(lambda b, n: loss(b), (0, 1), allow_int=True)(b, mx.array(1))[0]
        else:
            slope = vjp(loss, [b], [mx.array(1.0)])[1][0]
        return mx.sum(slope * u)

    got = vmap(grad(first), in_axes=(None, 1))(b, us)
    second = -mx.sum(mx.sin(x + b), axis=(0, 1))
    assert mx.allclose(got, second * us.T, rtol=1e-4, atol=1e-5)
