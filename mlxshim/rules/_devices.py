"""What the device at hand has kernels for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx


def gpu(stream: Any = None) -> bool:
    """Whether a call on `stream` (None: the default device) runs on a GPU."""
    device = mx.default_device() if stream is None else getattr(stream, "device", stream)
    return device.type == mx.gpu if isinstance(device, mx.Device) else device == mx.gpu


def fuses(stack: Sequence[str], stream: Any) -> bool:
    """Whether a mapped call can reach a fused kernel that MLX's own rule would miss.

    Fused kernels live on GPUs; tangents and second derivatives are decomposed everywhere.
    """
    return "vmap" in stack and "jvp" not in stack and stack.count("grad") < 2 and gpu(stream)
