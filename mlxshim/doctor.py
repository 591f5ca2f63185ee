"""What works on this machine under the transforms, natively and through mlxshim.

Every case runs in a subprocess of its own, with a time limit, because what it looks for are hangs
and crashes. Its result is compared with the loop over samples, written with plain operations.
"""

from __future__ import annotations

import argparse
import ctypes
import ctypes.util
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import mlx.core as mx

import mlxshim
from mlxshim.core import versions
from mlxshim.doctor_operations import SAMPLES, Operation, loop, operations, weighed

SIDES = ("native", "mlxshim")
TOLERANCE = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 8e-2}


@dataclass(frozen=True)
class Case:
    """One call of attention under one transform; shapes are those of one sample."""

    transform: str
    heads: str = "4/2"
    mask: str = "none"
    dtype: str = "float32"
    q_length: int = 16
    k_length: int = 16
    shared_kv: bool = False

    @property
    def name(self) -> str:
        parts = [self.transform, self.heads, self.mask, self.dtype]
        if self.q_length == 1:
            parts.append("decode")
        if self.k_length > 64:
            parts.append(f"L={self.k_length}")
        if self.shared_kv:
            parts.append("shared K/V")
        return " ".join(p for p in parts if p not in ("none", "float32"))

    def parts(self, lib: Any) -> tuple[Callable[..., Any], Callable[..., Any], list[mx.array]]:
        """(the function under the transform, what it means, its arguments)."""
        arrays = _arrays(self)
        axes = (0, None, None) if self.shared_kv else (0, 0, 0)
        under_test = _one_sample(self, _fused(self), lib)
        meant = _one_sample(self, _plain(self), mx)
        for _ in range(self.transform.count("vmap")):
            under_test = lib.vmap(under_test, in_axes=axes)
            meant = loop(meant, axes)
        if "vmap" not in self.transform:
            arrays = [x[0] for x in arrays]
        return under_test, meant, arrays


def cases(long: bool = False) -> list[Case | Operation]:
    """Attention, as in the original report and around it, and operations of every family."""
    heads = ("4/4", "4/2", "4/1")
    matrix: list[Case | Operation] = [
        Case(t, h) for t in ("vmap(fwd)", "vmap(grad)", "grad") for h in heads
    ]
    matrix += [Case(t, h, "causal") for t in ("vmap(fwd)", "vmap(grad)") for h in heads]
    matrix += [Case("vmap(grad)", mask=m) for m in ("bool", "additive")]
    matrix += [Case("vmap(fwd)", q_length=1, shared_kv=s) for s in (False, True)]
    matrix += [Case("vmap(grad)", mask="causal", dtype=d) for d in ("float16", "bfloat16")]
    matrix += [Case("vmap(fwd)", shared_kv=True), Case("vmap(grad)", shared_kv=True)]
    matrix += [Case("jvp", mask="causal"), Case("vmap(jvp)"), Case("vmap(jvp)", mask="causal")]
    matrix += [Case("vmap(vmap)"), Case("vmap(vmap)", mask="causal", shared_kv=True)]
    for length in (512, 2048, 4096) if long else (512,):
        matrix += [
            Case(t, mask="causal", q_length=length, k_length=length)
            for t in ("vmap(fwd)", "vmap(grad)")
        ]
    return matrix + operations()


# One case, in its own process -------------------------------------------------------------------


def _arrays(case: Case) -> list[mx.array]:
    mx.random.seed(0)
    heads, kv_heads = (int(h) for h in case.heads.split("/"))
    lead = (2, SAMPLES) if case.transform == "vmap(vmap)" else (SAMPLES,)
    kv_lead = () if case.shared_kv else lead
    shapes = [
        (*lead, 1, heads, case.q_length, 32),
        (*kv_lead, 1, kv_heads, case.k_length, 32),
        (*kv_lead, 1, kv_heads, case.k_length, 32),
    ]
    return [mx.random.normal(s).astype(getattr(mx, case.dtype)) for s in shapes]


def _mask(case: Case) -> Any:
    shape = (case.q_length, case.k_length)
    if case.mask == "bool":
        return mx.tri(*shape, dtype=mx.bool_)
    if case.mask == "additive":
        return mx.random.normal(shape, key=mx.random.key(1)).astype(getattr(mx, case.dtype))
    return "causal" if case.mask == "causal" else None


def _fused(case: Case) -> Callable[..., mx.array]:
    mask = _mask(case)

    def call(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=0.3, mask=mask)

    return call


