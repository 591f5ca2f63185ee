"""Interception is in place while a transform runs, and leaves nothing behind."""

from __future__ import annotations

import threading

import mlx.core as mx
import pytest

import mlxshim
from mlxshim import grad, vmap
from mlxshim.core import interception, levels
from mlxshim.core.versions import MLX

TYPES = [(e.owner, e.name) for e in interception._on_types]
LATE = [(e.owner, e.name) for e in interception._on_types if e.late]
MODULES = [
    (e.owner, e.name) for e in interception._table.values() if e not in interception._on_types
]


def settle():
    """Some calls in a row of a replaced method outside of a transform put all of them back."""
    for _ in range(100):
        mx.ones(2).sum()


def test_all_of_mlx_is_put_back():
    settle()
    before = [getattr(o, n) for o, n in MODULES + TYPES]
    seen = []

    def f(x):
        seen.append([getattr(o, n) for o, n in MODULES + TYPES])
        grad(mx.sin)(mx.array(1.0))  # what reads a value, now that a mark may be lost
        seen.append([getattr(o, n) for o, n in MODULES + TYPES])
        return x * 2

    vmap(f)(mx.ones((2, 3)))
    assert [a is b for a, b in zip(before, seen[0])] == [key in LATE for key in MODULES + TYPES]
    assert all(a is not b for a, b in zip(before, seen[1]))
    assert [getattr(o, n) for o, n in MODULES] == before[: len(MODULES)]
    settle()
    assert [getattr(o, n) for o, n in MODULES + TYPES] == before

    def broken(x):
        raise KeyError("mine")

    with pytest.raises(KeyError):
        grad(vmap(broken))(mx.ones((2, 3)))
    assert [getattr(o, n) for o, n in MODULES] == before[: len(MODULES)]
    settle()
    assert [getattr(o, n) for o, n in MODULES + TYPES] == before


def test_a_loop_that_looks_at_results_has_the_methods_in_place_all_along():
    settle()
    native = [getattr(o, n) for o, n in TYPES]
    x = mx.array([[1.0, 2.0], [3.0, 4.0]])
    placed = set()
    for _ in range(300):
        y = vmap(lambda x: x * 2)(x)
        placed.add(mx.array.sum)
        assert y.sum().item() == 20.0 and y[0].tolist() == [2.0, 4.0]
        placed.add(mx.array.sum)
    assert len(placed) == 1 and placed.isdisjoint(native)
    settle()
    assert [getattr(o, n) for o, n in TYPES] == native


def test_code_that_has_run_often_before_is_intercepted():
    """The interpreter specializes an instruction that has seen the module a few times."""

    def look():
        return mx.sum, mx.random.normal, mx.fast.rms_norm

    before = [look() for _ in range(1000)][-1]
    seen = []
    vmap(lambda x: seen.append(look()) or x)(mx.ones((2, 3)))
    assert all(a is not b for a, b in zip(before, seen[0]))
    assert look() == before


@pytest.mark.parametrize("owner", [mx, mx.array], ids=["module", "type"])
def test_what_somebody_else_puts_over_ours_stays_and_works(owner):
    settle()
    raw, calls = owner.sum, []

    def patch(inner):
        def patched(x, *args, **kwargs):
            calls.append(x.shape)
            return inner(x, *args, **kwargs)

        return patched

    def f(x):
        owner.sum = patch(owner.sum)  # over our stand-in
        return owner.sum(x, (0, 1))

    x = mx.random.normal((4, 2, 3))
    try:
        assert mx.allclose(vmap(f)(x), raw(x, (1, 2)))
        patched = owner.sum
        assert len(calls) == 1
        # It lies over ours, which is over MLX's: neither goes round in circles, nor is ours used.
        for _ in range(2):
            assert mx.allclose(owner.sum(x, (1, 2)), raw(x, (1, 2)))
            assert mx.allclose(vmap(lambda x: owner.sum(x, (0, 1)))(x), raw(x, (1, 2)))
        owner.sum(x)  # a method comes back at its first call
        assert owner.sum is patched
    finally:
        mlxshim.intercepted()  # puts back what is not the somebody's
        owner.sum = raw
    assert mx.allclose(vmap(lambda x: owner.sum(x, (0, 1)))(x), raw(x, (1, 2)))


