"""vmap: axes, trees, keyword arguments, leaves that are no arrays, and its errors."""

from __future__ import annotations

import collections
import dataclasses
import functools
import io
import threading

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

import mlxshim
from mlxshim import grad, vmap
from mlxshim.core import interception, trees

Pair = collections.namedtuple("Pair", "a b")


@dataclasses.dataclass
class Record:
    w: object


def rand(*shape):
    return mx.random.normal(shape)


def same(got, want):
    assert got.shape == want.shape
    assert bool(mx.allclose(got, want, rtol=1e-5, atol=1e-6))


@pytest.mark.parametrize("axis", [0, 1, 2, -1, -2, -3])
def test_every_axis(axis):
    x = rand(2, 3, 4)
    want = mx.stack([mx.sin(mx.take(x, i, axis=axis)) for i in range(x.shape[axis])])
    same(vmap(mx.sin, in_axes=axis)(x), want)


@pytest.mark.parametrize("axis", [0, 1, 2, -1, -2, -3])
def test_every_out_axis(axis):
    x = rand(5, 3, 4)
    same(vmap(mx.sin, out_axes=axis)(x), mx.moveaxis(mx.sin(x), 0, axis))


def test_trees_of_axes():
    tree = {"w": rand(3, 4), "rest": [rand(4), (rand(4, 3), None)]}
    axes = {"w": 0, "rest": [None, (1, None)]}

    def f(t, x):
        b, (c, nothing) = t["rest"]
        assert nothing is None
        return {"sum": t["w"] + b, "both": (c * x, t["w"] @ c)}

    x = rand(3, 4)
    got = vmap(f, in_axes=(axes, 0), out_axes={"sum": 1, "both": (0, -1)})(tree, x)
    want = [
        f({"w": tree["w"][i], "rest": [tree["rest"][0], (tree["rest"][1][0][:, i], None)]}, x[i])
        for i in range(3)
    ]
    same(got["sum"], mx.stack([w["sum"] for w in want], axis=1))
    same(got["both"][0], mx.stack([w["both"][0] for w in want]))
    same(got["both"][1], mx.stack([w["both"][1] for w in want]))


def test_a_prefix_speaks_for_everything_below():
    tree = [rand(3, 2), {"a": rand(3, 2), "b": (rand(3, 2),)}]
    got = vmap(lambda t, y: (t[0] + t[1]["a"] + t[1]["b"][0]) * y, in_axes=(0, None))(tree, 2.0)
    same(got, 2 * (tree[0] + tree[1]["a"] + tree[1]["b"][0]))


@pytest.mark.parametrize("in_axes", [{"a": 0, "b": None}, ({"a": 0, "b": None},)])
def test_one_argument_in_both_forms(in_axes):
    x = {"a": rand(3, 2), "b": rand(2)}
    same(vmap(lambda t: t["a"] * t["b"], in_axes=in_axes)(x), x["a"] * x["b"])


def test_keywords_are_mapped_over_axis_0():
    x, y = rand(3, 2), rand(3, 2)
    got = vmap(lambda x, *, y, name: x - y if name == "minus" else x, in_axes=1)(
        x.T, y=y, name="minus"
    )
    same(got, x - y)


def test_other_leaves_are_passed_through():
    def f(x, n, flag, text, nothing, fun):
        assert (n, flag, text, nothing) == (3, True, "text", None)
        return fun(x) * n

    same(vmap(f)(y := rand(4, 2), 3, True, "text", None, mx.cos), mx.cos(y) * 3)


def test_numpy_arrays_are_mapped_too():
    x = np.random.default_rng(0).normal(size=(3, 2)).astype(np.float32)
    same(vmap(lambda a: a * 2)(x), mx.array(x * 2))


