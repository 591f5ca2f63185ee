"""patched(): MLX's names for mlxshim's transforms, with MLX's arguments and answers."""

from __future__ import annotations

import ast
import gc
import linecache
import os
import sys
import threading
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from test_threads import alone

import mlxshim
from mlxshim import patched
from mlxshim.core import interception
from mlxshim.core.versions import MLX

NAMES = ("vmap", "grad", "value_and_grad", "vjp", "jvp", "checkpoint")
NATIVE = {name: getattr(mx, name) for name in NAMES}


#: What MLX raises where an operation has no batching rule.
NO_RULE = (ValueError, RuntimeError)


def undone() -> bool:
    return all(getattr(mx, name) is f for name, f in NATIVE.items()) and not interception._blocks


@pytest.fixture(autouse=True)
def _undone_after():
    yield
    assert undone()
    assert mlxshim.intercepted() == []


@pytest.fixture(scope="module")
def quantized():
    w = mx.random.normal((8, 32), key=mx.random.key(1))
    return mx.quantize(w, 32, 4)


def product(x, quantized):
    """An operation that mx.vmap has no rule for."""
    return mx.quantized_matmul(x, *quantized, group_size=32, bits=4)


# What it reaches ---------------------------------------------------------------------------------


def test_vmap_and_grad_are_ours(quantized):
    def loss(x):
        return product(x, quantized).square().sum()

    xs = mx.random.normal((3, 32))
    with pytest.raises(NO_RULE, match="vmap"):
        mx.eval(mx.vmap(mx.grad(loss))(xs))
    want = mx.stack([mx.grad(loss)(x) for x in xs])
    with patched():
        got = mx.vmap(mx.grad(loss))(xs)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("of", ["value_and_grad", "vjp", "jvp", "checkpoint"])
def test_each_transform_under_vmap(of, quantized):
    def f(x):
        return product(x, quantized).square().sum()

    def call(x):
        if of == "value_and_grad":
            return mx.value_and_grad(f)(x)
        if of == "vjp":
            return mx.vjp(f, [x], [mx.array(2.0)])[1][0]
        if of == "jvp":
            return mx.jvp(f, [x], [mx.ones_like(x)])[1][0]
        return mx.grad(lambda y: mx.checkpoint(f)(y).sqrt())(x)

    xs = mx.random.normal((3, 32))
    want = [call(x) for x in xs]
    with patched():
        got = mx.vmap(call)(xs)
    if of == "value_and_grad":
        want, got = [w[1] for w in want], got[1]
    np.testing.assert_allclose(got, mx.stack(want), rtol=1e-4, atol=1e-4)