def test_other_threads_never_see_a_handler(monkeypatch):
    """While one thread traces, another calls what is intercepted: it gets MLX's own."""
    tracing, done, active = threading.Event(), threading.Event(), []

    def other():
        tracing.wait(10)
        active.append(levels.active() == [] and interception.in_place())
        active.append(mx.array_equal(mx.ones((2, 3)).sum((0, 1)), mx.array(6.0)).item())
        done.set()

    thread = threading.Thread(target=other)
    thread.start()

    def f(x):
        tracing.set()
        assert done.wait(10)
        return x.sum((0, 1))

    assert mx.array_equal(vmap(f)(mx.ones((2, 2, 3))), mx.full((2,), 6.0))
    thread.join()
    assert active == [True, True]


def test_many_threads_at_once():
    x = mx.random.normal((4, 2, 3))
    mx.eval(x)
    want = [float(v) for v in x.sum((1, 2)).tolist()]
    wrong = []

    def work():
        for _ in range(50):
            with mx.stream(mx.cpu):
                got = vmap(lambda x: x.sum((0, 1)))(x)
            levels.active() == [] or wrong.append("level")
            if got.shape != (4,):
                wrong.append(got.shape)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert wrong == []
    assert not interception.in_place()
    assert want == pytest.approx([float(v) for v in vmap(lambda x: x.sum((0, 1)))(x).tolist()])


#: The derivative of a function at z in a direction v, by each transform that takes a function.
DERIVATIVES = {
    "grad": lambda f, z, v: v * grad(f, holomorphic=True)(z),
    "value_and_grad": lambda f, z, v: v * mlxshim.value_and_grad(f, holomorphic=True)(z)[1],
    "vjp": lambda f, z, v: mlxshim.vjp(f, z)[1](v)[0],
    "vjp of lists": lambda f, z, v: mlxshim.vjp(f, [z], [v])[1][0],
    "jvp": lambda f, z, v: mlxshim.jvp(f, (z,), (v,))[1],
    "jvp of lists": lambda f, z, v: mlxshim.jvp(f, [z], [v])[1][0],
    "linearize": lambda f, z, v: mlxshim.linearize(f, z)[1](v),
    "jacfwd": lambda f, z, v: v * mlxshim.jacfwd(f, holomorphic=True)(z),
    "jacrev": lambda f, z, v: v * mlxshim.jacrev(f, holomorphic=True)(z),
    "checkpoint": lambda f, z, v: _pushed(mlxshim.checkpoint(f), z, v),
    "vmap": lambda f, z, v: _pushed(vmap(f), z[None], v[None]),
    "cond": lambda f, z, v: _pushed(lambda z: mlxshim.cond(mx.array(True), f, f, z), z, v),
    "switch": lambda f, z, v: _pushed(lambda z: mlxshim.switch(0, [f], z), z, v),
    "while_loop": lambda f, z, v: _pushed(lambda z: _once(f, z), z, v),
    "map": lambda f, z, v: _pushed(lambda z: mlxshim.map(f, z[None])[0], z, v),
    "custom_vmap": lambda f, z, v: _pushed(_with_a_rule(f), z, v),
    "patched": lambda f, z, v: _patched(f, z, v),
}


def _pushed(fun, z, v):
    return mlxshim.jvp(fun, [z], [v])[1][0]


def _once(fun, z):
    rounds = iter((True, False))
    return mlxshim.while_loop(lambda z: mx.array(next(rounds)), fun, z)


def _with_a_rule(fun):
    with_rule = mlxshim.custom_vmap(fun)
    with_rule.def_vmap(lambda size, mapped, z: (vmap(fun)(z), True))
    return with_rule


def _patched(fun, z, v):
    with mlxshim.patched():
        return mx.jvp(fun, [z], [v])[1][0]


@pytest.mark.skipif(MLX < (0, 32, 0), reason="reverse mode of complex arguments is refused there")
@pytest.mark.parametrize("name", DERIVATIVES)
def test_functions_of_mlx_are_intercepted_where_a_transform_is_given_them_themselves(name):
    z, v = mx.array(0.3 + 0.4j), mx.array(0.5 - 0.3j)
    derivative = DERIVATIVES[name]
    got, want = derivative(mx.sign, z, v), derivative(lambda z: mx.sign(z), z, v)
    assert abs(want.item()) > 0.1
    assert mx.array_equal(got, want)
