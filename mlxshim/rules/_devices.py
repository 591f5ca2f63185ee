"""Where calls run, and what the device at hand has kernels for."""

from __future__ import annotations

import contextlib
from typing import Any

import mlx.core as mx


def within(stream: Any) -> Any:
    """The context of a call that was given `stream`; None: the default."""
    return contextlib.nullcontext() if stream is None else mx.stream(stream)


def gpu(stream: Any = None) -> bool:
    """Whether a call on `stream` (None: the default device) runs on a GPU."""
    device = mx.default_device() if stream is None else getattr(stream, "device", stream)
    return device.type == mx.gpu if isinstance(device, mx.Device) else device == mx.gpu


def cuda() -> bool:
    """Whether the default device is a CUDA GPU."""
    return gpu() and not mx.metal.is_available()
