"""Inside a vmap nothing is compiled: a compiled function runs as it is written.

MLX inlines a compiled function that is called with a tracer, and compiles the others, once. What
such a function captures is kept with it: a mapped array that it reads, or a key of its own for
each sample, would be there still when the vmap is long over, and a draw that was compiled before
is one for all samples. `mx.disable_compile` is the switch; it is the whole process's.

What another thread calls meanwhile runs as it is written too: slower, and the same. Only the probe
of `always` is compiled while a vmap traces, and never while another thread does: that one would
find the switch on in the middle of its trace.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

import mlx.core as mx

from .versions import MLX

R = TypeVar("R")

#: What a function compiled elsewhere leaves in a thread's cache is freed when the thread ends,
#: without the lock that Python asks for, and the process aborts (0.31.2). What is compiled and
#: dropped in the thread itself leaves nothing.
THREAD_CACHE_BUG = MLX == (0, 31, 2)

_enable, _disable = mx.enable_compile, mx.disable_compile
_get_ident = threading.get_ident
_lock = threading.RLock()
#: The threads that trace a vmap.
_threads: set[int] = set()
#: Whether compilation is on as far as the user is concerned.
_wanted = True


def switch_off(known: bool = False) -> None:
    """Off while this thread traces a vmap; the user's switch, maybe `known` to be on, is kept."""
    global _wanted
    here = _get_ident()
    with _lock:
        if _threads:
            _threads.add(here)
            return
        _wanted = known or is_on()
        _threads.add(here)
        if _wanted:
            _disable()


def switch_back() -> None:
    """This thread traces no vmap. An interrupt may come between any two steps: call it again."""
    with _lock:
        here = _get_ident()
        if _wanted and len(_threads) == 1 and here in _threads:
            _enable()
        _threads.discard(here)


def want(on: bool) -> None:
    """The user's own switch, turned while a vmap is traced."""
    global _wanted
    with _lock:
        _wanted = on
        if not _threads:
            (_enable if on else _disable)()


def always(compiled: Callable[..., R]) -> Callable[..., R]:
    """`compiled`, which is what MLX compiled even inside a vmap, if this thread alone traces."""

    def call(*args: Any) -> R:
        if not _threads:
            return compiled(*args)
        with _lock:
            if _threads != {_get_ident()} or not _wanted:
                return compiled(*args)
            _enable()
            try:
                return compiled(*args)
            finally:
                if _threads:
                    _disable()

    return call


def after_fork() -> None:
    """In a child process, where the thread that forked is the only one."""
    global _lock
    _lock = threading.RLock()
    others = _threads - {threading.get_ident()}
    if others:
        _threads.difference_update(others)
        if not _threads and _wanted:
            _enable()


def in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def is_on() -> bool:
    # There is no getter: a compiled function that has been called before is not called again.
    probe = _probe
    if THREAD_CACHE_BUG and not in_main_thread():
        probe = mx.compile(_note)
    with _lock:
        probe()
        if not _calls:
            return True
        _calls.clear()
        probe()
        on = not _calls
        _calls.clear()
        return on


_calls: list[None] = []


def _note() -> list[mx.array]:
    _calls.append(None)
    return []


_probe = mx.compile(_note)
