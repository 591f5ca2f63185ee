"""Draws without a key: each sample its own, reproducible, in every composition."""

from __future__ import annotations

import inspect

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlxshim import grad, jvp, vmap
from mlxshim.rules.random import DRAWS

N, M = 5, 4
CALLS = {
    "bernoulli": lambda: mx.random.bernoulli(0.5, (64,)),
    "categorical": lambda: mx.random.categorical(mx.zeros((16, 8))),
    "gumbel": lambda: mx.random.gumbel((3,)),
    "laplace": lambda: mx.random.laplace((3,)),
    "multivariate_normal": lambda: mx.random.multivariate_normal(
        mx.zeros(3), mx.eye(3), stream=mx.cpu
    ),
    "normal": lambda: mx.random.normal((3,)),
    "permutation": lambda: mx.random.permutation(64),
    "randint": lambda: mx.random.randint(0, 1 << 20, (3,)),
    "truncated_normal": lambda: mx.random.truncated_normal(-1, 1, (3,)),
    "uniform": lambda: mx.random.uniform(shape=(3,)),
}


def distinct(draws: mx.array, leading: int = 1) -> int:
    """How many different draws there are along the leading axes."""
    rows = mx.reshape(draws, (-1, *draws.shape[leading:]))
    return len({str(row.tolist()) for row in rows})


def test_every_function_that_draws_is_known():
    signatures = {name: inspect.getdoc(getattr(mx.random, name)) or "" for name in dir(mx.random)}
    takes_a_key = {name for name, doc in signatures.items() if "key: " in doc.partition("\n")[0]}
    assert takes_a_key - {"split"} == set(DRAWS) == set(CALLS)


@pytest.mark.parametrize("name", CALLS)
def test_each_sample_draws_its_own(name):
    draw = CALLS[name]
    once = vmap(lambda x: draw(), axis_size=N)
    first, second = once(mx.zeros(N)), once(mx.zeros(N))
    assert first.shape == (N, *draw().shape) and first.dtype == draw().dtype
    assert distinct(mx.concatenate([first, second])) == 2 * N
    mx.random.seed(0)
    assert mx.array_equal(once(mx.zeros(N)), first) and mx.array_equal(once(mx.zeros(N)), second)
    twice = vmap(vmap(lambda x: draw()))(mx.zeros((N, M)))
    assert distinct(twice, 2) == N * M


def test_a_nested_vmap_draws_for_each_pair():
    pairwise = vmap(
        vmap(lambda x, y: x + y + mx.random.uniform(), in_axes=(None, 0)), in_axes=(0, None)
    )
    assert distinct(pairwise(mx.zeros(N), mx.zeros(M)), 2) == N * M
    three = vmap(vmap(vmap(lambda x: x + mx.random.uniform())))(mx.zeros((2, 3, 4)))
    assert distinct(three, 3) == 24


@pytest.mark.parametrize("outer", ["different", "same"])
@pytest.mark.parametrize("inner", ["different", "same"])
def test_what_is_the_same_at_which_level(outer, inner):
    f = vmap(lambda x: x + mx.random.uniform(), randomness=inner)
    draws = vmap(f, randomness=outer)(mx.zeros((N, M)))
    assert distinct(draws, 2) == (N if outer == "different" else 1) * (
        M if inner == "different" else 1
    )
    assert distinct(draws, 1) == (N if outer == "different" else 1)


@pytest.mark.parametrize("name", CALLS)
def test_error_names_the_function(name):
    with pytest.raises(ValueError, match=rf"mx\.random\.{name}.*randomness='error'"):
        vmap(lambda x: CALLS[name](), randomness="error")(mx.zeros(N))
    with pytest.raises(ValueError, match=rf"mx\.random\.{name}"):
        vmap(vmap(lambda x: CALLS[name]()), randomness="error")(mx.zeros((N, M)))


def test_a_key_of_ones_own_is_left_alone():
    key, keys = mx.random.key(7), mx.random.split(mx.random.key(7), N)
    shared = vmap(lambda x: x + mx.random.uniform(key=key), randomness="error")(mx.zeros(N))
    assert distinct(shared) == 1
    positional = vmap(lambda k: mx.random.normal((2,), mx.float32, 0, 1, k), randomness="error")
    want = mx.stack([mx.random.normal((2,), key=k) for k in keys])
    assert mx.array_equal(positional(keys), want)
    nobody = vmap(lambda x: mx.random.normal((2,), mx.float32, 0, 1, None))(mx.zeros(N))
    assert distinct(nobody) == N


def test_the_global_state_moves_on_as_for_one_draw():
    mx.random.seed(3)
    mx.random.uniform()
    after = mx.random.uniform()
    mx.random.seed(3)
    vmap(lambda x: mx.random.uniform(shape=(2,)))(mx.zeros(N))
    assert mx.array_equal(mx.random.uniform(), after)


def test_seeding_inside_makes_the_samples_the_same():
    def f(x):
        mx.random.seed(1)
        return x + mx.random.uniform()

    want = mx.stack([f(x) for x in mx.zeros(N)])
    assert mx.array_equal(vmap(f)(mx.zeros(N)), want)
    assert mx.array_equal(vmap(vmap(f))(mx.zeros((2, N)))[1], want)


