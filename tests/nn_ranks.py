"""What each process of tests/test_nn_distributed.py runs; it reports on a line of JSON."""

from __future__ import annotations

import json
import os
import sys
import tempfile

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from nn_models import mixed_case

from mlxshim.nn import (
    RankFailed,
    across_ranks,
    clipped_grad,
    per_sample_norms,
    per_sample_value_and_grad,
    value_and_grad,
)


def error(got, want):
    got, want = (dict(tree_flatten([x])) for x in (got, want))
    assert list(got) == list(want)
    worst = 0.0
    for name in want:
        assert got[name].shape == want[name].shape, name
        assert got[name].dtype == want[name].dtype, name
        scale = max(float(mx.abs(want[name]).max()), 1e-9)
        worst = max(worst, float(mx.abs(got[name] - want[name]).max()) / scale)
    return worst


def main(backend):
    group = mx.distributed.init(strict=True, backend=backend)
    rank, size = group.rank(), group.size()
    mx.random.seed(0)
    model, loss, data = mixed_case(samples=7)
    # 5 and 2 of the samples; all and none; what two ranks have, the others have not.
    for name, cuts in (("uneven", [0, 5, 7]), ("none", [0, 7, 7])):
        cuts = cuts + [7] * (size + 1 - len(cuts))
        mine = [x[cuts[rank] : cuts[rank + 1]] for x in data]
        clip, norms = clipped_grad(model, loss, 0.5), per_sample_norms(model, loss)
        each = per_sample_value_and_grad(model, loss)
        found = {}
        got = across_ranks(clip, ("samples", "sum", "samples"), group)(model, *mine)
        found["clipped"] = error(got, clip(model, *data))
        got = across_ranks(norms, ("samples", "samples"), group)(model, *mine)
        found["norms"] = error(got, norms(model, *data))
        got = across_ranks(each, ("samples", "samples"), group)(model, *mine)
        found["per sample"] = error(got, each(model, *data))
        got = across_ranks(each, ("samples", "own"), group)(model, *mine)
        found["own"] = error(got[1], each(model, *mine)[1]) if len(mine[0]) else 0.0
        print(json.dumps({"rank": rank, "size": size, "case": name, **found}), flush=True)
    line, x = nn.Linear(3, 2), mx.random.normal((6, 3))
    clip = clipped_grad(line, lambda model, x: model(x).square().sum(), 0.5)
    step = across_ranks(mx.compile(lambda x: clip(line, x)), ("samples", "sum", "samples"), group)
    compiled = error(step(x[2 * rank : 2 * rank + 2]), clip(line, x[: 2 * size]))
    print(json.dumps({"rank": rank, "case": "compiled", "error": compiled}), flush=True)

    clip = clipped_grad(model, loss, 0.5)
    model.set_dtype(mx.bfloat16)
    got = across_ranks(clip, ("samples", "sum", "samples"), group)(model, *mine)
    dtypes = {str(x.dtype) for _, x in tree_flatten(got[1])}
    print(json.dumps({"rank": rank, "case": "half", "dtypes": sorted(dtypes)}), flush=True)
    model.set_dtype(mx.float32)

    # What not every backend sends by itself. The second rank has one sample, the first two.
    whole = {
        "bool": mx.array([True, False, True]),
        "int16": mx.array([-3, 2, 30000], mx.int16),
        "complex": mx.array([1 + 2j, 3j, -1.0]),
        "scalars": mx.array([1, 2, 3], mx.int64),
    }
    part = slice(0, 2) if rank == 0 else slice(2, 3)
    own = {name: x[part] for name, x in whole.items()}
    sums = {"complex": mx.array([1 + 1j, 2j]), "half": mx.array(0.5, mx.float16)}
    got = across_ranks(lambda: (own, sums), ("samples", "sum"), group)()
    joined = all(
        x.dtype == whole[name].dtype and mx.array_equal(x, whole[name]).item()
        for name, x in got[0].items()
    )
    added = all(
        x.dtype == sums[name].dtype and mx.array_equal(x, size * sums[name]).item()
        for name, x in got[1].items()
    )
    row = {"rank": rank, "case": "dtypes", "joined": joined, "added": added}
    print(json.dumps(row), flush=True)

    # A step that fails on the last rank ends with an error on every one; the next one works.
    def fails(model, x, y):
        if rank == size - 1:
            raise KeyError("mine")
        return loss(model, x, y)

    step = across_ranks(value_and_grad(model, fails), ("own", "sum"), group)
    try:
        step(model, *data)
        ended = "without an error"
    except RankFailed as e:
        ended = f"RankFailed: {e}"
    except KeyError as e:
        ended = f"KeyError: {e}"
    whole = value_and_grad(model, loss)
    got = across_ranks(whole, ("own", "sum"), group)(model, *data)[1]
    want = [size * x for _, x in tree_flatten(whole(model, *data)[1])]
    after = error([x for _, x in tree_flatten(got)], want)
    print(json.dumps({"rank": rank, "case": "failure", "ended": ended, "after": after}), flush=True)


if __name__ == "__main__":
    # The ranks compile the same on one host (docs/mlx-issues.md).
    with tempfile.TemporaryDirectory() as os.environ["TMPDIR"]:
        main(sys.argv[1])
