"""Chunks of samples, one after the other: one is computed while the next is traced.

    with OneAtATime():
        for start, stop in chunks:
            arrays = trace(start, stop)    the chunk before is being computed
            compute(arrays)                waits for that one, and starts this one

At most one chunk is computed at a time in a thread, so that the memory is that of one. What
evaluates something while a chunk is traced (a loop over the samples, the predicate of a
`while_loop`) waits first, for the same reason.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import mlx.core as mx

from ..core.tracers import in_trace


class _Local(threading.local):
    def __init__(self) -> None:
        #: What the chunk returns that is being computed, or has failed.
        self.running: list[mx.array] = []


_local = _Local()


class OneAtATime:
    """Around a loop over chunks: what it has started is done when it is over, or has failed."""

    __slots__ = ("_before",)

    def __enter__(self) -> None:
        self._before = _local.running

    def __exit__(self, *_: object) -> None:
        # A loop inside a trace starts nothing, and the chunk around goes on.
        if _local.running is not self._before:
            try:
                wait()
            finally:
                _local.running = []


def compute(arrays: list[mx.array]) -> None:
    """Start to evaluate a chunk, when the one before has left its memory.

    Inside a trace, also one of MLX's own, there is nothing to free. There mx.eval would even lose
    the graph of what an inner derivative returned: MLX takes the mark of a tracer from all that it
    differentiates.
    """
    if not in_trace():
        wait()
        mx.async_eval(arrays)
        _local.running = arrays


def wait() -> None:
    """Wait for the chunk that is being computed, if one is, and raise what it raises."""
    if _local.running:
        mx.eval(_local.running)
        _local.running = []


def rule_out(error: Exception, trace: Callable[[], object]) -> None:
    """Raise `error`, which `trace` has met, if it is that of the chunk computed meanwhile.

    MLX raises what has failed in a computation where something is evaluated next, which may be in
    a trace. The trace is made once more with nothing going on: its own error is there again.
    """
    if not _local.running:
        return
    wait()
    try:
        trace()
    except Exception as e:
        if type(e) is type(error) and str(e) == str(error):
            return
    raise error
