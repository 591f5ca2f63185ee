from __future__ import annotations

import mlx.core as mx

from .case import case, integers, normal

if hasattr(mx.fast, "cross_entropy"):
    for name, dtypes in (("", (mx.float32,)), ("/half", (mx.float16,))):
        case(
            f"fast.cross_entropy{name}",
            lambda logits, targets: mx.fast.cross_entropy(logits, targets),
            normal(2, 3, 5),
            integers(2, 3, high=5),
            dtypes=dtypes,
        )
    case(
        "fast.cross_entropy/one row",
        lambda logits, target: mx.fast.cross_entropy(logits, target),
        normal(5),
        integers(high=5),
    )
