"""`a @ a` on one core of the CPU: with the BLAS that MLX finds, and with OpenBLAS.

    python -m benchmarks.blas [--sizes 256,512,1024] [--dtype float32] [--repeats 20] [--json FILE]

On Linux the wheel of MLX without a GPU carries the reference BLAS; OpenBLAS (Debian's
`libopenblas0`) is preloaded. Each runs in a process of its own. Where there is no OpenBLAS, and
elsewhere than on Linux, there is the first alone. OpenBLAS is named with the processor whose kernel
it took: `OPENBLAS_CORETYPE=Haswell` asks for that of AVX2.
"""

from __future__ import annotations

import argparse
import ctypes
import ctypes.util
import json
import os
import subprocess
import sys
from typing import Any

import mlx.core as mx

from mlxshim import doctor

from ._measure import describe_machine, measure
from ._program import announce, command_line, save

COLUMNS = ["n", "BLAS", "time", "rate"]


def kernel() -> str | None:
    """The name of the processor whose kernel OpenBLAS took, if it is there."""
    try:
        corename = ctypes.CDLL(None).openblas_get_corename
    except AttributeError:
        return None
    corename.restype = ctypes.c_char_p
    return corename().decode()


def here(sizes: list[int], dtype: str, repeats: int) -> dict[str, Any]:
    """Milliseconds of a product of each size, with the BLAS of this process."""
    mx.set_default_device(mx.Device(mx.cpu))
    found = {}
    for n in sizes:
        a = mx.random.normal((n, n)).astype(getattr(mx, dtype))
        mx.eval(a)
        found[str(n)] = measure(lambda a=a: [a @ a], repeats)["own_ms"]
    return {"blas": doctor.blas(), "kernel": kernel(), "ms": found}


def elsewhere(options: argparse.Namespace, preload: str | None) -> dict[str, Any]:
    """The same in a process of its own, with a library preloaded or none."""
    environment = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
    if preload:
        environment["LD_PRELOAD"] = preload
    environment |= {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.blas", "--here", "--sizes", options.sizes]
    command += ["--dtype", options.dtype, "--repeats", str(options.repeats)]
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = command_line(__doc__, png=False)
    parser.add_argument("--sizes", default="256,512,1024")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    sizes = [int(n) for n in options.sizes.split(",")]
    if options.here:
        print(json.dumps(here(sizes, options.dtype, options.repeats)))
        return
    about = announce("blas", describe_machine(), columns=COLUMNS, dtype=options.dtype)
    library = ctypes.util.find_library("openblas") if sys.platform == "linux" else None
    found = [elsewhere(options, preload) for preload in ([None, library] if library else [None])]
    rows: list[dict[str, Any]] = []
    for n in map(str, sizes):
        for one in found:
            ms = one["ms"][n]
            name = one["blas"] + (f" ({one['kernel']})" if one["kernel"] else "")
            faster = f", {found[0]['ms'][n] / ms:.0f} times" if one is not found[0] else ""
            rate = f"{2 * int(n) ** 3 / ms / 1e6:.0f} GFLOP/s{faster}"
            rows.append({"n": n, "BLAS": name, "time": f"{ms:.2f} ms", "rate": rate, "ms": ms})
            print(f"{n:>6} {name:<24} {ms:9.2f} ms {rate}", flush=True)
    save(options.json, {**about, "rows": rows})


if __name__ == "__main__":
    main()
