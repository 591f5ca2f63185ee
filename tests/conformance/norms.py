from __future__ import annotations

import mlx.core as mx

from .case import case, normal

HALF = (mx.float32, mx.float16)

case("fast.rms_norm", lambda x, w: mx.fast.rms_norm(x, w, 1e-5), normal(2, 3, 8), normal(8))
case(
    "fast.rms_norm/no weight",
    lambda x: mx.fast.rms_norm(x, None, 1e-5),
    normal(2, 3, 8),
    dtypes=HALF,
)
case(
    "fast.rms_norm/vector",
    lambda x, w: mx.fast.rms_norm(x, w, eps=1e-2),
    normal(5),
    normal(5),
    dtypes=HALF,
)
case(
    "fast.rms_norm/wider weight",
    lambda x, w: mx.fast.rms_norm(x.astype(mx.float16), w, 1e-5),
    normal(4, 6),
    normal(6),
    tolerance=2e-2,
)
case(
    "fast.layer_norm",
    lambda x, w, b: mx.fast.layer_norm(x, w, b, 1e-5),
    normal(2, 3, 8),
    normal(8),
    normal(8),
)
case(
    "fast.layer_norm/half",
    lambda x, w, b: mx.fast.layer_norm(x, w, b, 1e-2),
    normal(3, 6),
    normal(6),
    normal(6),
    dtypes=(mx.float16,),
)
case("fast.layer_norm/plain", lambda x: mx.fast.layer_norm(x, None, None, 1e-5), normal(2, 3, 8))
case(
    "fast.layer_norm/no bias",
    lambda x, w: mx.fast.layer_norm(x, w, None, 1e-5),
    normal(3, 8),
    normal(8),
)
case(
    "fast.layer_norm/no weight",
    lambda x, b: mx.fast.layer_norm(x, None, b, 1e-5),
    normal(3, 8),
    normal(8),
)
# Rows of 16 bytes: of others MLX's own gradient, which the loop takes, is wrong on CUDA.
case(
    "fast.layer_norm/wider bias",
    lambda x, w, b: mx.fast.layer_norm(x.astype(mx.float16), w.astype(mx.float16), b, 1e-5),
    normal(4, 8),
    normal(8),
    normal(8),
    tolerance=2e-2,
)
