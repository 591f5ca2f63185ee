"""The installed MLX's version, and the repairs that old ones need."""

from __future__ import annotations

import re

import mlx.core as mx


def _parse(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


MLX_VERSION: str = mx.__version__  # pyright: ignore[reportAttributeAccessIssue]
MLX: tuple[int, ...] = _parse(MLX_VERSION)

#: What the tests are run with. Others between are served by the same repairs.
TESTED = ((0, 31, 1), (0, 31, 2), (0, 32, 0), (0, 32, 4))
OLDEST_TESTED, NEWEST_TESTED = TESTED[0], TESTED[-1]

#: `broadcast_arrays` uses a shape after moving it (fixed by ml-explore/mlx#3310): whatever a
#: compiler that evaluates arguments left to right built cannot transform a broadcasting matmul.
MOVED_SHAPE_BUG = MLX < (0, 31, 2)

#: `Select::jvp` and `DivMod::jvp` index tangents by argument number: out of bounds where only
#: some arguments have one (0.31.1 and 0.31.2).
SELECT_JVP_BUG = MLX < (0, 32, 0)

#: `SliceUpdate::jvp` wants a tangent of both arguments: refused where one has none (0.32.0), or
#: read out of bounds (0.31.1 and 0.31.2).
TWO_TANGENTS_BUG = MLX < (0, 32, 4)

#: An evaluation that raises frees what is still being written; waiting for that, while the
#: exception holds the arrays, is enough.
LATE_WRITES_BUG = MLX < (0, 32, 0)
