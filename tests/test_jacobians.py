"""Jacobians against columns and rows found one by one; chunks, draws, what has no forward mode."""

from __future__ import annotations

import mlx.core as mx
import pytest

from mlxshim import grad, hessian, hvp, jacfwd, jacrev, jvp, linearize, vhp, vmap


def close(got, want, tol=1e-4):
    assert got.shape == want.shape and bool(mx.allclose(got, want, rtol=tol, atol=tol)), (got, want)


def f(x):
    return mx.tanh(x[None, :] * mx.arange(1.0, 5.0)[:, None]) * x.sum()


@pytest.mark.parametrize("mode", [jacrev, jacfwd])
@pytest.mark.parametrize("chunk_size", [None, 1, 2, 5, 100])
def test_chunks(mode, chunk_size):
    x = mx.random.normal((3,))
    columns = [mx.jvp(f, [x], [mx.eye(3)[i]])[1][0] for i in range(3)]
    close(mode(f, chunk_size=chunk_size)(x), mx.stack(columns, axis=-1))
    xs = mx.random.normal((2, 3))
    got = mx.compile(vmap(mode(f, chunk_size=chunk_size)))(xs)
    close(got, mx.stack([mode(f)(x) for x in xs]))


def test_chunks_bound_the_memory():
    x = mx.random.normal((64,))
    mx.eval(x)

    def wide(x):  # what one row needs is 64 times as large as the row
        return mx.tanh(x[:, None, None] * mx.ones((64, 64, 16))).mean(axis=(1, 2))

    def peak(chunk_size):
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        mx.eval(jacrev(wide, chunk_size=chunk_size)(x))
        return mx.get_peak_memory() - before

    assert peak(4) < 0.25 * peak(None)


@pytest.mark.parametrize("mode", [jacrev, jacfwd])
def test_nothing_to_differentiate(mode):
    empty, x = mx.zeros((0,)), mx.ones((3,))
    close(mode(lambda x: x[:0])(x), mx.zeros((0, 3)))
    close(mode(lambda e: mx.concatenate([e, mx.ones(2)]))(empty), mx.zeros((2, 0)))


@pytest.mark.parametrize("mode", [jacrev, jacfwd])
def test_one_draw_for_all_rows(mode):
    x = mx.ones((16,))

    def dropped(x):
        kept = mx.random.bernoulli(0.5, x.shape)
        return x * kept, kept

    before = mx.random.state[0]
    jacobian, kept = mode(dropped, has_aux=True)(x)
    close(jacobian, mx.diag(kept.astype(mx.float32)))
    assert 0 < kept.sum().item() < 16
    assert not mx.array_equal(before, mx.random.state[0])
    jacobians, several = vmap(mode(dropped, has_aux=True))(mx.ones((3, 16)))
    close(jacobians, vmap(mx.diag)(several.astype(mx.float32)))
    assert len({str(row.tolist()) for row in several}) == 3


NO_FORWARD_MODE = {
    "grad of an index": lambda x: grad(lambda x: x[0] ** 2 * x[mx.array([1, 1])].sum())(x),
    "scatter": lambda x: mx.zeros((5,)).at[mx.array([1, 1, 3])].add(x * x),
    "cumprod": lambda x: mx.cumprod(x),
}


@pytest.mark.parametrize("name", NO_FORWARD_MODE)
def test_forward_mode_without_one(name):
    g, x, t = NO_FORWARD_MODE[name], mx.array([0.5, -1.0, 2.0]), mx.array([1.0, 3.0, -2.0])
    eps = 1e-3
    want = (g(x + eps * t) - g(x - eps * t)) / (2 * eps)
    close(jvp(g, (x,), (t,))[1], want, 2e-3)
    close(jvp(g, [x], [t])[1][0], want, 2e-3)
    close(linearize(g, x)[1](t), want, 2e-3)
    close(jacfwd(g)(x) @ t, want, 2e-3)
    close(vmap(lambda x, t: jvp(g, (x,), (t,))[1])(x[None], t[None])[0], want, 2e-3)
    close(jvp(vmap(g), (x[None],), (t[None],))[1][0], want, 2e-3)


def loss(p, x):
    return (mx.tanh(p["w"] @ x) * p["b"]).sum() ** 2


@pytest.mark.parametrize("product", [hvp, vhp])
def test_products_complain_in_their_own_name(product):
    name, x = product.__name__, mx.ones((3,))
    with pytest.raises(ValueError, match=rf"\[{name}\] The function must return a scalar"):
        product(lambda x: x, x, x)
    with pytest.raises(ValueError, match=rf"\[{name}\] fun must be callable"):
        product(x, x, x)


@pytest.mark.parametrize("product", [hvp, vhp])
def test_products_with_the_hessian(product):
    p, x = {"w": mx.random.normal((2, 3)), "b": mx.random.normal((2,))}, mx.random.normal((3,))
    v, u = {"w": mx.random.normal((2, 3)), "b": mx.random.normal((2,))}, mx.random.normal((3,))
    h = hessian(loss, argnums=(0, 1))(p, x)
    want_w = (
        mx.tensordot(h[0]["w"][0]["w"], v["w"], 2)
        + mx.tensordot(h[0]["w"][0]["b"], v["b"], 1)
        + h[0]["w"][1] @ u
    )
    value, (of_p, _) = product(loss, (p, x), (v, u))
    close(value, loss(p, x))
    close(of_p["w"], want_w, 1e-3)
    one_value, one = product(lambda p: loss(p, x), p, v)
    close(one_value, value)
    close(one["b"], mx.tensordot(h[0]["b"][0]["w"], v["w"], 2) + h[0]["b"][0]["b"] @ v["b"], 1e-3)
    xs = mx.random.normal((4, 3))
    mapped = vmap(lambda x: product(lambda x: loss(p, x), x, u)[1])(xs)
    close(mapped, mx.stack([hessian(loss, argnums=1)(p, x) @ u for x in xs]), 1e-3)
    close(mx.compile(lambda x: product(lambda x: loss(p, x), x, u)[1])(x), h[1][1] @ u, 1e-3)
    with pytest.raises(ValueError, match="tuple of 2"):
        product(loss, (p, x), (v,))
    with pytest.raises(ValueError, match=r"argument x must have its shape \(3,\)"):
        product(loss, (p, x), (v, mx.zeros(2)))
    with pytest.raises(ValueError, match="scalar"):
        product(mx.sin, x, u)


def test_attention():
    """The operation whose second derivatives crash MLX 0.31."""
    q, k = mx.random.normal((1, 4, 3, 8)), mx.random.normal((1, 2, 3, 8))

    def attend(q):
        o = mx.fast.scaled_dot_product_attention(q, k, k, scale=0.3, mask="causal")
        return (o**2).sum()

    def by_hand(q):
        keys = mx.repeat(k, 2, axis=1)
        scores = (q * 0.3) @ mx.swapaxes(keys, -1, -2) + mx.triu(mx.full((3, 3), -1e9), 1)
        return ((mx.softmax(scores, axis=-1) @ keys) ** 2).sum()

    v = mx.random.normal(q.shape)
    want = vhp(by_hand, q, v)[1]
    close(hvp(attend, q, v)[1], want, 1e-3)
    close(vhp(attend, q, v)[1], want, 1e-3)


@pytest.mark.parametrize("chunk_size", [0, -1, 1.5, True])
def test_a_chunk_has_a_size(chunk_size):
    for mode in (jacrev, jacfwd):
        with pytest.raises(ValueError, match="chunk_size must be a positive int"):
            mode(f, chunk_size=chunk_size)