def test_named_tuples_and_modules_keep_their_type():
    layer = nn.Linear(2, 2)
    stacked = nn.Linear(2, 2)
    stacked.update({"weight": rand(3, 2, 2), "bias": rand(3, 2)})

    def f(pair, model):
        assert type(pair) is Pair and type(model) is nn.Linear
        return Pair(model(pair.a), pair.b)

    pair = Pair(rand(3, 2), rand(3, 2))
    before = stacked.weight
    got = vmap(f)(pair, stacked)
    assert type(got) is Pair and stacked.weight is before
    want = mx.stack([pair.a[i] @ stacked.weight[i].T + stacked.bias[i] for i in range(3)])
    same(got.a, want)
    same(vmap(lambda a, m: m(a), in_axes=(0, None))(pair.a, layer), layer(pair.a))


def test_nested_and_composed():
    x, y = rand(3, 4), rand(5, 4)
    pairwise = vmap(vmap(lambda a, b: mx.sin(a) @ b, in_axes=(None, 0)), in_axes=(0, None))
    same(pairwise(x, y), mx.sin(x) @ y.T)
    per_sample = vmap(grad(lambda w, a: (mx.tanh(a @ w)) ** 2), in_axes=(None, 0))
    w = rand(4)
    want = mx.stack([mx.grad(lambda w, a: mx.tanh(a @ w) ** 2)(w, a) for a in x])
    same(per_sample(w, x), want)


def test_output_that_no_sample_changes():
    x, y = rand(3, 2), rand(2)
    same(vmap(lambda a: y * 2)(x), mx.stack([y * 2] * 3))
    once, each = vmap(lambda a: (y * 2, a), out_axes=(None, 0))(x)
    same(once, y * 2)
    same(each, x)
    same(vmap(lambda a: y * 2, out_axes=None)(x), y * 2)


def test_zero_and_one_sample():
    assert vmap(lambda a: a * 2)(mx.zeros((0, 3))).shape == (0, 3)
    same(vmap(lambda a: a * 2)(x := rand(1, 3)), x * 2)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: vmap(lambda x: x, in_axes=2)(rand(3, 2)), ["x", "axis 2", "(3, 2)"]),
        (lambda: vmap(lambda x: x, in_axes=-3)(rand(3, 2)), ["x", "axis -3", "(3, 2)"]),
        (lambda: vmap(lambda x: x)(mx.array(1.0)), ["x", "scalar", "in_axes=None"]),
        (
            lambda: vmap(lambda left, right: left)(rand(3, 2), {"k": rand(4, 2)}),
            ["left", "size 3", "right['k']", "size 4"],
        ),
        (lambda: vmap(lambda x, y: x, in_axes=(0,))(rand(2), rand(2)), ["in_axes", "2 positional"]),
        (lambda: vmap(rand(2)), ["fun must be callable", "(2,)"]),
        (lambda: vmap(lambda x: x, in_axes=None)(rand(2)), ["Nothing is mapped"]),
        (lambda: vmap(lambda x: x)(3.0), ["Nothing is mapped"]),
        (lambda: vmap(lambda x: x, in_axes="0")(rand(2)), ["in_axes", "'0'", "str"]),
        (lambda: vmap(lambda x: x, in_axes=True), ["in_axes", "True", "bool"]),
        (lambda: vmap(lambda x: x, in_axes=([0, 0],))({"a": rand(2)}), ["in_axes", "dict", "x"]),
        (lambda: vmap(lambda x: x, in_axes=({"b": 0},))({"a": rand(2)}), ["in_axes", "'a'", "x"]),
        (lambda: vmap(lambda x: None)(rand(2)), ["None", "arrays"]),
        (lambda: vmap(lambda x: [])(rand(2)), ["no array"]),
        (lambda: vmap(lambda x: (x, "text"))(rand(2)), ["[1]", "text", "str"]),
        (lambda: vmap(lambda x: "text")(rand(2)), ["'text'", "str"]),
        (lambda: vmap(lambda x: x)(np.array(["a", "b"])), ["Nothing is mapped"]),
        (
            lambda: vmap(lambda d: d["x"])({"x": rand(2), "r": Record([rand(2)])}),
            ["d['r']", "dataclass, Record", "w holds arrays", "in_axes=None"],
        ),
        # Printing it would read the array in it: a loop, and its warning.
        (lambda: vmap(lambda x: Record(x))(rand(2)), ["an object of type Record"]),
        (lambda: vmap(lambda x: x, out_axes=2)(rand(2, 3)), ["out_axes", "2", "(3,)"]),
        (lambda: vmap(lambda x: (x, x), out_axes=(0,))(rand(2)), ["out_axes", "tuple of 2"]),
        (lambda: vmap(lambda x: x, out_axes=None)(rand(2)), ["out_axes is None", "depends"]),
    ],
)
def test_errors_say_what_is_wrong(call, words):
    with pytest.raises(ValueError) as raised:
        call()
    message = str(raised.value)
    assert message.startswith("[vmap]")
    for word in words:
        assert word in message, message


