"""Chunks: one is computed while the next is traced, one at a time, and every error comes out."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import pytest
from test_threads import alone

from mlxshim import NoBatchingRule, PerformanceWarning, grad, vmap, while_loop
from mlxshim.core.versions import MLX
from mlxshim.nn import fisher_diagonal, gradient_features
from mlxshim.transforms import _chunks, _loops

LATE = pytest.mark.skipif(MLX < (0, 32, 4), reason="an error of a thread of MLX's is the process'")


def close(a, b):
    assert a.shape == b.shape
    assert mx.allclose(a, b, rtol=1e-5, atol=1e-5), (a, b)


class Events(list):
    """What happens in which order: traces, and what `_chunks` asks MLX to start and to wait for."""

    def traced(self, fun):
        def wrapped(*args, **kwargs):
            self.append("trace")
            result = fun(*args, **kwargs)
            self.append("traced")
            return result

        return wrapped


@pytest.fixture
def events(monkeypatch):
    seen = Events()

    class Watched:
        array = mx.array

        def async_eval(self, arrays):
            seen.append("start")
            mx.async_eval(arrays)

        def eval(self, arrays):
            seen.append("wait")
            mx.eval(arrays)

    monkeypatch.setattr(_chunks, "mx", Watched())
    return seen


# Order -----------------------------------------------------------------------------------------


def test_a_chunk_is_traced_while_the_one_before_is_computed(events):
    x = mx.random.normal((7, 3))
    close(vmap(events.traced(mx.sin), chunk_size=3)(x), mx.sin(x))
    a_trace = ["trace", "traced"]
    assert events == [*a_trace, "start", *[*a_trace, "wait", "start"] * 2, "wait"]


def test_a_vmap_inside_does_not_end_the_computation(events):
    x = mx.random.normal((4, 5, 3))

    def inner(*, rows):
        return vmap(lambda row, *, scale: row * scale, chunk_size=2)(rows, scale=rows.sum(axis=1))

    got = vmap(events.traced(lambda rows: inner(rows=rows)), chunk_size=2)(x)
    close(got, x * x.sum(axis=2, keepdims=True))
    assert events == ["trace", "traced", "start", "trace", "traced", "wait", "start", "wait"]


@pytest.mark.parametrize("around", [lambda f: grad(lambda x: f(x).sum()), vmap])
def test_inside_a_trace_nothing_is_started(events, around):
    x = mx.random.normal((4, 4))
    around(vmap(lambda x: mx.sin(x) * 2, chunk_size=2))(x)
    assert events == []


@pytest.mark.parametrize("lazy", [False, True])
def test_inside_transforms_of_mlx_itself(lazy):
    """They are no levels of ours: what cannot be started there is left for later."""
    x = mx.random.normal((4, 4))
    mapped = vmap(lambda x: mx.sin(x).sum(), chunk_size=2)

    def f(x):
        return mapped(x * 1 if lazy else x)

    close(mx.compile(f)(x), mx.sin(x).sum(axis=1))
    close(mx.grad(lambda x: f(x).sum())(x), mx.cos(x))
    close(mx.vmap(f)(x[None]), mx.sin(x).sum(axis=1)[None])


def test_what_is_evaluated_in_a_trace_waits(events, monkeypatch):
    """The predicate of a loop has a value at every round, and each round needs its memory."""
    looped = _loops.Loop.call

    def call(self, *arrays):
        found = looped(self, *arrays)
        events.append("looped")
        return found

    monkeypatch.setattr(_loops.Loop, "call", call)
    x = mx.array([1.0, 50.0, 200.0, 7.0])
    found = vmap(lambda x: while_loop(lambda x: x < 100, lambda x: x * 3, x), chunk_size=2)(x)
    close(found, mx.array([243.0, 150.0, 200.0, 189.0]))
    second = events[events.index("start") + 1 :]
    waited = second.index("wait")
    assert waited < second.index("looped", waited) < second.index("start")


@pytest.mark.filterwarnings("ignore::mlxshim.PerformanceWarning")
def test_a_loop_over_the_samples_waits(events):
    def f(x):
        value = x.item()  # refused in a trace
        events.append("call")
        return x * value

    x = mx.array([1.0, 2.0, 3.0, 4.0])
    close(vmap(f, chunk_size=2)(x), x * x)
    assert events == ["call", "call", "start", "wait", "call", "call", "start", "wait"]


# Memory ----------------------------------------------------------------------------------------


def peak(fun, *arguments):
    if mx.default_device().type == mx.gpu:
        pytest.skip("a GPU's queue holds what is in flight")
    mx.eval(arguments)
    mx.synchronize()
    before = mx.get_active_memory()  # other tests' arrays
    mx.reset_peak_memory()
    mx.eval(fun(*arguments))
    return mx.get_peak_memory() - before


def test_one_chunk_is_alive():
    """Each sample needs a few megabytes on the way to one number."""

    def f(x):
        big = mx.broadcast_to(x[:1], (1 << 20,)) + mx.arange(1 << 20)
        return mx.sort(big).sum()

    x = mx.random.normal((16, 4))
    one = peak(vmap(f), x[:2])
    assert one > 2 * 4 * (1 << 20)
    assert peak(vmap(f, chunk_size=2), x) < 1.2 * one


@pytest.mark.parametrize(
    "of", [fisher_diagonal, lambda *args, **options: gradient_features(*args, 4, **options)]
)
def test_what_a_loss_returns_besides_holds_no_chunk(of):
    model = nn.Linear(16, 1024)
    mx.eval(model.parameters())

    def loss(model, x):
        y = model(x)
        return y.mean(), mx.sort(y.flatten()).max()

    x = mx.random.normal((16, 128, 16))
    fun = of(model, loss, chunk_size=2)
    few, many = (peak(lambda x: fun(model, x), x[:n]) for n in (4, 16))
    assert many < 1.2 * few


# Errors ----------------------------------------------------------------------------------------


def leaked():
    """An array that MLX refuses to evaluate."""
    found = []
    mx.vmap(lambda x: found.append(x) or x)(mx.zeros(3))
    return found[0]


@pytest.mark.parametrize("bad", [0, 1, 2, 3])
def test_what_cannot_be_evaluated_is_raised(bad):
    traces = []

    def f(x):
        traces.append(None)
        return x + leaked() if len(traces) == bad + 1 else x * 2

    x = mx.random.normal((7, 3))
    mapped = vmap(f, chunk_size=2)
    with pytest.raises(RuntimeError, match="without a primitive"):
        mapped(x)
    # The next one had been traced, when it waited.
    assert len(traces) == bad + 1
    traces.extend([None] * 8)
    close(mapped(x), 2 * x)


@pytest.mark.parametrize("bad", [1, 2])
def test_the_callers_own_errors_in_a_later_chunk_are_not_looped(bad):
    traces = []

    def f(x):
        traces.append(None)
        if len(traces) > bad:
            raise RuntimeError("mine")
        return x * 2

    with pytest.raises(RuntimeError, match="mine"):  # a PerformanceWarning is an error here
        vmap(f, chunk_size=2)(mx.ones((7, 3)))


# In a process of their own: MLX forgets a task when it raises the error of another while it starts
# it, and after some of those waits for ever (docs/mlx-issues.md).

WHAT_FAILS = """
import mlx.core as mx
from mlxshim import vmap