def test_a_training_loop_of_somebody_elses(quantized):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 32)
            self.norm = nn.RMSNorm(32)

        def __call__(self, x):
            return product(self.norm(self.layer(x)), quantized)

    def per_sample(model, x):
        """Nothing in it is mlxshim's."""
        parameters = model.trainable_parameters()

        def loss(parameters, x):
            model.update(parameters)
            return model(x).square().mean()

        grads = mx.vmap(mx.grad(loss), in_axes=(None, 0))(parameters, x)
        model.update(parameters)
        return grads, nn.value_and_grad(model, lambda x: model(x).square().mean())(x)

    model, x = Model(), mx.random.normal((3, 4))
    with patched():
        grads, (value, mean) = per_sample(model, x)
    want = nn.value_and_grad(model, lambda x: model(x).square().mean())
    np.testing.assert_allclose(value, want(x)[0], rtol=1e-5)
    for i in range(3):
        got = grads["layer"]["weight"][i]
        np.testing.assert_allclose(got, want(x[i])[1]["layer"]["weight"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        grads["layer"]["weight"].mean(0), mean["layer"]["weight"], rtol=1e-4, atol=1e-5
    )


def test_random_numbers_are_a_loops():
    xs = mx.zeros((4, 3))
    assert len({tuple(r) for r in mx.vmap(lambda x: x + mx.random.normal((3,)))(xs).tolist()}) == 1
    with patched():
        got = mx.vmap(lambda x: x + mx.random.normal((3,)))(xs)
    assert len({tuple(r) for r in got.tolist()}) == 4


# MLX's conventions -------------------------------------------------------------------------------

X, Y = mx.array([1.0, 2.0]), mx.array([3.0, -4.0])
POINT = {"a": mx.array(2.0), "b": [mx.array([1.0, 3.0]), (mx.array(4.0),)]}


def two(x, y):
    return (x * x * y).sum()


def of_tree(p):
    return p["a"] * (p["b"][0] * p["b"][1][0]).sum()


def with_aux(x, y):
    return two(x, y), {"n": 3, "of": [x + y, None]}


CALLS = {
    "first": lambda: mx.grad(two)(X, Y),
    "one number": lambda: mx.grad(two, 1)(X, Y),
    "a list of one": lambda: mx.grad(two, [1])(X, Y),
    "a tuple of one": lambda: mx.grad(two, argnums=(1,))(X, Y),
    "several, not in order": lambda: mx.value_and_grad(two, (1, 0))(X, Y),
    "a name": lambda: mx.grad(two, argnames="y")(X, y=Y),
    "names": lambda: mx.value_and_grad(two, argnames=["y", "x"])(y=Y, x=X),
    "number and name": lambda: mx.grad(two, 0, "y")(X, y=Y),
    "tree": lambda: mx.value_and_grad(of_tree)(POINT),
    "auxiliary": lambda: mx.value_and_grad(with_aux, argnums=[0, 1])(X, Y),
    "integers": lambda: mx.grad(lambda n: (n * n).sum())(mx.array([2, 3])),
    "vjp": lambda: mx.vjp(lambda x, y: (x * y, x.sum()), (X, Y), (Y, mx.array(2.0))),
    "vjp of one": lambda: mx.vjp(mx.exp, [X], [Y]),
    "jvp": lambda: mx.jvp(lambda x, y: (x * y, x.sum()), [X, Y], [Y, X]),
    "jvp of tuples": lambda: mx.jvp(mx.sin, (X,), (Y,)),
    "vmap": lambda: mx.vmap(two, (0, None))(X, Y),
    "vmap of a tree": lambda: mx.vmap(lambda p: p["a"] + p["b"], {"a": 0, "b": 0})(
        {"a": X, "b": Y}
    ),
    "vmap out": lambda: mx.vmap(lambda x, y: (x * y, y), (0, 0), (1, 0))(
        mx.ones((2, 3)), mx.ones((2, 1))
    ),
    "an axis in a tuple": lambda: mx.vmap(lambda x: x * 2, in_axes=(1,))(mx.ones((2, 3))),
    "checkpoint": lambda: mx.grad(lambda x: mx.checkpoint(lambda y: mx.exp(y).sum())(x))(X),
    "compiled": lambda: mx.compile(mx.value_and_grad(two, (0, 1)))(X, Y),
    "nn": lambda: nn.value_and_grad(nn.Linear(2, 2), lambda x: (x.sum(), x))(X),
    "nested": lambda: mx.grad(lambda x: mx.grad(two)(x, Y).sum())(X),
}


def listed(tree):
    if isinstance(tree, mx.array):
        return (str(tree.dtype), tree.tolist())
    if isinstance(tree, dict):
        return {key: listed(x) for key, x in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(listed(x) for x in tree)
    return tree


@pytest.mark.parametrize("name", CALLS)
def test_answers_as_mlx(name):
    call = CALLS[name]
    if name == "nn":
        mx.random.seed(3)
    want = listed(call())
    with patched():
        got = listed(call())
    assert got == want


@pytest.mark.skipif(MLX < (0, 32, 0), reason="complex reverse mode is refused there")
def test_complex_gradients_are_mlxs():
    z = mx.array([1 + 2j, 3 - 1j])

    def energy(z):
        return (mx.abs(z * z) ** 2).sum()

    calls = (
        lambda: mx.grad(energy)(z),
        lambda: mx.vjp(lambda z: z * z, [z], [z])[1][0],
        lambda: mx.value_and_grad(lambda p: (energy(p["z"]), p["z"]))({"z": z})[1]["z"],
    )
    for call in calls:
        want = call()
        with patched():
            np.testing.assert_allclose(call(), want, rtol=1e-5)


REFUSED = {
    "a negative number": lambda: mx.grad(two, -1),
    "a number twice": lambda: mx.grad(two, (0, 0)),
    "no number": lambda: mx.value_and_grad(two, ()),
    "no number at all": lambda: mx.value_and_grad(two, (None, None)),
    "too few arguments": lambda: mx.grad(two, 2)(X, Y),
    "no such keyword": lambda: mx.grad(two, argnames="z")(X, Y),
    "a float": lambda: mx.grad(two)(1.0, Y),
    "no scalar": lambda: mx.grad(lambda x: x)(X),
    "a tuple": lambda: mx.grad(with_aux)(X, Y),
    "a value that is none": lambda: mx.value_and_grad(lambda x: (3, x))(X),
    "nothing": lambda: mx.value_and_grad(lambda x: ())(X),
    "shapes of cotangents": lambda: mx.vjp(mx.exp, [X], [mx.ones(3)]),
    "shapes of tangents": lambda: mx.jvp(mx.exp, [X], [mx.ones(3)]),
    "sizes": lambda: mx.vmap(two)(X, mx.ones(3)),
    "no integer": lambda: mx.vmap(two, in_axes="x")(X, Y),
    "an axis too many": lambda: mx.vmap(two, in_axes=(0, 3))(X, Y),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_as_by_mlx(name):
    with pytest.raises((ValueError, TypeError, IndexError)) as native:
        REFUSED[name]()
    with patched(), pytest.raises((ValueError, TypeError, IndexError)) as ours:
        REFUSED[name]()
    kind = native.type if native.type is not IndexError else ValueError
    assert issubclass(ours.type, kind)


# Its limits in place and time --------------------------------------------------------------------


def test_where_a_function_is_made_counts(quantized):
    def f(x):
        return product(x, quantized)

    xs = mx.random.normal((3, 32))
    before = mx.vmap(f)
    with patched():
        inside = mx.vmap(f)
        with pytest.raises(NO_RULE, match="vmap"):
            mx.eval(before(xs))
    np.testing.assert_allclose(inside(xs), mx.stack([f(x) for x in xs]), rtol=1e-5, atol=1e-5)


def test_a_name_taken_inside_is_mlxs_outside(quantized):
    with patched():
        from mlx.core import vmap as taken
    with pytest.raises(NO_RULE, match="vmap"):
        mx.eval(taken(lambda x: product(x, quantized))(mx.ones((3, 32))))
    with patched():
        assert taken(lambda x: product(x, quantized))(mx.ones((3, 32))).shape == (3, 8)


def test_blocks_nest_and_end_with_an_exception():
    once = patched()
    with once:
        with patched(), once:
            assert not undone()
        assert mx.grad is not NATIVE["grad"]
        with pytest.raises(KeyError), once:
            raise KeyError
        assert mx.grad is not NATIVE["grad"]
        assert mlxshim.intercepted() == [f"mlx.core.{n}" for n in mlxshim_names()]
        with pytest.raises(ValueError, match="mine"):
            mx.vmap(mx.grad(raises))(X)
        assert mx.grad is not NATIVE["grad"]
    assert undone()


def mlxshim_names():
    return [e.name for e in interception._table.values() if e.patched]


def raises(x):
    raise ValueError("mine")


def test_decorator():
    @patched()
    def inside(depth):
        """Documented."""
        assert mx.grad is not NATIVE["grad"]
        if depth:
            inside(depth - 1)
            assert mx.grad is not NATIVE["grad"]
        return depth

    assert inside(2) == 2
    assert undone()
    assert (inside.__name__, inside.__doc__) == ("inside", "Documented.")
    with pytest.raises(KeyboardInterrupt):
        patched()(interrupted)()


def interrupted():
    raise KeyboardInterrupt


def test_what_runs_later_cannot_be_decorated():
    def generator():
        yield 1

    async def coroutine():
        pass

    async def both():
        yield 1

    for fun in (generator, coroutine, both):
        with pytest.raises(TypeError, match="inside it"):
            patched()(fun)


WITH_LOCK = "with _lock:"


def test_an_interrupt_at_any_step():
    files = {interception.__file__, sys.modules["mlxshim.transforms.patching"].__file__}

    def interrupting(at):
        steps = 0

        def trace(frame, event, _):
            nonlocal steps
            if frame.f_code.co_filename not in files or frame.f_code.co_name == "__del__":
                return None
            # A lock that is taken and let go is no step that an interrupt comes between.
            if linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip() == WITH_LOCK:
                return trace
            steps += 1
            if steps == at:
                raise KeyboardInterrupt
            return trace

        return trace

    before = sys.gettrace()
    interrupts = 0
    for at in range(1, 1000):
        through = False
        try:
            sys.settrace(interrupting(at))
            with patched():
                pass
            through = True
        except KeyboardInterrupt:
            interrupts += 1
        finally:
            sys.settrace(before)
        assert undone(), at
        assert mlxshim.intercepted() == []
        if through:
            break
    assert interrupts > 20


def test_a_block_that_is_never_closed_ends_with_its_object():
    block = patched()
    block.__enter__()
    assert not undone()
    del block
    gc.collect()


# Threads and processes ---------------------------------------------------------------------------


def test_other_threads_see_mlxs_own():
    seen = []

    def other(enter):
        if not enter:
            seen.append(all(getattr(mx, name) is f for name, f in NATIVE.items()))
            return
        with patched():
            seen.append(mx.vmap is not NATIVE["vmap"])
        seen.append(mx.vmap is NATIVE["vmap"])

    with patched():
        for enter in (False, True, False):
            thread = threading.Thread(target=other, args=(enter,))
            thread.start()
            thread.join()
        assert mx.vmap is not NATIVE["vmap"]

        def during(x):  # while a transform runs, too
            thread = threading.Thread(target=lambda: seen.append(mx.grad(lambda y: y * y)))
            thread.start()
            thread.join()
            return x * 2

        mx.vmap(during)(X)
    assert seen[:-1] == [True, True, True, True]
    assert type(seen[-1]) is type(NATIVE["grad"](two))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_fork():
    body = """
import os, threading
import mlx.core as mx
import mlxshim

native, inside, done = mx.grad, threading.Event(), threading.Event()

def other():
    with mlxshim.patched():
        inside.set()
        done.wait(20)

thread = threading.Thread(target=other)
thread.start()
inside.wait(20)

def child_of(check):
    child = os.fork()
    if child == 0:
        os._exit(0 if check() else 1)
    return os.waitpid(child, 0)[1]

print(child_of(lambda: mx.grad is native and type(mx).__name__ == "module"))
with mlxshim.patched():
    print(child_of(lambda: mx.grad is not native))
done.set()
thread.join()
assert mx.grad is native and type(mx).__name__ == "module"
"""
    assert alone(body).split() == ["0", "0"]


# Inside mlxshim ----------------------------------------------------------------------------------


def test_mlxshim_uses_mlxs_own_transforms():
    root = Path(mlxshim.__file__).parent
    for file in sorted(root.rglob("*.py")):
        if file == root / "core" / "native.py" or file.name.startswith("doctor"):
            continue  # the doctor looks at MLX's
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                called = node.value.id == "mx" and node.attr in NAMES
                assert not called, f"{file}:{node.lineno}: take native.{node.attr} of ..core"


def test_rules_do_not_come_round_again(monkeypatch):
    """Attention's rules differentiate and map; what they use is MLX's."""
    calls = []
    for entry in interception._table.values():
        if entry.patched:
            monkeypatch.setattr(entry, "call", None)  # the stand-in stands aside
            calls.append(entry.name)
    assert sorted(calls) == sorted(NAMES)
    q, k = mx.random.normal((2, 1, 4, 5, 8)), mx.random.normal((2, 1, 2, 5, 8))

    def loss(q, k):
        return mx.fast.scaled_dot_product_attention(q, k, k, scale=0.3, mask="causal").sum()

    want = mlxshim.vmap(mlxshim.grad(loss))(q, k)
    monkeypatch.undo()
    with patched():
        np.testing.assert_array_equal(mx.vmap(mx.grad(loss))(q, k), want)
