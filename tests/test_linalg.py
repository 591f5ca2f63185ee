"""What the conformance suite cannot ask of `mx.linalg`: shared matrices, derivatives MLX lacks."""

from __future__ import annotations

import mlx.core as mx
import pytest

from mlxshim import grad, jvp, vmap

la, cpu = mx.linalg, mx.cpu


def rand(*shape):
    return mx.random.normal(shape)


def regular(*batch):
    return rand(*batch, 4, 4) + 3 * mx.eye(4)[::-1]


def same(got, want, tol=1e-4):
    assert got.shape == want.shape and got.dtype == want.dtype
    assert bool(mx.allclose(got, want, rtol=tol, atol=tol)), (got, want)


@pytest.mark.parametrize(
    "fun",
    [
        lambda a: la.qr(a, stream=cpu)[1],
        lambda a: la.lu(a, stream=cpu)[1],
        lambda a: la.lu_factor(a, stream=cpu)[0],
        lambda a: la.tri_inv(a, stream=cpu),
        lambda a: la.cholesky_inv(a, upper=True, stream=cpu),
        lambda a: la.solve(a, a[0], stream=cpu),
        lambda a: la.solve_triangular(a, a[0], stream=cpu),
    ],
)
def test_a_matrix_that_all_samples_share(fun):
    x, a = rand(3, 4, 4), regular()
    want = x + fun(a)
    same(vmap(lambda x: x + fun(a))(x), want)
    same(vmap(vmap(lambda x: x + fun(a)))(rand(2, 3, 4, 4) * 0 + x), mx.stack([want] * 2))
    same(mx.compile(vmap(lambda x, a: x + fun(a), in_axes=(0, None)))(x, a), want)
    same(vmap(lambda x: fun(a))(x), mx.stack([fun(a)] * 3))
    stopped = vmap(grad(lambda x, a: (x * mx.stop_gradient(fun(a))).sum()), in_axes=(0, None))
    same(stopped(x, a), mx.stack([mx.broadcast_to(fun(a), (4, 4))] * 3))


def test_one_matrix_is_factorised_once():
    a, b = regular(), rand(5, 4, 3)
    want = mx.stack([la.solve(a, x, stream=cpu) for x in b])
    same(vmap(lambda x: la.solve(a, x, stream=cpu))(b), want)
    many = vmap(vmap(lambda a, x: la.solve(a, x, stream=cpu), in_axes=(None, 0)), in_axes=(0, None))
    aa = regular(2)
    want = mx.stack([mx.stack([la.solve(m, x, stream=cpu) for x in b]) for m in aa])
    same(many(aa, b), want)


@pytest.mark.parametrize("shape", [(4,), (4, 3)])
@pytest.mark.parametrize("axes", [(0, 0), (0, None), (None, 0)])
def test_derivatives_of_solve_in_the_matrix(shape, axes):
    """MLX has none; the formula's oracle is a product with a constant inverse."""
    a = regular(3) if axes[0] == 0 else regular()
    b = rand(3, *shape) if axes[1] == 0 else rand(*shape)
    w = rand(*shape)

    def loss(a, b):
        return (w * la.solve(a, b, stream=cpu)).sum()

    y = mx.stack([la.inv(m, stream=cpu) for m in a]) if axes[0] == 0 else la.inv(a, stream=cpu)

    def newton(a, b, y):
        # One step from a constant inverse: the same value and first derivatives.
        return (w * ((2 * y - y @ a @ y) @ b)).sum()

    three = (*axes, axes[0])
    got = vmap(grad(loss, argnums=(0, 1)), in_axes=axes)(a, b)
    want = vmap(grad(newton, argnums=(0, 1)), in_axes=three)(a, b, y)
    for g, v in zip(got, want):
        same(g, v, 1e-3)
    da, db = rand(*a.shape), rand(*b.shape)
    got = vmap(lambda a, b, s, t: jvp(loss, [a, b], [s, t])[1][0], in_axes=axes + axes)
    want = vmap(
        lambda a, b, y, s, t: jvp(lambda a, b: newton(a, b, y), [a, b], [s, t])[1][0],
        in_axes=three + axes,
    )
    same(got(a, b, da, db), want(a, b, y, da, db), 1e-3)


@pytest.mark.parametrize("shape", [(3, 4, 2), (1, 4, 2), (4, 2), (4,)])
def test_derivatives_of_solve_outside_a_vmap(shape):
    a = regular(3) if len(shape) == 3 else regular()
    b, c = rand(*shape), rand(*a.shape)
    y = la.inv(a, stream=cpu)

    def solved(a):
        return mx.sin(la.solve(a, b, stream=cpu)).sum()

    def newton(a):
        # Two steps from a constant inverse: the same value and first two derivatives.
        x = 2 * y - y @ a @ y
        return mx.sin((2 * x - x @ a @ x) @ b).sum()

    same(grad(solved)(a), grad(newton)(a), 1e-3)
    same(jvp(solved, [a], [c])[1][0], jvp(newton, [a], [c])[1][0], 1e-3)
    got, want = (jvp(grad(f), [a], [c])[1][0] for f in (solved, newton))
    same(got, want, 1e-2)
    got, want = (grad(lambda a, f=f: (grad(f)(a) * c).sum())(a) for f in (solved, newton))
    same(got, want, 1e-2)
    many = mx.stack([a, a + 0.1 * c])
    same(
        grad(lambda a: vmap(solved)(a).sum())(many), mx.stack([grad(solved)(m) for m in many]), 1e-3
    )


def test_a_triangle_is_all_that_is_looked_at():
    a = rand(3, 4, 4) + 3 * mx.eye(4)
    same(vmap(lambda a: la.tri_inv(a, stream=cpu) @ mx.tril(a))(a), mx.stack([mx.eye(4)] * 3), 1e-3)


@pytest.mark.parametrize("fun", [lambda a: la.qr(a)[0], lambda a: la.lu(a)[1]])
def test_no_derivative_is_an_error_not_a_zero(fun):
    a = regular(3)
    with pytest.raises(ValueError):
        vmap(grad(lambda a: fun(a).sum()))(a)
    with pytest.raises(ValueError):
        vmap(lambda a: jvp(fun, [a], [a])[1][0])(a)


@pytest.mark.parametrize(
    "fun", [la.qr, la.lu, lambda x, **kw: la.solve(x, x, **kw), lambda x, **kw: la.tri_inv(x, **kw)]
)
def test_errors_are_those_of_mlx(fun):
    with pytest.raises(ValueError, match="linalg"):
        vmap(lambda x: fun(x, stream=cpu))(rand(3, 4))


def test_a_stream_around_the_call():
    a = regular(3)
    with mx.stream(cpu):
        want = mx.stack([la.qr(x)[1] for x in a])

    def inside(x):
        with mx.stream(mx.new_stream(cpu)):
            return la.qr(x)[1]

    same(vmap(inside)(a), want)
    device = mx.new_stream(cpu)
    same(vmap(lambda x: la.qr(x, stream=device)[1])(a), want)


def test_no_samples():
    assert vmap(lambda a: la.solve(a, a, stream=cpu))(mx.zeros((0, 4, 4))).shape == (0, 4, 4)
    shared = vmap(lambda b: la.solve(mx.eye(4), b, stream=cpu))(mx.zeros((0, 4, 2)))
    assert shared.shape == (0, 4, 2)


def test_a_vmap_of_mlx_inside():
    a = regular(2, 3)
    want = mx.stack([la.qr(m, stream=cpu)[1] for m in a])
    same(vmap(mx.vmap(lambda a: la.qr(a, stream=cpu)[1]))(a), want)