def _plain(case: Case) -> Callable[..., mx.array]:
    """Attention with K/V repeated and masks added: safe under every MLX's derivatives."""
    heads, kv_heads = (int(h) for h in case.heads.split("/"))
    mask = _mask(case)
    if mask is None:
        bias = mx.zeros((1, 1))
    elif isinstance(mask, str) or mask.dtype == mx.bool_:
        kept = mx.tri(case.q_length, case.k_length, case.k_length - case.q_length)
        bias = (kept - 1) * 1e9
    else:
        bias = mask.astype(mx.float32)

    def call(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        q, k, v = (x.astype(mx.float32) for x in (q, k, v))
        k, v = (mx.repeat(x, heads // kv_heads, axis=1) for x in (k, v))
        return mx.softmax((q * 0.3) @ k.swapaxes(-1, -2) + bias, axis=-1) @ v

    return call


def _one_sample(case: Case, fun: Callable[..., mx.array], lib: Any) -> Callable[..., Any]:
    """The function of one sample under the case's transform, without its vmaps."""
    if "grad" in case.transform:

        def loss(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
            return weighed(fun(q, k, v))

        return lib.grad(loss, argnums=[0, 1, 2])
    if "jvp" in case.transform:
        return lambda *xs: lib.jvp(fun, list(xs), [mx.cos(x) for x in xs])[1]
    return lambda *xs: [fun(*xs)]


def _run(case: Case | Operation, side: str) -> dict[str, Any]:
    lib: Any = mlxshim if side == "mlxshim" else mx
    under_test, meant, arrays = case.parts(lib)
    mx.eval(under_test(*arrays))
    active = mx.get_active_memory()
    mx.reset_peak_memory()
    start = time.perf_counter()
    got = list(under_test(*arrays))
    mx.eval(got)
    ms = (time.perf_counter() - start) * 1e3
    mib = (mx.get_peak_memory() - active) / 2**20
    return {"error": _error(got, list(meant(*arrays))), "ms": ms, "mib": mib}


def _error(got: list[mx.array], want: list[mx.array]) -> float:
    """The largest difference, relative to the largest value; infinite for a wrong shape or NaN."""
    worst = 0.0
    for g, w in zip(got, want):
        if g.shape != w.shape:
            return float("inf")
        g, w = g.astype(mx.float32), w.astype(mx.float32)
        error = float(mx.abs(g - w).max() / mx.maximum(mx.abs(w).max(), 1e-6))
        worst = max(worst, error if error == error else float("inf"))
    return worst


# All cases, from outside ------------------------------------------------------------------------


@dataclass
class Result:
    """What became of one case on one side."""

    case: str
    side: str
    verdict: str
    error: float | None = None
    ms: float | None = None
    mib: float | None = None

    def __str__(self) -> str:
        if self.error is None:
            return self.verdict
        return f"{self.verdict} {self.error:.0e} {self.ms:7.1f} ms {self.mib:6.1f} MiB"


def judge(command: Sequence[str], timeout: float) -> tuple[str, dict[str, Any]]:
    """Run a command that prints a JSON object last: (its verdict, the object)."""
    # What MLX compiles on a CPU lies in this folder, where a process finds what another one has
    # only half written (docs/mlx-issues.md).
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as own:
        env = {**os.environ, "TMPDIR": own}
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=env)
        except subprocess.TimeoutExpired:
            return "HANG", {}
    if done.returncode < 0:
        return signal.Signals(-done.returncode).name, {}
    lines = (done.stdout.strip() or done.stderr.strip() or "no output").splitlines()
    if done.returncode > 0:
        lines = (done.stderr.strip() or "no output").splitlines()
        return lines[-1][:100], {}
    return "PASS", json.loads(lines[-1])


def examine(index: int, case: Case | Operation, side: str, long: bool, timeout: float) -> Result:
    command = [sys.executable, "-m", "mlxshim", "--run", f"{index}:{side}"]
    verdict, found = judge(command + ["--long"] * long, timeout)
    if found and not found["error"] <= TOLERANCE[case.dtype]:
        verdict = "WRONG"
    return Result(case.name, side, verdict, **found)


REFERENCE = "reference"


def blas() -> str:
    """Which BLAS multiplies float32 matrices on the CPU, as far as the process shows it."""
    if sys.platform != "linux":
        return "Accelerate" if sys.platform == "darwin" else "unknown"
    try:
        # What is preloaded comes before the library that MLX was linked with.
        ctypes.CDLL(None).cblas_sgemm  # noqa: B018
        preloaded = True
    except AttributeError:
        preloaded = False
    try:
        with open("/proc/self/maps") as maps:
            files = {line.split()[-1] for line in maps if "/" in line}
    except OSError:
        return "unknown"
    return name_blas(files, preloaded)


def name_blas(files: Iterable[str], preloaded: bool) -> str:
    """Of the files that a process has mapped, the BLAS that MLX calls."""
    # NumPy and SciPy bring an OpenBLAS under names of their own, which MLX does not call.
    paths = [f for f in files if "scipy_openblas" not in f and "numpy.libs" not in f]
    fast = {"openblas": "OpenBLAS", "mkl_rt": "MKL", "libblis": "BLIS"}
    here = [name for key, name in fast.items() if any(key in f for f in paths)]
    carried = any(os.path.basename(f).startswith("libblas") for f in paths)
    if here and (
        preloaded or not carried or any("libblas" in f and "openblas" in f for f in paths)
    ):
        return here[0]
    if preloaded:
        return "preloaded"
    return REFERENCE if carried else "unknown"


def _faster_blas() -> str:
    there = ctypes.util.find_library("openblas")
    install = "" if there else "install OpenBLAS (Debian, Ubuntu: libopenblas0) and "
    return (
        "MLX multiplies float32 matrices with the reference BLAS that its Linux wheel carries: "
        f"{install}run with LD_PRELOAD={there or 'libopenblas.so.0'}, which is 15 to 30 times "
        "faster on one core"
    )


def _untested(mlx: tuple[int, ...]) -> list[str]:
    tested = versions.OLDEST_TESTED, versions.NEWEST_TESTED
    oldest, newest = (".".join(map(str, v)) for v in tested)
    if mlx > versions.NEWEST_TESTED:
        return [
            f"this MLX is newer than {newest}, the newest that mlxshim was tested with: this "
            "command checks a few operations; the conformance suite, `python -m pytest "
            "tests/conformance` in a checkout, checks every operation"
        ]
    if mlx < versions.OLDEST_TESTED:
        return [f"this MLX is older than {oldest}, the oldest that mlxshim serves: upgrade it"]
    return []


def about() -> dict[str, Any]:
    """Versions, the device, and what is known of this MLX."""
    notes = []
    if versions.MOVED_SHAPE_BUG:
        notes.append(
            "this MLX has the broadcast_arrays bug (0.22 to 0.31.1): builds by clang, every macOS "
            "wheel among them, hang or crash in vmap of grouped-query attention; upgrade to 0.31.2"
        )
    if versions.SELECT_JVP_BUG:
        notes.append("this MLX crashes in jvp of causal attention (0.31.1, 0.31.2), on any build")
    notes += _untested(versions.MLX)
    found = blas()
    if found == REFERENCE and mx.default_device().type == mx.cpu:
        notes.append(_faster_blas())
    return {
        "mlx": versions.MLX_VERSION,
        "mlxshim": mlxshim.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": str(mx.default_device()),
        "blas": found,
        "affected": versions.MOVED_SHAPE_BUG or versions.SELECT_JVP_BUG,
        "notes": notes,
    }


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m mlxshim", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    parser.add_argument("--long", action="store_true", help="lengths 2048 and 4096 too")
    parser.add_argument("--filter", default="", help="only cases whose name contains this")
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds for one case")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the matrix; 1 if a case fails through mlxshim, 2 if no case has the filter's words."""
    options = _parse(argv)
    if options.run:
        index, side = options.run.split(":")
        print(json.dumps(_run(cases(options.long)[int(index)], side)))
        return 0
    facts = about()
    if not options.json:
        for key in ("mlx", "mlxshim", "python", "platform", "device", "blas", "affected"):
            print(f"{key:<9} {facts[key]}")
        for note in facts["notes"]:
            print(f"note      {note}")
        print(flush=True)
    jobs = [
        (i, case, side)
        for i, case in enumerate(cases(options.long))
        for side in SIDES
        if options.filter in case.name
    ]
    if not jobs:
        print(f"no case's name contains {options.filter!r}", file=sys.stderr)
        return 2
    results: list[Result] = []
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 2)) as pool:
        futures = [pool.submit(examine, *job, options.long, options.timeout) for job in jobs]
        for done, (future, job) in enumerate(zip(futures, jobs), 1):
            results.append(future.result())
            if sys.stderr.isatty():
                line = f"{done}/{len(jobs)} {job[1].name}"
                print(f"\r{line:<70.70}", end="", file=sys.stderr, flush=True)
    if sys.stderr.isatty():
        print("\r" + " " * 70 + "\r", end="", file=sys.stderr, flush=True)
    failed = [r for r in results if r.side == "mlxshim" and r.verdict != "PASS"]
    if options.json:
        rows = [asdict(r) for r in results]
        print(json.dumps({**facts, "results": rows, "failed": len(failed)}, indent=1))
    else:
        _print_table(results)
    return 1 if failed else 0


def _print_table(results: list[Result]) -> None:
    width = max(len(r.case) for r in results)
    print(f"{'case':<{width}}  {'natively':<38}  through mlxshim")
    for native, mine in zip(results[::2], results[1::2]):
        print(f"{native.case:<{width}}  {native!s:<38.38}  {mine}")
    for side in SIDES:
        mine = [r for r in results if r.side == side]
        passed = sum(r.verdict == "PASS" for r in mine)
        print(f"{side:<8} {passed} of {len(mine)} pass")
    print("PASS and WRONG come with the error against the loop, the time and the peak memory")
