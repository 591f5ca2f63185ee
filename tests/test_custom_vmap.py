"""custom_vmap against JAX's."""

from __future__ import annotations

import mlx.core as mx
from libraries import OURS, normal, same

import mlxshim
from mlxshim import grad, jvp, vmap


def with_rule(lib, seen):
    @lib.custom_vmap
    def f(x, tree):
        return {"sum": x + tree["y"], "y": lib.np.sin(tree["y"])}

    @f.def_vmap
    def rule(axis_size, in_batched, x, tree):
        x_batched, tree_batched = in_batched
        seen.append((axis_size, x_batched, tree_batched["y"], x.shape, tree["y"].shape))
        return (
            {"sum": 100 * x + tree["y"], "y": lib.np.cos(tree["y"])},
            {"sum": x_batched or tree_batched["y"], "y": tree_batched["y"]},
        )

    return f


def test_custom_vmap(jax):
    def under(lib):
        seen = []
        f = with_rule(lib, seen)
        xs, grid = normal(lib, 4, seed=1), normal(lib, 3, 4, seed=2)
        both = lambda x, y: f(x, {"y": y})  # noqa: E731
        sums = lambda *a: lib.vmap(both)(*a)["sum"].sum()  # noqa: E731
        found = [
            both(xs[0], xs[1]),
            lib.vmap(both)(xs, xs),
            lib.vmap(both, in_axes=(0, None))(xs, xs[0]),
            lib.vmap(both, in_axes=(None, 0))(xs[0], xs),
            lib.vmap(both, in_axes=(None, 1))(xs[:3], grid),
            lib.vmap(lib.vmap(both, in_axes=(0, None)), in_axes=(None, 0))(xs, xs),
            lib.vmap(lib.vmap(both))(grid, grid),
            lib.grad(sums)(xs, xs),
            lib.jvp(lib.vmap(both), (xs, xs), (xs, xs)),
            lib.vmap(lambda x: lib.jvp(both, (x, x), (x, x)))(xs),
            lib.jit(lib.vmap(both))(xs, xs),
        ]
        return found, [entry[:3] for entry in seen[:4]]

    (got, seen), (want, seen_by_jax) = under(OURS), under(jax)
    same(got, want)
    assert seen == seen_by_jax


def test_custom_vmap_where_jax_has_no_derivative():
    f = mlxshim.custom_vmap(lambda x, y: mx.sin(x) * y)
    calls = []

    @f.def_vmap
    def rule(size, in_batched, x, y):
        calls.append(size)
        return mx.sin(x) * y, True

    xs, ys = normal(OURS, 4), normal(OURS, 4, seed=1)
    plain = lambda x, y: mx.sin(x) * y  # noqa: E731
    for transform in (
        lambda f: vmap(grad(f, argnums=(0, 1))),
        lambda f: vmap(grad(grad(f))),
        lambda f: vmap(lambda x, y: jvp(grad(f), (x, y), (y, x))),
        lambda f: vmap(lambda x, y: vmap(grad(f), in_axes=(None, 0))(x, ys) * y),
        lambda f: grad(lambda x, y: vmap(grad(f))(x, y).sum()),
        lambda f: mx.compile(vmap(grad(f))),
    ):
        calls.clear()
        same(transform(f)(xs, ys), transform(plain)(xs, ys))
        assert calls and set(calls) == {4}
