"""Every text architecture of mlx-lm, dense and in 4 bits, equals the loop over samples.

The list is that of the mlx-lm that is installed. Each architecture runs in a process that may die;
what is asked of it is in `architectures/samples.py`.
"""

from __future__ import annotations

import mlx.core as mx
import pytest
from architectures.configurations import architectures
from architectures.samples import difference
from conformance.worker import Worker

from mlxshim.core.versions import MLX

#: They read routing out of an array with `tolist`, so no trace can follow: a loop is the answer.
READ_VALUES = {"dbrx"}

#: What MLX itself refuses to do with a single sample.
REFUSED = {
    ("deepseek_v41", "vmap(grad)"): "Cannot calculate VJP with respect to indices",
}

NAMES = architectures() if MLX >= (0, 32, 2) else []


@pytest.fixture(scope="module")
def worker():
    worker = Worker(server="architectures.worker")
    yield worker
    worker.close()


@pytest.mark.skipif(not NAMES, reason="mlx-lm and the MLX 0.32.2 that it wants are not here")
@pytest.mark.parametrize("name", NAMES)
def test_equals_the_loop(worker: Worker, name: str):
    results = worker.run(name)
    for result in results:
        if "unavailable" in result:
            pytest.skip(result["unavailable"])
    failed, compared = [], 0
    for result in results:
        case = f"{result['mode']} {result['where']}"
        if said := result.get("refused"):
            if REFUSED.get((name, result["mode"]), "nowhere") not in said:
                failed.append(f"{case}: one sample: {said}")
        elif said := result.get("error"):
            failed.append(f"{case}: {said}")
        elif result.get("looped") and name not in READ_VALUES:
            failed.append(f"{case}: {result['looped']}")
        else:
            compared += bool(result.get("compared"))
    assert not failed, f"{len(failed)} of {len(results)}:\n" + "\n".join(failed)
    assert compared >= 3, "hardly anything was compared"


def test_a_wrong_number_is_seen():
    want = [("weight", mx.ones((2, 3))), ("bias", mx.array([1e-9, 0.0, -mx.inf]))]
    assert difference(want, want) is None
    assert difference([("weight", mx.ones((2, 3)) + 1e-6), want[1]], want) is None
    assert "differs" in str(difference([("weight", mx.ones((2, 3)) * 1.01), want[1]], want))
    assert "differs" in str(difference([want[0], ("bias", mx.array([0.0, 0.0, 1.0]))], want))
    assert "float16" in str(difference([("weight", mx.ones((2, 3), mx.float16)), want[1]], want))
