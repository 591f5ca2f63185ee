"""Trees and shapes against JAX's."""

from __future__ import annotations

import collections
import types

import mlx.core as mx
import numpy as np
import pytest

import mlxshim
from mlxshim import ShapeDtypeStruct, eval_shape, grad, ravel_pytree, stop_gradient, tree_map, vmap

Point = collections.namedtuple("Point", "x y")

TREES = {
    "leaf": 1,
    "none": None,
    "list": [1, (2, None), []],
    "dict": {"b": 1, "a": {"z": 2, "y": (3,)}, "c": None},
    "namedtuple": Point(1, [2, {"k": 3}]),
    "ordered": collections.OrderedDict([("b", 1), ("a", 2)]),
    "empty": {},
}


@pytest.fixture(scope="module")
def jax():
    jax = pytest.importorskip("jax")
    flatten_util = pytest.importorskip("jax.flatten_util")
    return types.SimpleNamespace(
        tree=jax.tree_util, eval_shape=jax.eval_shape, np=jax.numpy, ravel=flatten_util.ravel_pytree
    )


@pytest.mark.parametrize("name", TREES)
def test_trees_against_jax(jax, name):
    tree = TREES[name]
    leaves, structure = mlxshim.tree_flatten(tree)
    want, theirs = jax.tree.tree_flatten(tree)
    if name != "ordered":  # whose leaves JAX takes in their order, and we by their keys
        assert leaves == want == mlxshim.tree_leaves(tree)
    assert structure.num_leaves == theirs.num_leaves
    assert mlxshim.tree_unflatten(structure, leaves) == tree
    assert type(mlxshim.tree_unflatten(structure, leaves)) is type(tree)
    assert mlxshim.tree_structure(tree) == structure
    assert hash(mlxshim.tree_structure(tree)) == hash(structure)
    assert tree_map(lambda x: x * 2, tree) == jax.tree.tree_map(lambda x: x * 2, tree)
    assert tree_map(lambda x, y: x - y, tree, tree) == jax.tree.tree_map(
        lambda x, y: x - y, tree, tree
    )
    others = [t for other, t in TREES.items() if other != name]
    assert all(mlxshim.tree_structure(t) != structure for t in others)


def test_leaves_by_choice_against_jax(jax):
    tree = {"a": [1, 2], "b": None, "c": Point(3, 4)}
    for is_leaf in (
        lambda x: isinstance(x, list),
        lambda x: x is None,
        lambda x: isinstance(x, tuple),
        lambda x: isinstance(x, dict),
    ):
        assert mlxshim.tree_leaves(tree, is_leaf) == jax.tree.tree_leaves(tree, is_leaf)
        assert mlxshim.tree_flatten(tree, is_leaf=is_leaf)[0] == jax.tree.tree_leaves(tree, is_leaf)
        assert tree_map(repr, tree, is_leaf=is_leaf) == jax.tree.tree_map(
            repr, tree, is_leaf=is_leaf
        )
    # What is below a leaf of the first tree goes along whole.
    assert tree_map(lambda x, y: (x, y), [1], [{"k": 2}]) == [(1, {"k": 2})]


@pytest.mark.parametrize(
    "first, second",
    [
        ([1], [1, 2]),
        ({"a": 1}, {"b": 1}),
        ([1], (1,)),
        (None, 1),
        ([None], [1]),
        ([1, [2]], [1, 2]),
    ],
)
def test_trees_that_do_not_fit(jax, first, second):
    with pytest.raises(ValueError):
        jax.tree.tree_map(lambda x, y: x, first, second)
    with pytest.raises(ValueError, match="number 2 does not fit the first"):
        tree_map(lambda x, y: x, first, second)


def test_another_number_of_leaves():
    with pytest.raises(ValueError, match="has 2 leaves, found 3"):
        mlxshim.tree_unflatten(mlxshim.tree_structure([1, 2]), [1, 2, 3])


def test_modules():
    from mlx import nn

    model = nn.Sequential(nn.Linear(2, 3), nn.GELU())
    doubled = tree_map(lambda x: x * 2 if isinstance(x, mx.array) else x, model)
    assert isinstance(doubled, nn.Sequential) and doubled is not model
    assert mx.array_equal(doubled.layers[0].weight, 2 * model.layers[0].weight)
    assert len(mlxshim.tree_leaves(model.parameters())) == 2
    vector, unravel = ravel_pytree(model.trainable_parameters())
    assert vector.shape == (9,)
    model.update(unravel(vector * 0))
    assert mx.array_equal(model.layers[0].weight, mx.zeros((3, 2)))