def test_objects_that_samples_share_are_handed_through():
    x, shared = rand(3, 2), Record(rand(2))
    same(vmap(lambda x, r: x * r.w, in_axes=(0, None))(x, shared), x * shared.w)
    same(vmap(lambda x, r: x * r.w)(x, Record(2.0)), x * 2)  # no arrays, nothing to map


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_every_way_out_undoes_interception(error):
    raw = mx.fast.scaled_dot_product_attention

    def fails(x):
        assert mx.fast.scaled_dot_product_attention is not raw
        raise error

    for transform in (vmap, grad, lambda f: vmap(grad(f)), lambda f: mx.compile(vmap(f))):
        with pytest.raises(error):
            transform(fails)(rand(2, 2)[0] if transform is grad else rand(2, 2))
        assert mx.fast.scaled_dot_product_attention is raw
        assert not interception.in_place()
    with pytest.raises(error):
        mlxshim.jvp(fails, [rand(2)], [rand(2)])
    with pytest.raises(error):
        mlxshim.vjp(fails, [rand(2)], [rand(2)])


def test_other_threads_see_nothing(monkeypatch):
    """While one thread traces, another calls the operation: it must reach MLX's own."""
    from mlxshim.rules import attention

    inside, done = threading.Event(), threading.Event()
    handled, result = [], []
    decompose = attention.decompose
    monkeypatch.setattr(
        attention,
        "decompose",
        lambda *a, **k: (handled.append(threading.current_thread()), decompose(*a, **k))[1],
    )
    q = rand(2, 1, 2, 4, 8)

    def plain():
        inside.wait(30)
        x = mx.random.normal((1, 2, 4, 8), stream=mx.cpu)
        out = mx.fast.scaled_dot_product_attention(x, x, x, scale=1.0, stream=mx.cpu)
        result.append(out.shape)
        done.set()

    def traced(x):
        inside.set()
        assert done.wait(30)
        return mx.fast.scaled_dot_product_attention(x, x, x, scale=1.0)

    other = threading.Thread(target=plain)
    other.start()
    assert vmap(traced)(q).shape == q.shape
    other.join()
    assert result == [(1, 2, 4, 8)]
    assert handled == [threading.current_thread()]


def test_what_was_replaced_before_us_is_what_we_call(monkeypatch):
    """Somebody else's patch of the operation is respected, and still there afterwards."""
    raw, seen = mx.fast.scaled_dot_product_attention, []

    def theirs(*args, **kwargs):
        seen.append(True)
        return raw(*args, **kwargs)

    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", theirs)
    x = rand(1, 2, 4, 8)
    grad(lambda x: mx.fast.scaled_dot_product_attention(x, x, x, scale=1.0).sum())(x)
    assert seen and mx.fast.scaled_dot_product_attention is theirs


def test_import_is_light():
    import subprocess
    import sys

    heavy = ("numpy", "mlx.nn", "matplotlib", "rich")
    code = f"import sys, mlxshim; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_an_output_may_be_there_twice():
    xs = mx.random.normal((2, 3, 5))
    twice = vmap(lambda x: [x, x], in_axes=1)(xs)
    assert [y.shape for y in twice] == [(3, 2, 5), (3, 2, 5)]
    assert mx.array_equal(twice[0], twice[1]).item()