for bad in range(7):
    x = mx.broadcast_to(mx.eye(3), (7, 3, 3))
    x = x * mx.array([float(i != bad) for i in range(7)])[:, None, None]
    try:
        vmap(lambda x: mx.linalg.inv(x, stream=mx.cpu), chunk_size=2)(x)
        print("nothing")
    except RuntimeError as e:
        print(e)
    mx.eval(mx.ones(3) + 1)
"""


WHAT_A_TRACE_MEETS = """
import mlx.core as mx
from mlxshim import custom_vmap, vmap

@custom_vmap
def in_a_rule(x):
    return x * 2

@in_a_rule.def_vmap
def _(size, mapped, x):
    mx.synchronize()
    mx.eval(mx.ones(3) + 1)
    return x * 2, True

def evaluates(x):
    mx.synchronize()
    mx.eval(mx.ones(3) + 1)
    return x * 2

x = mx.concatenate([mx.zeros((1, 3, 3)), mx.broadcast_to(mx.eye(3), (3, 3, 3))])
for evaluating in (in_a_rule, evaluates, vmap(evaluates)):
    try:
        vmap(lambda x: evaluating(mx.linalg.inv(x, stream=mx.cpu)), chunk_size=2)(x)
        print("nothing")
    except RuntimeError as e:
        print(e)
    mx.eval(mx.ones(3) + 1)
"""


@LATE
@pytest.mark.parametrize("program, count", [(WHAT_FAILS, 7), (WHAT_A_TRACE_MEETS, 3)])
def test_what_fails_in_a_thread_of_mlx_is_raised(program, count):
    """While the next chunk is traced; MLX raises it once, where something is evaluated next."""
    said = alone(program).splitlines()
    assert len(said) == count and all("LU factorization failed" in line for line in said), said


@pytest.mark.parametrize("fallback", ["loop", "error"])
def test_a_missing_rule_that_a_later_chunk_meets(fallback):
    """The chunk before is computed meanwhile, and has nothing to do with it."""
    op = mx.custom_function(lambda x: mx.sin(x))

    def rule(x, axis):
        if x.shape[axis] == 1:
            raise RuntimeError("[Ruleless::vmap] NYI")
        return mx.sin(x), axis

    op.vmap(rule)
    x = mx.random.normal((5, 3))
    mapped = vmap(op, chunk_size=2, fallback=fallback)
    if fallback == "error":
        with pytest.raises(NoBatchingRule, match="Ruleless"):
            mapped(x)
        return
    with pytest.warns(PerformanceWarning, match="Ruleless"):
        close(mapped(x), mx.sin(x))
