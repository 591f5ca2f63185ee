"""Threads, tasks, processes: who traces sees the rules, everybody else MLX itself."""

from __future__ import annotations

import asyncio
import functools
import os
import pickle
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import mlxshim
from mlxshim import grad, vmap
from mlxshim.core import compilation, levels
from mlxshim.core.versions import MLX

ROOT = Path(__file__).resolve().parents[1]


def alone(body: str, limit: float = 60) -> str:
    """What a program prints that may hang or die."""
    done = subprocess.run(
        [sys.executable, "-c", body], capture_output=True, text=True, timeout=limit, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


def undone() -> bool:
    return mlxshim.intercepted() == [] and levels.place() == (0, 0, 0, 0)


def compiles() -> bool:
    calls = []
    fun = mx.compile(lambda x: calls.append(0) or x + 1)
    fun(mx.array(1.0))
    fun(mx.array(2.0))
    return len(calls) == 1


# Threads ----------------------------------------------------------------------------------------

STRESS = """
import os, threading, time
import mlx.core as mx
import mlxshim
from mlxshim import grad, vmap

stop, wrong, count = time.time() + SECONDS, [], [0] * 8

def loss(w, x):
    y = mx.fast.rms_norm(x, w, 1e-5)
    return (mx.softmax(y @ y.T, axis=-1) * y.sum((0, 1))).sum()

native_sum, native_method = mx.sum, mx.array.sum
plain = mx.compile(lambda x: mx.sum(x * 2, axis=(0, 1)))

def work(n):
    stream = mx.new_stream(mx.cpu)
    with mx.stream(stream):
        w, x = mx.ones(4), mx.random.normal((3, 2, 4), key=mx.random.key(n))
        mx.eval(w, x)
        rows = [grad(loss)(w, x[i]) for i in range(3)]
        want = mx.stack(rows)
        mx.eval(want)
        once = vmap(grad(loss), in_axes=(None, 0))
        while time.time() < stop and not wrong:
            if n % 2:
                got = once(w, x)
                if n == 3:
                    got = vmap(mx.compile(lambda w, x: grad(loss)(w, x)), in_axes=(None, 0))(w, x)
                if not mx.allclose(got, want, rtol=1e-4, atol=1e-5).item():
                    wrong.append((n, "traced"))
            else:
                fresh = mx.compile(lambda y: mx.sum(y * 2, axis=(0, 1)))
                for f in (plain, fresh, lambda y: (y * 2).sum((0, 1))):
                    if abs(f(x[0]).item() - 2 * sum(map(sum, x[0].tolist()))) > 1e-3:
                        wrong.append((n, "plain"))
            count[n] += 1

def guarded(n):
    try:
        work(n)
    except Exception as e:
        wrong.append((n, repr(e)))

threads = [threading.Thread(target=guarded, args=(n,)) for n in range(8)]
[t.start() for t in threads]
[t.join() for t in threads]
assert not wrong, wrong
assert all(count), count
assert mlxshim.intercepted() == []
assert mx.sum is native_sum and mx.array.sum is native_method
print("well", flush=True)
os._exit(0)  # MLX may abort at exit, where threads had streams
"""


def test_eight_threads_half_of_them_tracing():
    seconds = os.environ.get("MLXSHIM_STRESS_SECONDS", "3")
    assert alone(STRESS.replace("SECONDS", seconds), 60 + float(seconds)) == "well"


def test_a_function_compiled_elsewhere_while_a_vmap_traces():
    """The switch of compilation is the whole process's: other threads get the same numbers."""
    tracing, done, results = threading.Event(), threading.Event(), []

    def other():
        assert tracing.wait(10)
        fun = mx.compile(lambda x: mx.sin(x) * 2)
        with mx.stream(mx.cpu):
            x = mx.array([1.0, 2.0])
            results.append(np.array(fun(x)))
            results.append(np.array(fun(x)))
        done.set()

    thread = threading.Thread(target=other)
    thread.start()

    def f(x):
        tracing.set()
        assert done.wait(10)
        return x * 2

    vmap(f)(mx.ones((2, 3)))
    thread.join()
    for result in results:
        np.testing.assert_allclose(result, np.sin([1.0, 2.0]) * 2, rtol=1e-6)
    assert compiles()


def test_the_users_switch_turned_inside_a_trace_stays():
    def f(x):
        mx.disable_compile()
        return x * 2

    try:
        vmap(f)(mx.ones((2, 3)))
        assert not compiles()
        vmap(lambda x: x)(mx.ones((2, 3)))
        assert not compiles()
    finally:
        mx.enable_compile()
    assert compiles()


def test_two_threads_that_trace_never_compile():
    """One asks what is traced, by a compiled probe; the other must not find the switch on."""
    inside, go, seen = threading.Barrier(2), threading.Event(), []

    def f(x):
        inside.wait(10)
        for _ in range(200):
            mx.addmm(x, x, x)  # asks
            fun = mx.compile(lambda y: y * x)  # captures a tracer
            seen.append(fun(mx.ones((2, 2))))
        return mx.addmm(x, x, x)

    def run():
        with mx.stream(mx.cpu):
            vmap(f)(mx.ones((2, 2, 2)))

    go.set()
    with ThreadPoolExecutor(2) as pool:
        for future in [pool.submit(run) for _ in range(2)]:
            future.result(30)
    assert len(seen) == 400
    assert not compilation._threads
    assert undone()
    assert compiles()


def test_a_thread_that_asks_turns_no_switch_under_one_that_traces():
    """It traces no vmap itself, but may differentiate."""
    on = []
    ask = compilation.always(lambda: on.append(compilation.is_on()))

    def f(x):
        thread = threading.Thread(target=ask)
        thread.start()
        thread.join()
        ask()
        return x

    ask()
    vmap(f)(mx.ones(2))
    ask()
    assert on == [True, False, True, True]
    assert compiles()


def test_asyncio_tasks_that_take_turns():
    async def one(n):
        total = []
        for _ in range(3):
            await asyncio.sleep(0)
            x = mx.full((2, 3), n)
            total.append(vmap(lambda y: y.sum((0,)))(x).tolist())
            assert levels.active() == []
        return total

    async def main():
        return await asyncio.gather(*(one(n) for n in range(4)))

    got = asyncio.run(main())
    assert got == [[[3 * n, 3 * n]] * 3 for n in range(4)]
    assert undone()


def test_an_async_function_is_refused():
    async def f(x):
        return x

    coroutines = []
    with pytest.raises(ValueError, match="its output is an object of type coroutine"):
        vmap(lambda x: coroutines.append(f(x)) or coroutines[-1])(mx.ones((2, 3)))
    coroutines[0].close()
    assert undone()


# Generators -------------------------------------------------------------------------------------


def test_generators_that_begin_inside_and_end_outside():
    def numbers(x):
        yield x * 2
        yield levels.active()

    suspended = []

    def f(x):
        g = numbers(x)
        suspended.append(g)
        return next(g)

    assert vmap(f)(mx.ones((2, 3))).tolist() == [[2.0] * 3] * 2
    assert next(suspended[0]) == []  # resumed outside, it is outside
    assert undone()


def test_a_generator_that_maps_between_its_yields():
    def rows():
        for n in range(3):
            yield vmap(lambda x: x.sum((0,)))(mx.full((2, 2), n))

    def f(x):
        return sum((mx.stop_gradient(r).sum() for r in rows()), x.sum())

    assert grad(f)(mx.ones(3)).tolist() == [1.0] * 3
    g = rows()
    next(g)
    assert undone()
    assert [r.tolist() for r in g] == [[2.0, 2.0], [4.0, 4.0]]


# Processes --------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_fork_while_another_thread_traces():
    body = """
import os, sys, threading
import mlx.core as mx
import mlxshim
from mlxshim.core import levels

tracing, done = threading.Event(), threading.Event()

def f(x):
    tracing.set()
    done.wait(20)
    return x * 2

native = mx.sum, mx.array.sum
thread = threading.Thread(target=lambda: mlxshim.vmap(f)(mx.ones((2, 3))))
thread.start()
tracing.wait(20)
assert mlxshim.intercepted()
child = os.fork()
if child == 0:  # evaluates nothing: MLX's own threads are gone
    ok = mlxshim.intercepted() == [] and (mx.sum, mx.array.sum) == native
    ok = ok and mlxshim.vmap(lambda x: x.sum((0, 1)))(mx.zeros((2, 3, 4))).shape == (2,)
    os._exit(0 if ok and mlxshim.intercepted() == [] else 1)
_, status = os.waitpid(child, 0)
done.set()
thread.join()
assert mlxshim.intercepted() == []
print(status, flush=True)
os._exit(0)  # MLX's threads do not survive a fork either
"""
    assert alone(body) == "0"


def double(x):
    return x * 2


#: A function that goes by its own name is found by that name.
doubled = vmap(double)


@vmap
def tripled(x):
    return x * 3


def test_pickling_by_name_or_not_at_all():
    again = pickle.loads(pickle.dumps(tripled))
    assert again is tripled
    for fun in (doubled, grad(lambda x: x.sum())):
        with pytest.raises((pickle.PicklingError, AttributeError), match=r"Can't|not the same"):
            pickle.dumps(fun)
    assert pickle.loads(pickle.dumps(functools.partial(tripled))).func is tripled


# Interrupts and exceptions ----------------------------------------------------------------------


def test_keyboard_interrupts_at_any_moment():
    body = """
import random, signal, time
import mlx.core as mx
import mlxshim
from mlxshim.core import compilation, levels
from mlxshim.core.versions import MLX

native = mx.sum, mx.array.sum
x = mx.ones((3, 2, 2))
f = mlxshim.vmap(mlxshim.grad(lambda x: mx.compile(lambda y: y.sum((0, 1)))(x * x)))
f(x)

def stop(*_):
    raise KeyboardInterrupt

signal.signal(signal.SIGALRM, stop)
random.seed(0)
interrupted = 0
for _ in range(4000):
    try:
        signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-6, 6e-4))
        f(x)
        signal.setitimer(signal.ITIMER_REAL, 0)
    except KeyboardInterrupt:
        interrupted += 1
    signal.setitimer(signal.ITIMER_REAL, 0)
    assert levels.place() == (0, 0, 0, 0), levels.place()
    assert not compilation._threads
    assert mlxshim.intercepted() == []
    assert (mx.sum, mx.array.sum) == native
assert interrupted > 100, interrupted
assert f(x).tolist() == (2 * x).tolist()
print("well")
"""
    assert alone(body) == "well"


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt, SystemExit, GeneratorExit])
@pytest.mark.parametrize("wrap", [vmap, grad, lambda f: vmap(vmap(f)), lambda f: vmap(grad(f))])
def test_exceptions_in_the_function(error, wrap):
    assert undone()
    native = mx.sum, mx.array.sum

    def f(x):
        raise error("mine")

    with pytest.raises(error, match="mine"):
        wrap(f)(mx.ones((2, 2, 3)))
    # At once, before anybody asks.
    assert (mx.sum, mx.array.sum) == native
    assert undone()
    assert compiles()


