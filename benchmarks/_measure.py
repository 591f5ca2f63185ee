"""What every benchmark measures with."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import mlx.core as mx

import mlxshim

Thunk = Callable[[], list[mx.array]]
GPU = mx.default_device().type == mx.gpu
#: Which of the times of `measure` is compared: on a CPU the process's own.
TIME = "ms" if GPU else "own_ms"


def measure(fun: Thunk, repeats: int, seconds: float = 1.5) -> dict[str, float]:
    """Milliseconds of one call, alone and among others, and its peak MiB above the inputs.

    About `seconds` for each of the two, unless a few calls take longer.
    On a CPU also those of the process's own, which other work on the machine does not lengthen.
    """
    mx.clear_cache()
    mx.eval(fun())
    mx.synchronize()
    mx.clear_cache()
    active = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(fun())
    mx.synchronize()
    peak = (mx.get_peak_memory() - active) / 2**20
    times, own, start = [], [], time.perf_counter()
    while len(times) < repeats and (len(times) < 3 or time.perf_counter() - start < seconds):
        begin, before = time.perf_counter(), time.process_time()
        mx.eval(fun())
        mx.synchronize()
        times.append((time.perf_counter() - begin) * 1e3)
        own.append((time.process_time() - before) * 1e3)
    median = statistics.median(times)
    calls = 20 if median < 50 else 3
    shares = []
    for _ in range(max(1, min(5, int(seconds * 1e3 / (calls * median)))) if calls == 20 else 1):
        begin = time.perf_counter()
        for _ in range(calls):
            mx.async_eval(fun())
        mx.synchronize()
        shares.append((time.perf_counter() - begin) * 1e3 / calls)
    found = {
        "ms": median, "pipelined_ms": statistics.median(shares), "mib": peak,
    }  # fmt: skip
    return found if GPU else {**found, "own_ms": statistics.median(own)}


def by_loop(fun: Callable[..., list[mx.array]], arrays: list[mx.array]) -> list[mx.array]:
    results = [fun(*sample) for sample in zip(*arrays)]
    return [mx.stack(list(outs)) for outs in zip(*results)]


def error_of(got: list[mx.array], want: list[mx.array]) -> float:
    pairs = [(g.astype(mx.float32), w.astype(mx.float32)) for g, w in zip(got, want)]
    return max(float(mx.linalg.norm(g - w) / mx.linalg.norm(w)) for g, w in pairs)


def describe_machine() -> dict[str, Any]:
    try:
        device = dict(mx.device_info())
    except (AttributeError, TypeError, RuntimeError):
        device = {}
    return {
        "device": device.get("device_name", platform.processor() or platform.machine()),
        "backend": str(mx.default_device()),
        "mlx": mx.__version__,
        "mlxshim": mlxshim.__version__,
        "python": platform.python_version(),
    }