def test_ravel_against_jax(jax):
    def tree(array):
        return {
            "w": array(np.arange(6, dtype=np.float32).reshape(2, 3)),
            "b": [array(np.float32(7.0)), array(np.array([8, 9], np.float16))],
            "n": array(np.array([1, 2], np.int32)),
        }

    vector, unravel = ravel_pytree(pytree=tree(mx.array))
    want, theirs = jax.ravel(pytree=tree(jax.np.array))
    np.testing.assert_array_equal(np.array(vector), np.array(want))
    assert np.array(vector).dtype == want.dtype
    for a, b in zip(
        mlxshim.tree_leaves(unravel(vector)), jax.tree.tree_leaves(theirs(want)), strict=True
    ):
        np.testing.assert_array_equal(np.array(a), np.array(b))
        assert np.array(a).dtype == b.dtype
    with pytest.raises(ValueError, match="vector of shape"):
        unravel(vector[1:])
    with pytest.raises(TypeError, match="is no array"):
        ravel_pytree({"a": "word"})
    # Under transforms.
    x = mx.array(np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32))

    def f(x):
        vector, unravel = ravel_pytree({"a": x, "b": x.sum()})
        parts = unravel(vector * vector)
        return parts["a"].sum() + parts["b"]

    want = mx.stack([2 * row + 2 * row.sum() for row in x])
    assert mx.allclose(vmap(grad(f))(x), want, atol=1e-5)


def test_eval_shape_against_jax(jax):
    def f(np):
        def of(tree, k, *, scale):
            x = tree["x"]
            return {"y": x @ tree["w"] * scale, "n": (x > k).sum(axis=0), "none": None}

        return of

    shapes = {"x": (5, 2), "w": (2, 3)}
    ours = eval_shape(f(mx), {k: mx.ones(s) for k, s in shapes.items()}, 2, scale=mx.array(3.0))
    theirs = jax.eval_shape(
        f(jax.np), {k: jax.np.ones(s) for k, s in shapes.items()}, 2, scale=jax.np.array(3.0)
    )
    assert ours["none"] is theirs["none"] is None
    for key in ("y", "n"):
        assert ours[key].shape == theirs[key].shape
        assert str(theirs[key].dtype) == str(ours[key].dtype).removeprefix("mlx.core.")
    given = {k: ShapeDtypeStruct(s, mx.float32) for k, s in shapes.items()}
    assert eval_shape(f(mx), given, 2, scale=3.0) == ours
    assert ours["y"] == ShapeDtypeStruct((5, 3), mx.float32)
    assert (ours["y"].ndim, ours["y"].size) == (2, 15)


def test_eval_shape_computes_nothing():
    big = ShapeDtypeStruct((1 << 20, 1 << 20), mx.float32)
    assert eval_shape(lambda x: (x @ x).sum(), big) == ShapeDtypeStruct((), mx.float32)
    before = mx.random.state[0]
    eval_shape(lambda x: x + mx.random.normal(x.shape), mx.ones(3))
    assert mx.array_equal(mx.random.state[0], before)
    forever = lambda x: mlxshim.while_loop(lambda s: s < 1, lambda s: s * 2, x)  # noqa: E731
    assert eval_shape(forever, mx.array(0.0)) == ShapeDtypeStruct((), mx.float32)
    assert eval_shape(vmap(grad(forever)), mx.zeros(4)) == ShapeDtypeStruct((4,), mx.float32)
    with pytest.raises(mlxshim.ConcretizationError, match="reads the value"):
        eval_shape(lambda x: x if x.item() > 0 else -x, mx.array(1.0))
    with pytest.raises(ValueError):
        eval_shape(lambda x, y: x @ y, mx.ones((2, 3)), mx.ones((2, 4)))


def test_stop_gradient_of_trees():
    def f(x):
        kept = stop_gradient({"a": x * x, "b": [x, None, "word"]})
        assert kept["b"][2] == "word"
        return kept["a"] * x + kept["b"][0]

    xs = mx.array([1.0, 2.0])
    assert vmap(grad(f))(xs).tolist() == [1.0, 4.0]
    assert mlxshim.jvp(f, (xs[1],), (mx.array(1.0),))[1].item() == 4.0
    assert grad(grad(f))(xs[0]).item() == 0.0
