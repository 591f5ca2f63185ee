from __future__ import annotations

import mlx.core as mx

from .case import case, normal

case("fast.rms_norm", lambda x, w: mx.fast.rms_norm(x, w, 1e-5), normal(2, 3, 8), normal(8))
case("fast.rms_norm/no weight", lambda x: mx.fast.rms_norm(x, None, 1e-5), normal(2, 3, 8))
