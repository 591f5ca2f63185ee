"""Draws with a key of their own; those without one are in `tests/test_random.py`."""

from __future__ import annotations

import mlx.core as mx

from .case import case, integers, normal, uniform

key = integers(2, high=1 << 20, dtype=mx.uint32)

case("random.key", lambda x: x + mx.random.uniform(key=mx.random.key(3)), normal(3))
case("random.split", lambda k: mx.random.split(k), key)
case("random.split/num", lambda k: mx.random.split(k, 5), key)
case("random.uniform", lambda k: mx.random.uniform(shape=(2, 3), key=k), key)
case(
    "random.uniform/bounds",
    lambda k, low, high: mx.random.uniform(low, high, (3, 4), key=k),
    key,
    normal(4),
    normal(3, 1),
)
case("random.uniform/float16", lambda k: mx.random.uniform(0, 2, (3,), mx.float16, k), key)
case("random.normal", lambda k: mx.random.normal((2, 3), key=k), key)
case(
    "random.normal/loc and scale",
    lambda k, loc, scale: mx.random.normal((3, 2), loc.dtype, loc, scale, k),
    key,
    normal(2),
    normal(3, 1),
)
case("random.normal/complex", lambda k: mx.random.normal((3,), mx.complex64, key=k), key)
case("random.bernoulli", lambda k: mx.random.bernoulli(0.4, (2, 5), k), key)
case("random.bernoulli/p", lambda k, p: mx.random.bernoulli(p, key=k), key, uniform(2, 5))
case(
    "random.randint",
    lambda k, low, high: mx.random.randint(low, high, (3, 4), key=k),
    key,
    integers(4),
    integers(3, 1, low=10, high=50),
)
case("random.categorical", lambda k, x: mx.random.categorical(x, key=k), key, normal(4, 6))
case("random.categorical/one", lambda k, x: mx.random.categorical(x, key=k), key, normal(6))
case("random.categorical/axis", lambda k, x: mx.random.categorical(x, 0, key=k), key, normal(6, 4))
case(
    "random.categorical/shape",
    lambda k, x: mx.random.categorical(x, shape=(3, 4), key=k),
    key,
    normal(4, 6),
)
case(
    "random.categorical/num_samples",
    lambda k, x: mx.random.categorical(x, num_samples=7, key=k),
    key,
    normal(2, 6),
)
case(
    "random.categorical/one distribution",
    lambda k, x: mx.random.categorical(x, num_samples=7, key=k),
    key,
    normal(6),
    dtypes=(mx.float32, mx.float16),
)
case(
    "random.categorical/one distribution, shape, axis",
    lambda k, x: mx.random.categorical(x, axis=0, shape=(3, 4), key=k),
    key,
    normal(6, 1),
)
case("random.gumbel", lambda k: mx.random.gumbel((2, 3), key=k), key)
case(
    "random.truncated_normal",
    lambda k, low, high: mx.random.truncated_normal(low, high, (3, 4), key=k),
    key,
    uniform(4, low=-1.0, high=0.0),
    uniform(3, 1, low=0.5, high=2.0),
)
case(
    "random.truncated_normal/no shape",
    lambda k, low: mx.random.truncated_normal(low, 2.0, key=k),
    key,
    uniform(4, low=-1.0, high=0.0),
)
case("random.laplace", lambda k: mx.random.laplace((2, 3), loc=1.0, scale=2.0, key=k), key)
case("random.permutation", lambda k: mx.random.permutation(7, key=k), key)
case("random.permutation/array", lambda k, x: mx.random.permutation(x, key=k), key, normal(5, 2))
case(
    "random.permutation/axis",
    lambda k, x: mx.random.permutation(x, axis=1, key=k),
    key,
    normal(2, 5),
)


def _multivariate_normal(k: mx.array, mean: mx.array, root: mx.array) -> mx.array:
    with mx.stream(mx.cpu):  # of its singular value decomposition
        covariance = root @ mx.swapaxes(root, -1, -2)
        return mx.random.multivariate_normal(mean, covariance, (4,), key=k)


case("random.multivariate_normal", _multivariate_normal, key, normal(3), normal(3, 3))