@pytest.mark.parametrize("tree", [list, tuple, lambda ys: {"a": ys[0], "b": list(ys[1:])}])
def test_outputs_come_in_the_tree_of_the_function(tree):
    """Those of another shape than all before need not be told apart, and are no further nodes."""
    xs = mx.random.normal((2, 3, 5))

    def f(x):
        return tree([x, x.reshape(x.shape), x[:2], x.sum(), mx.sum(x)])

    def look(x):
        return tree([x + 1, x.sum(axis=0), x[:2]])

    for axis in (0, 1):
        out_axes = 0 if axis == 0 else -1
        got = vmap(f, in_axes=axis, out_axes=out_axes)(xs)
        want = [f(x) for x in mx.moveaxis(xs, axis, 0)]
        assert type(got) is type(want[0])
        columns = zip(*(mlxshim.tree_leaves(sample) for sample in want))
        for y, column in zip(mlxshim.tree_leaves(got), columns):
            same(y, mx.stack(list(column), axis=out_axes))
    graph = io.StringIO()
    mx.export_to_dot(graph, *mlxshim.tree_leaves(vmap(look)(xs)))
    assert "Transpose" not in graph.getvalue()


class Attributes(dict):
    pass


class Slots(dict):
    __slots__ = ("unit",)


class OwnWay(dict):
    def __copy__(self):
        new = OwnWay(self)
        new.unit = self.unit + " copied"
        return new


@pytest.mark.parametrize(
    "kind, of_copy",
    [(Attributes, False), (Slots, True), (OwnWay, True), (collections.OrderedDict, True)],
)
def test_a_dict_of_another_class_keeps_what_it_carries(kind, of_copy, monkeypatch):
    """One with nothing but entries and attributes, as a module, without the way of a pickle."""
    copied, seen = [], []
    monkeypatch.setattr(trees.copy, "copy", lambda x, f=trees.copy.copy: copied.append(x) or f(x))
    shared = kind(w=rand(3))
    shared.unit = "m"

    def f(x, shared):
        seen.append(shared)
        shared["w"] = shared["w"] * x
        shared.unit += "!"
        return shared["w"]

    x, w = rand(2), shared["w"]
    same(vmap(f, in_axes=(0, None))(x, shared), x[:, None] * w)
    assert type(seen[0]) is kind and seen[0] is not shared
    assert seen[0].unit == ("m copied!" if kind is OwnWay else "m!")
    assert shared["w"] is w and shared.unit == "m" and bool(copied) == of_copy


def test_an_unmapped_array_is_not_changed_in_place():
    def f(x, w):
        w += x
        return w * 2

    x, w = rand(2, 3), rand(3)
    want = mx.stack([f(x[i], mx.array(w)) for i in range(2)])
    before = mx.array(w)
    same(vmap(f, in_axes=(0, None))(x, w), want)
    same(w, before)


def test_mlx_functions_themselves():
    x, w = rand(4, 3, 8), rand(8)
    same(vmap(mx.array.sum, in_axes=1)(x), mx.sum(x, axis=(0, 2)))
    want = mx.fast.rms_norm(x, w, 1e-5)
    same(vmap(mx.fast.rms_norm, in_axes=(0, None, None))(x, w, 1e-5), want)
    norm = functools.partial(mx.fast.rms_norm, eps=1e-5)
    same(vmap(norm, in_axes=(0, None))(x, w), want)
    # MLX's own batching rule of divmod is wrong.
    quotient, rest = vmap(mx.divmod)(x, mx.abs(x[::-1]) + 1)
    want = mx.divmod(x, mx.abs(x[::-1]) + 1)
    same(quotient, want[0])
    same(rest, want[1])


def test_chunks_under_grad_of_an_inner_derivative():
    """Evaluation between chunks would lose the graph of what mx.vjp returns."""

    def f(a, c):
        return mlxshim.vjp(lambda a: a @ c, [a], [mx.ones((2, 2))])[0][0]

    def loss(a, c, size):
        return mx.sum(mx.sin(vmap(f, in_axes=(None, 0), chunk_size=size)(a, c)))

    a, c = rand(2, 3), rand(3, 3, 2)
    same(grad(loss)(a, c, 2), grad(loss)(a, c, None))


