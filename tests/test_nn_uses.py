"""Fisher and Laplace, tangent kernels, attribution, adapters by the row, a shared prompt."""

from __future__ import annotations

import math

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map

from mlxshim import vmap
from mlxshim.nn import (
    add_lora,
    empirical_ntk,
    fisher_diagonal,
    functional_call,
    gradient_features,
    laplace,
    per_row,
    prompt_attention,
    random_projection,
    stack_adapters,
    trak,
)


class Small(nn.Module):
    def __init__(self, inputs=4, outputs=3):
        super().__init__()
        self.first, self.norm = nn.Linear(inputs, 8), nn.RMSNorm(8)
        self.second = nn.Linear(8, outputs)

    def __call__(self, x):
        return self.second(mx.tanh(self.norm(self.first(x))))


def loss(model, x, y):
    return nn.losses.cross_entropy(model(x), y)


def data(samples=7, inputs=4, outputs=3):
    return mx.random.normal((samples, inputs)), mx.random.randint(0, outputs, (samples,))


def loop_of_gradients(model, fun, *args):
    """(samples, parameters), by MLX's own gradient of one sample after the other."""
    one = nn.value_and_grad(model, fun)
    rows = []
    for sample in zip(*args):
        _, grads = one(model, *sample)
        rows.append(mx.concatenate([g.reshape(-1) for _, g in tree_flatten(grads)]))
    return mx.stack(rows)


def flat(tree):
    return mx.concatenate([leaf.reshape(-1) for _, leaf in tree_flatten(tree)])


def close(got, want, tol=1e-4):
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, rtol=tol, atol=tol * float(mx.abs(want).max().item()))


# Fisher and Laplace ----------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_size", [None, 3, 7])
def test_fisher_diagonal_is_the_loops(chunk_size):
    model, (x, y) = Small(), data()
    before = flat(model.parameters())
    losses, fisher = fisher_diagonal(model, loss, chunk_size=chunk_size)(model, x, y)
    close(losses, mx.stack([loss(model, a, b) for a, b in zip(x, y)]))
    close(flat(fisher), mx.square(loop_of_gradients(model, loss, x, y)).mean(axis=0))
    assert mx.array_equal(before, flat(model.parameters()))


def test_fisher_of_what_is_trainable():
    model, (x, y) = Small(), data()
    model.first.freeze()
    _, fisher = fisher_diagonal(model, loss)(model, x, y)
    names = {name for name, _ in tree_flatten(fisher)}
    assert names == {"norm.weight", "second.weight", "second.bias"}


def test_fisher_needs_samples():
    with pytest.raises(ValueError, match="no samples"):
        fisher_diagonal(Small(), loss)(Small(), mx.zeros((0, 4)), mx.zeros((0,), mx.int32))


def test_laplace_of_a_linear_model_is_its_posterior():
    # Inputs without correlation make the exact covariance diagonal, noise of variance one the
    # squared gradients' mean the curvature.
    x = mx.array([[1.0, 1.0], [1.0, -1.0], [2.0, 2.0], [2.0, -2.0]])
    model = nn.Linear(2, 1, bias=False)
    y = x @ mx.array([[0.7], [-1.2]])

    def nll(model, x, y):
        return 0.5 * (model(x) - y).square().sum() + 0.5 * math.log(2 * math.pi)

    prior = 0.5
    hessian = x.T @ x
    covariance = mx.linalg.inv(hessian + prior * mx.eye(2), stream=mx.cpu)
    model.weight = (covariance @ x.T @ y).T
    total = sum(nll(model, a, b) for a, b in zip(x, y))
    fisher = {"weight": mx.diag(hessian)[None] / 4}
    posterior = laplace(model, fisher, 4, prior_precision=prior)
    close(1 / posterior.precision["weight"][0], mx.diag(covariance))
    # For a linear model the approximation of the evidence is exact: y is normal.
    marginal = np.array(x @ x.T) / prior + np.eye(4)
    target = np.array(y)[:, 0]
    exact = -0.5 * (
        target @ np.linalg.solve(marginal, target)
        + np.linalg.slogdet(marginal)[1]
        + 4 * math.log(2 * math.pi)
    )
    assert posterior.log_evidence(total).item() == pytest.approx(exact, rel=1e-4)