def test_an_exception_in_a_rule():
    @mlxshim.primitive
    def op(x):
        return x * 2

    @op.def_batch
    def _(size, arrays, axes):
        raise KeyError("the rule's")

    @op.def_vjp
    def _(primals, cotangents, outputs):
        raise KeyError("the rule's")

    assert undone()
    native = mx.sum, mx.array.sum
    with pytest.raises(Exception, match="the rule's"):
        vmap(op, fallback="error")(mx.ones((2, 3)))
    assert (mx.sum, mx.array.sum) == native
    with pytest.raises(KeyError, match="the rule's"):
        grad(lambda x: op(x).sum())(mx.ones(3))
    assert (mx.sum, mx.array.sum) == native
    assert undone()


def test_an_exception_in_eval():
    def f(x):
        return x + mx.array(float((mx.ones((2, 3)) @ x).sum().item()) // 0)

    with (
        pytest.raises(ZeroDivisionError),
        pytest.warns(mlxshim.PerformanceWarning, match="reads the value"),
    ):
        vmap(f)(mx.ones((2, 3)))
    assert undone()
    with pytest.raises(ValueError, match="length-1"):
        vmap(lambda x: x + x.item())(mx.ones((2, 3)))
    assert undone()


@pytest.mark.skipif(MLX < (0, 32, 4), reason="MLX's own eval may abort")
@pytest.mark.parametrize("wrap", [vmap, grad, lambda f: vmap(grad(f))])
def test_what_eval_itself_raises(wrap):
    strided = mx.as_strided  # MLX's own

    def f(x):
        bad = strided(mx.arange(4)[::2], (1,), (1,))  # MLX finds out when it runs
        mx.eval(bad)
        return x.sum() + bad.sum()

    assert undone()
    native = mx.sum, mx.array.sum
    with pytest.raises(RuntimeError, match="row contiguous"):
        wrap(f)(mx.ones((2, 3)))
    assert (mx.sum, mx.array.sum) == native
    assert undone()


def test_re_entrancy():
    inner = vmap(lambda x: x.sum((0,)))

    def f(x):
        first = inner(mx.ones((2, 3)))
        assert first.tolist() == [3.0, 3.0]  # evaluated in the middle of a trace
        with pytest.raises(KeyError):
            vmap(lambda y: {}[0])(mx.ones((2, 3)))
        assert levels.active() == ["vmap"]
        assert mlxshim.intercepted()
        return inner(x) + first

    assert vmap(f)(mx.ones((4, 2, 3))).tolist() == [[6.0, 6.0]] * 4
    assert undone()


def test_ten_thousand_calls_leak_nothing():
    body = """
import gc, resource
import mlx.core as mx
import mlxshim

def rss():
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * resource.getpagesize()

x, w = mx.ones((3, 2, 4)), mx.ones(4)

def loss(w, x):
    y = mx.fast.rms_norm(x, w, 1e-5)
    y[0] = mx.sum(y, axis=0)
    return (mx.softmax(y @ y.T) @ y).sum()

kept = mlxshim.vmap(mlxshim.grad(loss), in_axes=(None, 0))

def broken(x):
    raise KeyError

def calls(n):
    for i in range(n):
        kept(w, x)
        mlxshim.vmap(lambda y: y * 2)(x)
        mlxshim.jvp(lambda y: y * y, [w], [w])
        if i % 10 == 0:
            mx.eval(mlxshim.vmap(mlxshim.grad(loss), in_axes=(None, 0))(w, x))
            try:
                mlxshim.vmap(broken)(x)
            except KeyError:
                pass
    gc.collect()
    return rss(), mx.get_active_memory()

calls(300)
before, active = calls(300)
after, still = calls(3300)
assert still == active, (active, still)
assert after - before < 4 << 20, (before, after)
print("level")
"""
    if not Path("/proc/self/statm").exists():
        pytest.skip("no /proc")
    assert alone(body, 120) == "level"
