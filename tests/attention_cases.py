"""Attention calls, an independent reference, and the loop that every transform must equal."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx

SAMPLES = 3


@dataclass(frozen=True)
class Case:
    """One call of attention, by the shapes of one sample."""

    name: str
    heads: int = 4
    kv_heads: int = 2
    batch: int = 2
    q_length: int = 5
    k_length: int = 5
    dim: int = 8
    value_dim: int = 8
    mask: str | None = None  # None, "causal", "bool" or "additive"
    mask_shape: tuple[int, ...] = ()
    sinks: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        mask = ("mask",) if self.mask in ("bool", "additive") else ()
        return ("q", "k", "v", *mask, *(("sinks",) if self.sinks else ()))

    def shape(self, name: str) -> tuple[int, ...]:
        return {
            "q": (self.batch, self.heads, self.q_length, self.dim),
            "k": (self.batch, self.kv_heads, self.k_length, self.dim),
            "v": (self.batch, self.kv_heads, self.k_length, self.value_dim),
            "mask": self.mask_shape,
            "sinks": (self.heads,),
        }[name]

    def array(self, name: str, lead: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
        shape = (*lead, *self.shape(name))
        if name == "mask" and self.mask == "bool":
            keep = mx.random.uniform(shape=shape) < 0.6
            if shape and shape[-1] > 1:  # a row of nothing is another test
                keep = mx.concatenate([mx.ones((*shape[:-1], 1), mx.bool_), keep[..., 1:]], -1)
            return keep
        return mx.random.normal(shape).astype(dtype)

    def call(self, *arrays: mx.array) -> mx.array:
        """The fused operation, looked up at call time as library code does."""
        given = dict(zip(self.names, arrays))
        return mx.fast.scaled_dot_product_attention(
            given["q"],
            given["k"],
            given["v"],
            scale=0.4,
            mask="causal" if self.mask == "causal" else given.get("mask"),
            sinks=given.get("sinks"),
        )

    def reference(self, *arrays: mx.array) -> mx.array:
        """The same by repeating K/V and adding masks: nothing shared with what is tested."""
        given = dict(zip(self.names, arrays))
        group = self.heads // self.kv_heads
        q, k, v = (given[n].astype(mx.float32) for n in "qkv")
        k, v = (mx.repeat(x, group, axis=1) for x in (k, v))
        scores = (q * 0.4) @ k.swapaxes(-1, -2)
        if self.mask == "causal":
            rows = mx.arange(self.q_length)[:, None] + self.k_length - self.q_length
            late = (mx.arange(self.k_length)[None] > rows).astype(mx.float32)
            scores = scores * (1 - late) - 1e9 * late
        elif self.mask == "bool":
            late = mx.logical_not(mx.stop_gradient(given["mask"])).astype(mx.float32)
            scores = scores * (1 - late) - 1e9 * late
        elif self.mask == "additive":
            scores = scores + given["mask"].astype(mx.float32)
        weights = mx.exp(scores - mx.stop_gradient(scores.max(-1, keepdims=True)))
        total = weights.sum(-1, keepdims=True)
        if self.sinks:
            sink = given["sinks"].astype(mx.float32).reshape(self.heads, 1, 1)
            total = total + mx.exp(sink - mx.stop_gradient(scores.max(-1, keepdims=True)))
        return (weights / total) @ v

    def floating(self) -> list[int]:
        """The numbers of the arguments that have a gradient."""
        bool_mask = self.mask == "bool"
        return [i for i, n in enumerate(self.names) if not (bool_mask and n == "mask")]


CASES = [
    Case("mha", heads=4, kv_heads=4),
    Case("gqa", value_dim=12),
    Case("gqa-causal", mask="causal"),
    Case("mqa-causal-short-q", kv_heads=1, q_length=3, k_length=6, mask="causal"),
    Case("gqa-decode", q_length=1, k_length=7),
    Case("gqa-decode-causal-b1", batch=1, q_length=1, k_length=7, mask="causal"),
    Case("gqa-long-q-causal", q_length=6, k_length=4, mask="causal"),
    Case("gqa-bool-rank2", mask="bool", mask_shape=(5, 5)),
    Case("gqa-bool-rank1", batch=1, mask="bool", mask_shape=(5,)),
    Case("gqa-additive-full", mask="additive", mask_shape=(2, 4, 5, 5)),
    Case("gqa-additive-heads", mask="additive", mask_shape=(4, 1, 5)),
    Case("gqa-additive-one-key", mask="additive", mask_shape=(2, 1, 5, 1)),
    Case("gqa-decode-mask", q_length=1, k_length=6, mask="bool", mask_shape=(2, 1, 1, 6)),
    Case("gqa-sinks", sinks=True),
    Case("gqa-sinks-causal-b1", batch=1, sinks=True, mask="causal"),
    Case("mqa-sinks-mask", kv_heads=1, sinks=True, mask="additive", mask_shape=(1, 4, 5, 5)),
]


def subsets(n: int) -> Iterator[tuple[bool, ...]]:
    """Every non-empty subset of n arguments."""
    return (s for s in itertools.product([False, True], repeat=n) if any(s))


def arguments(
    case: Case, mapped: Sequence[bool], axis: int, dtype: mx.Dtype = mx.float32
) -> tuple[list[mx.array], list[int | None]]:
    """Random arguments; each mapped one has its samples on `axis`, or as far as it has one."""
    arrays, axes = [], []
    for name, is_mapped in zip(case.names, mapped):
        x = case.array(name, (SAMPLES,) if is_mapped else (), dtype)
        place = min(axis, x.ndim - 1) if axis >= 0 else axis
        arrays.append(mx.contiguous(mx.moveaxis(x, 0, place)) if is_mapped else x)
        axes.append(place if is_mapped else None)
    return arrays, axes


def loop(fun: Callable, arrays: Sequence[mx.array], axes: Sequence[int | None]) -> list[mx.array]:
    """`stack([fun(sample) for sample in samples])`, for a function of arrays to a list of them."""
    size = next(x.shape[a] for x, a in zip(arrays, axes) if a is not None)
    samples = [
        [x if a is None else mx.take(x, i, axis=a) for x, a in zip(arrays, axes)]
        for i in range(size)
    ]
    results = [fun(*sample) for sample in samples]
    return [mx.stack(list(outs)) for outs in zip(*results)]


def assert_close(got: Sequence[mx.array], want: Sequence[mx.array], dtype: mx.Dtype) -> None:
    tolerance = {mx.float32: 2e-5, mx.float16: 2e-2, mx.bfloat16: 1e-1}[dtype]
    assert len(got) == len(want)
    # A gradient that cancels to zero is only as exact as the others are large.
    scale = max([1.0, *(float(mx.abs(w.astype(mx.float32)).max()) for w in want if w.size)])
    for i, (g, w) in enumerate(zip(got, want)):
        assert g.shape == w.shape, f"output {i}: shape {g.shape}, expected {w.shape}"
        g, w = g.astype(mx.float32), w.astype(mx.float32)
        assert bool(mx.isfinite(w).all())
        error = float(mx.abs(g - w).max()) if w.size else 0.0
        limit = tolerance * scale
        assert error <= limit, f"output {i}: error {error:.3g} exceeds {limit:.3g}"