def test_laplace_draws_have_its_mean_and_variance():
    model = nn.Linear(2, 1, bias=False)
    posterior = laplace(model, {"weight": mx.array([[1.0, 24.0]])}, 2, prior_precision=2.0)
    draws = posterior.sample(20000, key=mx.random.key(3))["weight"]
    assert draws.shape == (20000, 1, 2)
    close(draws.mean(axis=0), model.weight, 0.05)
    close(draws.var(axis=0), mx.array([[1 / 4, 1 / 50]]), 0.05)
    again = posterior.sample(20000, key=mx.random.key(3))["weight"]
    assert mx.array_equal(draws, again)
    assert not mx.array_equal(posterior.sample(2)["weight"], posterior.sample(2)["weight"])


@pytest.mark.parametrize(("samples", "prior"), [(0, 1.0), (3, 0.0)])
def test_laplace_refuses(samples, prior):
    with pytest.raises(ValueError, match="positive"):
        laplace(nn.Linear(2, 1), {}, samples, prior_precision=prior)


# Tangent kernels -------------------------------------------------------------------------------


def jacobians(model, x):
    """(samples, outputs, parameters)."""
    return mx.stack(
        [loop_of_gradients(model, lambda m, a, i=i: m(a)[i], x) for i in range(3)], axis=1
    )


@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize("compute", ["full", "trace", "diagonal"])
def test_empirical_ntk(compute, chunk_size):
    model, x1, x2 = Small(), data(5)[0], data(4)[0]
    a, b = jacobians(model, x1), jacobians(model, x2)
    full = mx.einsum("ikp,jlp->ijkl", a, b)
    want = {
        "full": full,
        "diagonal": mx.diagonal(full, axis1=2, axis2=3),
        "trace": mx.trace(full, axis1=2, axis2=3),
    }[compute]
    close(empirical_ntk(model, x1, x2, compute=compute, chunk_size=chunk_size), want)


def test_ntk_of_a_function_and_of_one_set():
    model, x = Small(), data(4)[0]
    got = empirical_ntk(model, x, fun=lambda m, a: m(a).square().sum())
    rows = loop_of_gradients(model, lambda m, a: m(a).square().sum(), x)
    close(got, rows @ rows.T)
    with pytest.raises(ValueError, match="compute"):
        empirical_ntk(model, x, compute="all")
    with pytest.raises(ValueError, match="trainable"):
        empirical_ntk(Small().freeze(), x)


# Attribution -----------------------------------------------------------------------------------


def test_projection_is_linear_and_keeps_products():
    tree = {"a": mx.random.normal((6, 20, 30)), "b": [mx.random.normal((6, 50))]}
    got = random_projection(tree, 2048, seed=1)
    assert mx.array_equal(got, random_projection(tree, 2048, seed=1))
    assert not mx.array_equal(got, random_projection(tree, 2048, seed=2))
    close(random_projection(tree_map(lambda x: 3 * x, tree), 2048, seed=1), 3 * got)
    rows = mx.concatenate([leaf.reshape(6, -1) for _, leaf in tree_flatten(tree)], axis=1)
    norm = mx.linalg.norm(rows, axis=1)
    off = mx.abs(got @ got.T - rows @ rows.T) / (norm[:, None] * norm[None])
    assert off.max().item() < 6 / math.sqrt(2048)


def test_projection_in_blocks_is_the_same(monkeypatch):
    # A row must not be seen by two blocks, nor a block be skipped.
    import mlxshim.nn.attribution as attribution

    monkeypatch.setattr(attribution, "_BLOCK", 64)
    ones = mx.eye(100)[None].reshape(100, 100)
    signs = random_projection({"w": ones}, 16) * 4
    assert mx.all(mx.abs(signs) == 1).item()
    assert abs(signs.mean().item()) < 0.1


@pytest.mark.parametrize("chunk_size", [None, 3])
def test_gradient_features(chunk_size):
    model, (x, y) = Small(), data()
    losses, features = gradient_features(model, loss, 64, seed=5, chunk_size=chunk_size)(
        model, x, y
    )
    assert losses.shape == (7,)
    from mlxshim.nn import per_sample_value_and_grad

    grads = per_sample_value_and_grad(model, loss)(model, x, y)[1]
    close(features, random_projection(grads, 64, seed=5))


def test_trak_is_its_formula():
    trains = [mx.random.normal((20, 6)) for _ in range(2)]
    tests = [mx.random.normal((3, 6)) for _ in range(2)]
    residuals = [mx.random.uniform(shape=(20,)) for _ in range(2)]
    parts = []
    for phi, psi in zip(trains, tests):
        phi, psi = np.array(phi, np.float64), np.array(psi, np.float64)
        parts.append(psi @ np.linalg.inv(phi.T @ phi) @ phi.T)
    want = np.mean(parts, axis=0) * np.mean([np.array(q) for q in residuals], axis=0)
    close(trak(trains, tests, residuals), mx.array(want.astype(np.float32)))
    strong = trak(trains[0], tests[0], residuals[0], ridge=1e4)
    direction = (tests[0] @ trains[0].T) * residuals[0]
    level = 1e4 * mx.trace(trains[0].T @ trains[0]) / 6
    close(strong * level, direction, 2e-3)