def test_no_samples_of_what_cannot_be_computed_for_none():
    keys = mx.zeros((0, 2), mx.uint32)
    assert vmap(mx.argmax)(keys).shape == (0,)
    assert vmap(lambda k: mx.random.normal((3,), key=k), out_axes=-1)(keys).shape == (3, 0)
    g = grad(lambda x, w: vmap(lambda x: mx.sum(x * w))(x).sum(), argnums=(0, 1))
    assert [y.shape for y in g(mx.zeros((0, 3)), mx.zeros(3))] == [(0, 3), (3,)]


def test_a_loop_over_empty_samples():
    def f(x):
        return mx.array(float(x.mean().item())) + x  # reads a value: a loop

    with pytest.warns(mlxshim.PerformanceWarning):
        assert vmap(f)(mx.zeros((2, 0))).shape == (2, 0)


def test_an_unmapped_argument_is_not_copied():
    w, x = mx.random.normal((1024, 1024)), mx.random.normal((2, 1024))
    mapped = mlxshim.vmap(lambda w, x: x @ w["w"], in_axes=(None, 0))
    mx.eval(mapped({"w": w}, x))
    mx.synchronize()
    active = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(mapped({"w": w}, x))
    mx.synchronize()
    assert mx.get_peak_memory() - active < w.nbytes / 2


PLAIN = {
    "dict": ({"b": rand(3), "w": rand(4, 3)}, {"w": 0, "b": None}),
    "list": ([rand(4, 3), rand(3)], [0, None]),
    "tuple in a dict": ({"t": (rand(3), rand(3, 4)), "none": {}}, {"t": (None, -1), "none": 0}),
    "a prefix": ({"deep": [{"w": rand(4, 3)}, rand(4, 3)], "b": rand(3)}, {"deep": 0, "b": None}),
    "an array": (rand(3, 4), 1),
    "a tuple of one": ((rand(4, 3),), (0,)),
    "shared": ({"w": rand(3), "b": [rand(3)]}, None),
    "not only arrays": ({"w": rand(4, 3), "n": 2, "none": None}, 0),
}


def leaves(tree):
    if isinstance(tree, (dict, list, tuple)):
        return [x for y in (tree.values() if isinstance(tree, dict) else tree) for x in leaves(y)]
    return [tree] if isinstance(tree, mx.array) else []


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("alone", [True, False])
def test_trees_by_either_way(name, alone, monkeypatch):
    """What MLX takes as it is and what is taken apart here must come to the same."""
    from mlxshim.transforms import vmap as module

    tree, axes = PLAIN[name]
    if alone and axes is None:
        pytest.skip("nothing is mapped")
    seen = []

    def f(tree, x=0.0):
        seen.append((type(tree), list(tree) if isinstance(tree, dict) else None))
        return sum(y * n for n, y in enumerate(leaves(tree), 2)) + x

    args, in_axes = ((tree,), (axes,)) if alone else ((tree, rand(4, 3)), (axes, 0))
    got = vmap(f, in_axes)(*args)
    monkeypatch.setattr(module, "plain_axes", lambda *args: None)
    same(got, vmap(f, in_axes)(*args))
    assert seen[0] == seen[1] and seen[0][0] is type(tree)


def test_a_tree_of_arrays_is_not_changed_in_place():
    def f(tree, x):
        tree["w"] += x
        tree["new"] = x
        tree["list"].append(x)
        return tree["w"] * 2

    tree = {"w": rand(3), "list": []}
    before, w, x = tree["w"], mx.array(tree["w"]), rand(2, 3)
    same(vmap(f, in_axes=(None, 0))(tree, x), 2 * (w + x))
    same(vmap(f, in_axes=({"w": None, "list": 0}, 0))(tree, x), 2 * (w + x))
    assert list(tree) == ["w", "list"] and tree["w"] is before and tree["list"] == []
    same(tree["w"], w)