def test_draws_are_good_random_numbers():
    draws = vmap(lambda x: mx.random.normal((500,)))(mx.zeros(200))
    assert abs(mx.mean(draws).item()) < 0.02 and abs(mx.var(draws).item() - 1) < 0.02
    means = mx.mean(draws, axis=1)
    assert abs(mx.var(means).item() * 500 - 1) < 0.4  # independent between samples
    neighbours = mx.mean(draws[1:] * draws[:-1]).item()
    assert abs(neighbours) < 0.02


def noisy(x: mx.array) -> mx.array:
    return mx.sum(x * mx.random.normal(x.shape))


def test_with_derivatives():
    x = mx.ones((N, 6))

    def seeded(thunk):
        mx.random.seed(5)
        return thunk()

    noise = seeded(lambda: vmap(lambda a: mx.random.normal(a.shape))(x))
    assert distinct(noise) == N
    for got in (
        seeded(lambda: vmap(grad(noisy))(x)),
        seeded(lambda: grad(lambda a: vmap(noisy)(a).sum())(x)),
        seeded(lambda: mx.compile(vmap(grad(noisy)), mx.random.state, mx.random.state)(x)),
    ):
        assert mx.allclose(got, noise)
    total = noise.sum(axis=1)
    assert mx.allclose(seeded(lambda: jvp(vmap(noisy), [x], [x])[1][0]), total)
    assert mx.allclose(seeded(lambda: vmap(lambda a, t: jvp(noisy, [a], [t])[1][0])(x, x)), total)


def test_bounds_have_their_gradient():
    def f(low, high):
        return mx.random.uniform(low, high)

    low, high = mx.zeros(N), mx.ones(N)
    mx.random.seed(2)
    u = vmap(f)(low, high)
    mx.random.seed(2)
    assert mx.allclose(vmap(grad(f, argnums=1))(low, high), u)


def test_dropout_drops_for_each_sample():
    layer, x = nn.Dropout(0.5), mx.ones((N, 64))
    kept = vmap(layer)(x)
    assert distinct(kept) == N
    assert set(mx.reshape(kept, (-1,)).tolist()) == {0.0, 2.0}
    assert distinct(vmap(grad(lambda a: layer(a).sum()))(x)) == N
    assert distinct(vmap(layer, randomness="same")(x)) == 1
    layer.eval()
    assert mx.array_equal(vmap(layer, randomness="error")(x), x)


def test_compiled_outside():
    f = vmap(lambda x: x + mx.random.uniform())
    compiled = mx.compile(f, inputs=mx.random.state, outputs=mx.random.state)
    x = mx.zeros(N)
    mx.random.seed(0)
    want = [f(x), f(x)]
    mx.random.seed(0)
    got = [compiled(x), compiled(x)]
    assert mx.array_equal(mx.stack(got), mx.stack(want)) and distinct(mx.concatenate(got)) == 2 * N


def test_compiled_inside():
    f = mx.compile(
        lambda x: x + mx.random.uniform(), inputs=mx.random.state, outputs=mx.random.state
    )
    x = mx.zeros(N)
    draws = mx.concatenate([vmap(f)(x), vmap(f)(x), mx.reshape(f(mx.array(0.0)), (1,))])
    assert distinct(draws) == 2 * N + 1
    assert distinct(vmap(vmap(f))(mx.zeros((N, M))), 2) == N * M


@pytest.mark.parametrize("captured", [mx.random.state, None])
def test_compiled_inside_with_nothing_mapped(captured):
    """Before the vmap, in it, and in the next: each sample draws, and nothing is left behind."""
    kwargs = {} if captured is None else {"inputs": captured, "outputs": captured}
    noise, zero = mx.compile(lambda s: s + mx.random.uniform(), **kwargs), mx.array(0.0)
    for compiled_before in (False, True):
        draws = [vmap(lambda x: x + noise(zero))(mx.zeros(N)) for _ in range(2)]
        assert distinct(mx.concatenate(draws)) == 2 * N
        if not compiled_before:
            mx.eval(noise(zero))
    assert distinct(vmap(vmap(lambda x: x + noise(zero)))(mx.zeros((N, M))), 2) == N * M
    outer = mx.compile(
        vmap(lambda x: x + noise(zero)), inputs=mx.random.state, outputs=mx.random.state
    )
    assert distinct(outer(mx.zeros(N))) == N
    mx.eval(noise(zero))


def test_compilation_is_on_again_after_a_vmap():
    calls = []

    def counted(x):
        calls.append(x)
        return x

    compiled = mx.compile(counted)

    def runs() -> int:
        before = len(calls)
        compiled(mx.array(1.0))
        return len(calls) - before

    runs()
    vmap(lambda x: x + compiled(mx.array(1.0)))(mx.zeros(3))
    assert len(calls) == 2 and runs() == 0
    with pytest.raises(KeyError):
        vmap(lambda x: {}[0])(mx.zeros(3))
    assert runs() == 0
    mx.disable_compile()
    try:
        vmap(lambda x: x)(mx.zeros(3))
        assert runs() == 1
    finally:
        mx.enable_compile()
    assert runs() == 0


def test_no_samples():
    assert vmap(lambda x: x + mx.random.uniform(shape=(2,)))(mx.zeros((0, 2))).shape == (0, 2)