def test_trak_refuses():
    a = mx.zeros((4, 2))
    with pytest.raises(ValueError, match="as many"):
        trak([a, a], [a], [a])
    with pytest.raises(ValueError, match="residuals"):
        trak(a, a, mx.zeros((3,)))


# Adapters by the row ---------------------------------------------------------------------------


class Wide(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = [nn.Linear(32, 64), nn.Linear(64, 32, bias=False)]

    def __call__(self, x, shift=0.0):
        return self.layers[1](nn.silu(self.layers[0](x + shift)))


def adapted(bits):
    model = Wide()
    if bits:
        nn.quantize(model, group_size=32, bits=bits)
    return add_lora(model, rank=4)


def some_adapters(model, count=3):
    return [
        tree_map(lambda x: mx.random.normal(x.shape), model.trainable_parameters())
        for _ in range(count)
    ]


@pytest.mark.parametrize("bits", [None, 4, 8])
def test_every_row_has_its_adapter(bits):
    model = adapted(bits)
    adapters = some_adapters(model)
    rows, x, shift = mx.array([2, 0, 1, 1, 2]), mx.random.normal((5, 6, 32)), mx.array(0.3)
    got = per_row(model, stack_adapters(adapters), in_axes=(0, None))(rows, x, shift)
    want = mx.stack(
        [functional_call(model, adapters[r], a, shift) for r, a in zip(rows.tolist(), x)]
    )
    close(got, want)
    assert not np.allclose(got[2], got[0])


def test_only_adapters_are_trainable_and_start_at_nothing():
    model = Wide()
    x = mx.random.normal((3, 32))
    before = model(x)
    add_lora(model, rank=2, where=lambda path, layer: path.endswith("1"))
    assert mx.array_equal(model(x), before)
    names = {name for name, _ in tree_flatten(model.trainable_parameters())}
    assert names == {"layers.1.lora_a", "layers.1.lora_b"}
    with pytest.raises(ValueError, match="no linear layer"):
        add_lora(nn.Sequential(nn.ReLU()))
    with pytest.raises(ValueError, match="at least one"):
        stack_adapters([])


# A shared prompt -------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize(("batched", "size"), [(True, 7), (False, 7), (False, 0)])
def test_prompt_attention(heads, kv_heads, length, batched, size):
    lead = (2,) if batched else ()
    own, dim = 5, 8
    q = mx.random.normal((3, *lead, heads, length, dim))
    k, v = (mx.random.normal((3, *lead, kv_heads, own, dim)) for _ in range(2))
    prompt = tuple(mx.random.normal((*lead, kv_heads, size, dim)) for _ in range(2))

    def attend(q, k, v):
        return prompt_attention(q, prompt, k, v, scale=0.3)

    def whole(q, k, v):
        parts = [mx.concatenate([p, x], axis=-2) for p, x in zip(prompt, (k, v))]
        q, parts = (q, parts) if batched else (q[None], [x[None] for x in parts])
        out = mx.fast.scaled_dot_product_attention(q, *parts, scale=0.3, mask="causal")
        return out if batched else out[0]

    close(vmap(attend)(q, k, v), mx.stack([whole(*xs) for xs in zip(q, k, v)]))
    close(attend(q[0], k[0], v[0]), whole(q[0], k[0], v[0]))


def test_the_prompt_is_not_copied():
    rows, size, dim = 64, 4096, 32
    prompt = tuple(mx.random.normal((2, size, dim)) for _ in range(2))
    q = mx.random.normal((rows, 4, 1, dim))
    k, v = (mx.random.normal((rows, 2, 1, dim)) for _ in range(2))
    mx.eval(prompt, q, k, v)
    attend = vmap(lambda q, k, v: prompt_attention(q, prompt, k, v, scale=0.2))
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(attend(q, k, v))
    # Scores are rows * heads * size numbers; copies would be rows * 2 * kv_heads * size * dim.
    copies = rows * sum(x.nbytes for x in prompt)
    assert mx.get_peak_memory() - before < copies / 4


def test_prompt_attention_refuses():
    x = mx.zeros((3, 1, 4))
    with pytest.raises(ValueError, match="multiple"):
        prompt_attention(x, (x[:2], x[:2]), x[:2], x[:2], scale=1.0)
