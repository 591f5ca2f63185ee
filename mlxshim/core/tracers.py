"""Whether an array is part of a trace.

A call on arrays that are in no trace cannot be mapped: MLX's own function serves it, fused, and no
decomposition of it is ever evaluated. Python has no view of `array::is_tracer`, but what
`mx.compile` makes of a function asks it: it calls the function itself for a tracer, and replays
its cache for anything else (mlx/compile.cpp).
"""

from __future__ import annotations

import functools
import io
import threading

import mlx.core as mx

from . import compilation, levels, native


class _Probe(threading.local):
    def __init__(self) -> None:
        self.calls = 0
        #: The (number of dimensions, dtype) that the cache has, with the default streams that it
        #: has them for: MLX keeps one for each thread.
        self.cached: dict[tuple[int, mx.Dtype], list[mx.Stream]] = {}


_probe = _Probe()


@compilation.always
@functools.partial(mx.compile, shapeless=True)
def _count(x: mx.array) -> mx.array:
    _probe.calls += 1
    return x


def is_tracer(x: mx.array) -> bool:
    """False only if no transform can be tracing `x`; nothing is evaluated."""
    return levels.unmarked() or is_marked(x)


def is_marked(x: mx.array) -> bool:
    """Whether a transform that has not lost its mark is tracing `x`."""
    probe, key = _probe, (x.ndim, x.dtype)
    before = probe.calls
    _count(x)
    if probe.calls == before:
        return False
    stream = mx.default_stream(mx.default_device())
    cached = probe.cached.setdefault(key, [])
    if stream in cached:
        return True
    # That call may have been the one that fills the cache: the second tells.
    before = probe.calls
    _count(x)
    if probe.calls == before:
        cached.append(stream)
        return False
    return True


def _made_in_a_trace() -> mx.array:
    found = []
    native.vjp(lambda x: (found.append(x + x), [x])[1], [mx.array(0.0)], [mx.array(1.0)])
    return found[0]


#: An array with the mark of a tracer, which counts where a trace runs in the thread.
_MARKED = _made_in_a_trace()


def in_trace() -> bool:
    """Whether any transform is tracing in this thread, MLX's own too.

    What is evaluated there is lost to a derivative around if one inside has taken its mark.
    """
    return bool(levels.active()) or is_tracer(_MARKED)


# Graphs that are kept --------------------------------------------------------------------------


_passes = [0]
_PAIR, _ONE = mx.array([0.0, 0.0]), mx.array([0.0])


@mx.compile
def _pass(x: mx.array) -> mx.array:
    _passes[0] += 1
    return x


def look_around(level: levels.VmapLevel, given: mx.array) -> None:
    """Note in an outermost vmap's level whether `mx.compile` is around, which traces `given`.

    A derivative of MLX's own around it looks the same, where it is one with respect to `given`.
    What is compiled for any shapes is left to MLX: rules may look at those that they see.
    """
    if levels.active() or (compilation.THREAD_CACHE_BUG and not compilation.in_main_thread()):
        return
    before = _passes[0]
    _pass(_MARKED)
    if _passes[0] == before:  # from the cache, as mostly: nothing traces, and MLX compiles
        level.compiles = True
    elif compilation.is_on() and is_marked(given) and not _is_shapeless():
        level.kept = True
        level.plan = None  # a trace that is made once has nothing to learn from, and may take long


def _is_shapeless() -> bool:
    """Whether the outermost trace is one of `mx.compile(..., shapeless=True)`.

    There what is broadcast depends on all that it meets (mlx/ops.cpp, `broadcast_arrays`).
    """
    graph = io.StringIO()
    mx.export_to_dot(graph, *mx.broadcast_arrays(_PAIR, _ONE))
    return "StopGradient" in graph.getvalue()
