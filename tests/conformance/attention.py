"""Attention; every form and subset of it is in tests/test_attention.py.

Source: mlx/fast.cpp.
"""

from __future__ import annotations

import mlx.core as mx

from .case import case, normal, uniform

GROUPED = (normal(2, 4, 3, 8), normal(2, 2, 5, 8), normal(2, 2, 5, 6))


def attend(*args, **kwargs):
    return mx.fast.scaled_dot_product_attention(*args, scale=0.3, **kwargs)


case("fast.scaled_dot_product_attention", attend, *GROUPED, tolerance=1e-4)
case(
    "fast.scaled_dot_product_attention/causal",
    lambda q, k, v: attend(q, k, v, mask="causal"),
    *GROUPED,
    tolerance=1e-4,
)

if hasattr(mx.fast, "gated_delta_update"):
    case(
        "fast.gated_delta_update",
        lambda q, k, v, gates: mx.fast.gated_delta_update(q, k, v, gates, 1 - gates),
        normal(2, 4, 2, 8),
        uniform(2, 4, 2, 8, low=0.0, high=0.3),
        normal(2, 4, 2, 6),
        uniform(2, 4, 2),
        modes=("vmap", "vmap(grad)"),
    )
