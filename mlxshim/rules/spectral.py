"""The short-time Fourier transform: MLX's frames are an AsStrided, which has no batching rule.

    S[.., f, t] = sum_n w[n] x[.., t hop + n] exp(-2 pi i f n / n_fft)

`x` is padded by n_fft // 2 at both ends if centred, the window by zeros to n_fft. Here the frames
are gathered instead. `mx.fft.stft` is of MLX 0.32.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from ..core import levels
from ..core.interception import intercept, original

if hasattr(mx.fft, "stft"):

    @intercept(mx.fft, "stft")
    def stft(
        x: mx.array,
        n_fft: int = 2048,
        hop_length: int | None = None,
        win_length: int | None = None,
        window: mx.array | None = None,
        center: bool = True,
        pad_mode: Any = "reflect",
        norm: Any = "backward",
        onesided: bool | None = None,
        stream: Any = None,
    ) -> mx.array:
        # Its frames are thrown away; what it refuses, it refuses here.
        raw = original(mx.fft, "stft")(
            x, n_fft, hop_length, win_length, window, center, pad_mode, norm, onesided, stream
        )
        if "vmap" not in levels.active():
            return raw
        hop = hop_length or n_fft // 4
        length = win_length or (n_fft if window is None else window.size)
        if window is None and length < n_fft:
            window = mx.ones(length)
        if window is not None and length < n_fft:
            left = (n_fft - length) // 2
            window = mx.pad(window, (left, n_fft - length - left), stream=stream)
        if center:
            ends = [(0, 0)] * (x.ndim - 1) + [(n_fft // 2, n_fft // 2)]
            x = mx.pad(x, ends, mode=pad_mode, stream=stream)
        count = 1 + (x.shape[-1] - n_fft) // hop
        starts = mx.expand_dims(mx.arange(count), 1) * hop
        frames = mx.take(x, starts + mx.arange(n_fft), axis=-1, stream=stream)
        if window is not None:
            frames = mx.multiply(frames, window, stream=stream)
        if onesided is None:
            onesided = not mx.issubdtype(x.dtype, mx.complexfloating)
        transform: Any = mx.fft.rfft if onesided else mx.fft.fft
        return mx.swapaxes(transform(frames, norm=norm, stream=stream), -1, -2, stream=stream)
