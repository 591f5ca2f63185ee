"""DP-SGD: batches, noise, accounting."""

from __future__ import annotations

import math

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from nn_models import close_trees, dense_case

from mlxshim.nn import clipped_grad, privacy
from mlxshim.nn.privacy import epsilon, noise_multiplier_for, noisy, poisson_batches, private_grad


def test_batches_are_independent_draws():
    size, rate, steps = 400, 0.1, 300
    counts, sizes = [0] * size, []
    for indices, present in poisson_batches(size, rate, steps, key=mx.random.key(0)):
        chosen = indices.tolist()
        assert present.all().item() if chosen else True
        assert len(set(chosen)) == len(chosen)
        sizes.append(len(chosen))
        for i in chosen:
            counts[i] += 1
    mean = sum(sizes) / steps
    spread = sum((s - mean) ** 2 for s in sizes) / steps
    # Binomial: means within 5 standard deviations of theirs, the variance near 36.
    assert abs(mean - 40) < 5 * math.sqrt(36 / steps)
    assert 25 < spread < 50
    assert all(abs(c - 30) < 6 * math.sqrt(27) for c in counts)
    assert len(set(counts)) > 10


def test_batches_are_padded():
    seen = set()
    for indices, present in poisson_batches(50, 0.02, 60, key=mx.random.key(1), multiple=4):
        count = int(present.sum())
        seen.add(count)
        assert len(indices) == len(present) == max(4, -(-count // 4) * 4)
        assert present.tolist() == [True] * count + [False] * (len(indices) - count)
    assert 0 in seen and len(seen) > 2
    (whole,) = poisson_batches(5, 1.0, 1, key=mx.random.key(1))
    assert sorted(whole.indices.tolist()) == list(range(5))


def test_padded_samples_count_for_nothing():
    model, loss, (x, y) = dense_case()

    def masked(model, x, y, present):
        return present * loss(model, x, y)

    indices = mx.array([2, 4, 0, 0])
    present = mx.array([True, True, False, False])
    got = clipped_grad(model, masked, 0.5)(model, x[indices], y[indices], present)
    want = clipped_grad(model, loss, 0.5)(model, x[indices[:2]], y[indices[:2]])
    close_trees(got[1], dict(tree_flatten(want[1])))


def test_noise():
    tree = {"a": mx.zeros((200, 50)), "b": [mx.zeros((3000,), mx.bfloat16)]}
    got = noisy(tree, 3.0, mx.random.key(0))
    again, other = noisy(tree, 3.0, mx.random.key(0)), noisy(tree, 3.0, mx.random.key(1))
    assert mx.array_equal(got["a"], again["a"]) and not mx.array_equal(got["a"], other["a"])
    assert got["b"][0].dtype == mx.bfloat16
    for x in (got["a"], got["b"][0].astype(mx.float32)):
        assert abs(float(x.mean())) < 5 * 3 / math.sqrt(x.size)
        assert abs(float(mx.std(x)) - 3) < 5 * 3 / math.sqrt(2 * x.size)
    flat = mx.concatenate([got["a"].reshape(-1)[:3000, None], got["b"][0][:, None]], axis=1)
    assert abs(float((flat[:, 0] * flat[:, 1]).mean())) < 5 * 9 / math.sqrt(3000)


def test_private_gradients():
    model, loss, data = dense_case()
    clean = dict(tree_flatten(clipped_grad(model, loss, 0.5)(model, *data)[1]))
    step = private_grad(model, loss, 0.5, 0.0, expected_samples=8)
    got = step(model, *data, key=mx.random.key(0))
    close_trees(got[1], {name: g / 8 for name, g in clean.items()})
    noise = private_grad(model, loss, 0.5, 2.0, expected_samples=8)
    found = []
    for i in range(64):
        grads = tree_flatten(noise(model, *data, key=mx.random.key(i))[1])
        found += [((g - clean[n] / 8) * 8).reshape(-1) for n, g in grads]
    all_of_it = mx.concatenate(found)
    assert abs(float(mx.std(all_of_it)) - 1.0) < 5 / math.sqrt(2 * all_of_it.size)
    empty = noise(model, *(x[:0] for x in data), key=mx.random.key(0))
    assert float(mx.abs(empty[1]["layers"][0]["weight"]).max()) > 0


def test_it_learns_with_noise():
    """A few hundred samples, two blobs: noise slows it down, it learns all the same."""
    mx.random.seed(3)
    y = mx.arange(400) % 2
    x = mx.random.normal((400, 2)) + 2.0 * (2 * y[:, None] - 1)
    model = nn.Linear(2, 2)

    def loss(model, x, y, present):
        return present * nn.losses.cross_entropy(model(x), y)

    step = private_grad(model, loss, 1.0, 1.0, expected_samples=80)
    batches = poisson_batches(400, 0.2, 30, key=mx.random.key(0), multiple=32)
    for i, (indices, present) in enumerate(batches):
        grads = step(model, x[indices], y[indices], present, key=mx.random.key(100 + i))[1]
        weights = dict(tree_flatten(model.parameters()))
        model.update({n: weights[n] - 0.5 * g for n, g in tree_flatten(grads)})
        mx.eval(model.parameters())
    assert float((mx.argmax(model(x), axis=1) == y).mean()) > 0.9


def test_accounting(monkeypatch):
    pytest.importorskip("dp_accounting")
    monkeypatch.setattr(privacy, "GRID", 1e-2)
    found = epsilon(1.0, 0.05, 20, 1e-5)
    # Between no privacy loss at all and what one release of the Gaussian mechanism bounds.
    assert 0.1 < found < epsilon(0.7, 0.05, 20, 1e-5)
    # dp-accounting's other accountant, by Renyi divergences, which is an upper bound too.
    import dp_accounting
    from dp_accounting import rdp

    event = dp_accounting.PoissonSampledDpEvent(0.05, dp_accounting.GaussianDpEvent(1.0))
    accountant = rdp.RdpAccountant()
    accountant.compose(dp_accounting.SelfComposedDpEvent(event, 20))
    assert found < accountant.get_epsilon(1e-5) < 2 * found
    noise = noise_multiplier_for(found, 0.05, 20, 1e-5)
    assert abs(noise - 1.0) < 0.01


@pytest.mark.parametrize(
    "arguments, word",
    [((10, 0.0, 1), "rate"), ((10, 1.5, 1), "rate"), ((0, 0.5, 1), "size")],
)
def test_errors(arguments, word):
    with pytest.raises(ValueError, match=word):
        poisson_batches(*arguments, key=mx.random.key(0))
