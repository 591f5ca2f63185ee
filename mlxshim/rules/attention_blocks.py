"""Attention and its backward pass in blocks: exact, in memory linear in the length.

The scores are cut into blocks of `r` query rows and `c` keys, of as many heads as fit, and no more
than one block of them is there at a time. Forward, a block of rows keeps the greatest score so far,
t, the sum of exp(s - t), z, and the weighed sum of values, and rescales both when t grows:

    s = scale * q k^T + mask    t' = max(t, max s)    e = exp(s - t')
    z' = z exp(t - t') + sum e  o' = o exp(t - t') + e v               O = o / z

Backward, from the t and z of each row, with d = rowsum(dO * O), for each block

    e = exp(s - t)    dS = e * ((dO / z) v^T - d / z)
    dv += e^T (dO / z)     dq += scale * dS k     dk += scale * dS^T q

A sink is where t and z begin: t = sink, z = 1. Blocks that a causal mask hides whole are left out.
Where a block has all the keys of its rows, and there is no sink, e / z is MLX's softmax, forward
and backward: one kernel that reads the scores once. Sums are of float32 (float64 for float64
arguments).

The graph is lazy: blocks that do not depend on each other would all be begun before one of them is
done with. So the query rows of a block wait for what the block before it returns.

Source: Rabe and Staats, "Self-attention Does Not Need O(n^2) Memory", 2021; Milakov and
Gimelshein, "Online normalizer calculation for softmax", 2018; Dao, "FlashAttention-2", 2023, which
keeps log z + t in place of the two: in float32 that loses z where every key is masked.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import mlx.core as mx

from ..core.opaque import after
from . import _devices
from .attention_plain import FLOOR

#: Query rows of a block, its keys, and its bytes in all heads together: on a CPU those that its
#: cache holds, on a GPU enough work for a kernel.
ROWS, KEYS, BYTES = 256, 512, 4 << 20
ROWS_GPU, KEYS_GPU, BYTES_GPU = 512, 2048, 512 << 20

Part = tuple[slice, slice]  # sequences, K/V heads
Span = tuple[int, int]


class Tiles(NamedTuple):
    """The sizes of a block: sequences, K/V heads, query rows, keys."""

    batch: int
    heads: int
    rows: int
    keys: int


def dtype_of_sums(q: mx.array) -> mx.Dtype:
    return mx.float64 if q.dtype == mx.float64 else mx.float32


def tiles(q: mx.array, k: mx.array) -> Tiles:
    batch, heads, length, _ = q.shape
    kv_heads, keys = k.shape[1:3]
    group = heads // kv_heads
    gpu = _devices.gpu()
    r, c, size = (ROWS_GPU, KEYS_GPU, BYTES_GPU) if gpu else (ROWS, KEYS, BYTES)
    rows, columns = min(length, r), min(keys, c)
    room = max(1, size // 4 // max(1, rows * group * columns))  # for so many K/V heads
    if room < kv_heads:
        return Tiles(1, room, rows, columns)
    return Tiles(min(batch, room // kv_heads), kv_heads, rows, columns)


class _Call:
    """The arguments, cut: queries as (B, Hkv, G, L, D), a mask with as many dimensions."""

    def __init__(
        self, arrays: Sequence[mx.array], *, scale: float, causal: bool, has_mask: bool
    ) -> None:
        q, k, v, *rest = arrays
        self.dtype_of_q = q.dtype
        self.dtype = dtype_of_sums(q)
        self.tiles = tiles(q, k)
        self.scale, self.causal = scale, causal
        self.kv_heads = k.shape[1]
        self.group = q.shape[1] // self.kv_heads
        self.shape = (*q.shape[:3], k.shape[2])
        self.offset = k.shape[2] - q.shape[2]
        self.q = self.grouped(q)
        self.k, self.v = k.astype(self.dtype), v.astype(self.dtype)
        self.mask = self._full_mask(rest[0]) if has_mask else None
        sinks = rest[has_mask] if len(rest) > has_mask else None
        self.sinks = None if sinks is None else mx.reshape(sinks, (1, self.kv_heads, -1, 1, 1))
        self.floor = FLOOR[self.dtype]
        #: Whether a row may see nothing: then its weights are uniform, and constant.
        self.blind = (causal and self.offset < 0) or (has_mask and rest[0].dtype == mx.bool_)
        self._pasts: dict[tuple[int, int, int], mx.array] = {}

    def grouped(self, x: mx.array) -> mx.array:
        """(B, H, L, D) -> (B, Hkv, G, L, D)"""
        return mx.unflatten(x, 1, (self.kv_heads, self.group))

    def _full_mask(self, mask: mx.array) -> mx.array:
        mask = mx.reshape(mask, (1,) * (4 - mask.ndim) + mask.shape)
        heads = mask.shape[1]
        return mx.unflatten(mask, 1, (1, 1) if heads == 1 else (self.kv_heads, self.group))

    def parts(self) -> Iterator[Part]:
        """Sequences and K/V heads."""
        for b in range(0, self.shape[0], self.tiles.batch):
            for h in range(0, self.kv_heads, self.tiles.heads):
                yield slice(b, b + self.tiles.batch), slice(h, h + self.tiles.heads)

    def rows(self) -> Iterator[Span]:
        for i in range(0, self.shape[2], self.tiles.rows):
            yield i, min(i + self.tiles.rows, self.shape[2])

    def keys(self, rows: Span) -> Iterator[Span]:
        """The blocks of keys that any of the rows sees; all of them if a row sees none."""
        end = self._end_of_keys(rows)
        for j in range(0, end, self.tiles.keys):
            yield j, min(j + self.tiles.keys, end)

    def whole(self, rows: Span) -> bool:
        """Whether one block has all the keys of these rows."""
        return self.sinks is None and 0 < self._end_of_keys(rows) <= self.tiles.keys

    def _end_of_keys(self, rows: Span) -> int:
        if self.causal and rows[0] + self.offset >= 0:
            return rows[1] + self.offset
        return self.shape[3]

    def stacked(self, x: mx.array, part: Part, rows: Span) -> mx.array:
        """The rows of one block, those of all the queries of a group: (b, h, G * r, D)."""
        x = x[part[0], part[1], :, slice(*rows)]
        return mx.flatten(x, 2, 3).astype(self.dtype)

    def queries(self, part: Part, rows: Span) -> mx.array:
        return self.stacked(self.q, part, rows) * mx.array(self.scale, self.dtype)

    def of_keys(self, x: mx.array, part: Part, keys: Span) -> mx.array:
        return x[part[0], part[1], slice(*keys)]

    def sink_of_rows(self, part: Part, rows: Span) -> mx.array:
        """(1, h, G * r, 1)"""
        assert self.sinks is not None
        sinks = self.sinks[:, part[1]].astype(self.dtype)
        sinks = mx.broadcast_to(sinks, (*sinks.shape[:3], rows[1] - rows[0], 1))
        return mx.flatten(sinks, 2, 3)

    def scores(
        self,
        q: mx.array,
        part: Part,
        rows: Span,
        keys: Span,
    ) -> mx.array:
        """(b, h, G * r, c), masked."""
        s = q @ mx.swapaxes(self.of_keys(self.k, part, keys), -1, -2)
        hidden = self.causal and keys[1] - 1 > rows[0] + self.offset
        if not hidden and self.mask is None:
            return s
        shape = s.shape
        s = mx.unflatten(s, 2, (self.group, -1))
        if self.mask is not None:
            mask = self._mask(part, rows, keys)
            if mask.dtype == mx.bool_:
                s = mx.where(mask, s, mx.array(self.floor, self.dtype))
            else:
                s = s + mask.astype(self.dtype)
        if hidden:
            s = mx.where(self._past(rows, keys), s, mx.array(self.floor, self.dtype))
        return mx.reshape(s, shape)

    def _mask(self, part: Part, rows: Span, keys: Span) -> mx.array:
        assert self.mask is not None
        b, h, _, m, n = self.mask.shape
        whole = slice(None)
        return self.mask[
            part[0] if b > 1 else whole,
            part[1] if h > 1 else whole,
            :,
            slice(*rows) if m > 1 else whole,
            slice(*keys) if n > 1 else whole,
        ]

    def _past(self, rows: Span, keys: Span) -> mx.array:
        """Which keys each row sees; the same for all blocks that lie alike to the diagonal."""
        first, r, c = rows[0] + self.offset - keys[0], rows[1] - rows[0], keys[1] - keys[0]
        if (first, r, c) not in self._pasts:
            last = mx.expand_dims(mx.arange(first, first + r), 1)
            self._pasts[first, r, c] = last >= mx.arange(c)
        return self._pasts[first, r, c]

    def together(self, pieces: list[mx.array]) -> mx.array:
        """What the blocks of rows gave, (b, h, G * r, D) each: as (B, H, L, D)."""
        count = len(list(self.rows()))
        pieces = [mx.unflatten(x, 2, (self.group, -1)) for x in pieces]
        parts = [_join(pieces[i : i + count], 3) for i in range(0, len(pieces), count)]
        return mx.flatten(self.of_parts(parts), 1, 2)

    def of_parts(self, parts: list[mx.array]) -> mx.array:
        count = -(-self.kv_heads // self.tiles.heads)
        return _join([_join(parts[i : i + count], 1) for i in range(0, len(parts), count)], 0)


def _join(blocks: list[mx.array], axis: int) -> mx.array:
    return blocks[0] if len(blocks) == 1 else mx.concatenate(blocks, axis=axis)


# The passes ------------------------------------------------------------------------------------


def forward(*arrays: mx.array, **static: Any) -> list[mx.array]:
    """Attention, and t and z of each row, (B, H, Lq, 1)."""
    call = _Call(arrays, **static)
    outs, tops, totals = [], [], []
    for part in call.parts():
        for rows in call.rows():
            q = call.queries(part, rows)
            if call.whole(rows):
                out, top, total = _whole(call, q, part, rows, outs[-1:])
                outs.append(out.astype(call.dtype_of_q))
                tops.append(top)
                totals.append(total)
                continue
            top = total = out = None
            if call.sinks is not None:
                top = call.sink_of_rows(part, rows)
                total = mx.ones_like(top)
            done = outs[-1:]
            for keys in call.keys(rows):
                (q_,) = after([q], done)
                s = call.scores(q_, part, rows, keys)
                # The floor, so that in a block of nothing but -inf all weights are zero.
                best = mx.maximum(mx.max(s, axis=-1, keepdims=True), call.floor)
                best = best if top is None else mx.maximum(top, best)
                e = mx.exp(s - best)
                z, o = mx.sum(e, axis=-1, keepdims=True), e @ call.of_keys(call.v, part, keys)
                if top is not None and total is not None:
                    shrunk = mx.exp(top - best)
                    z = z + total * shrunk
                    o = o if out is None else o + out * shrunk
                top, total, out = best, z, o
                done = [top, total, out]
            assert out is not None and top is not None and total is not None
            outs.append((out / total).astype(call.dtype_of_q))
            tops.append(mx.broadcast_to(top, total.shape))
            totals.append(total)
    return [call.together(x) for x in (outs, tops, totals)]


def _whole(
    call: _Call, q: mx.array, part: Part, rows: Span, done: list[mx.array]
) -> tuple[mx.array, mx.array, mx.array]:
    """The attention of rows to all of their keys, t and z."""
    (keys,) = call.keys(rows)
    (q,) = after([q], done)
    s = call.scores(q, part, rows, keys)
    out = mx.softmax(s, axis=-1) @ call.of_keys(call.v, part, keys)
    top = mx.logsumexp(s, axis=-1, keepdims=True)  # log z is in it, unless the floor swallows that
    total = mx.ones_like(top)
    if call.blind:
        total = mx.where(top > call.floor, total, mx.array(s.shape[-1], total.dtype))
    return out, top, total


def backward(*arrays: mx.array, **static: Any) -> list[mx.array]:
    """The gradients of q, k and v; the last arrays are what `forward` gave, and a cotangent."""
    call = _Backward(arrays, **static)
    dqs, dks, dvs = [], [], []
    done: list[mx.array] = []
    for part in call.parts():
        dk: dict[int, mx.array] = {}
        dv: dict[int, mx.array] = {}
        for rows in call.rows():
            of_rows = call.of_rows(part, rows)
            dq: mx.array | None = None
            for keys in call.keys(rows):
                q, c, e, ds = call.d_scores(of_rows, done, part, rows, keys)
                dv[keys[0]] = _grown(dv.get(keys[0]), mx.swapaxes(e, -1, -2) @ c)
                dk[keys[0]] = _grown(dk.get(keys[0]), mx.swapaxes(ds, -1, -2) @ q)
                term = ds @ call.of_keys(call.k, part, keys)
                dq = term if dq is None else dq + term
                done = [dq, dk[keys[0]], dv[keys[0]]]
            assert dq is not None
            dqs.append((dq * call.scale).astype(arrays[0].dtype))
        dks.append(_join(list(dk.values()), 2).astype(arrays[1].dtype))
        dvs.append(_join(list(dv.values()), 2).astype(arrays[2].dtype))
    return [call.together(dqs), call.of_parts(dks), call.of_parts(dvs)]


def mask_gradient(*arrays: mx.array, **static: Any) -> list[mx.array]:
    """The gradient of an additive mask: the arguments are those of `backward`.

    A pass of its own, so that those who do not ask do not pay: a block's part in it would keep
    the block until somebody does.
    """
    call = _Backward(arrays, **static)
    assert call.mask is not None
    shape, of_mask = call.mask.shape, arrays[3]
    summed = [i for i, n in enumerate(shape) if n == 1]
    found: dict[tuple[int, ...], mx.array] = {}
    done: list[mx.array] = []
    for part in call.parts():
        for rows in call.rows():
            of_rows = call.of_rows(part, rows)
            for keys in call.keys(rows):
                ds = call.d_scores(of_rows, done, part, rows, keys)[3]
                ds = mx.sum(mx.unflatten(ds, 2, (call.group, -1)), axis=summed, keepdims=True)
                at = (part[0].start, part[1].start, 0, rows[0], keys[0])
                at = tuple(0 if n == 1 else i for i, n in zip(at, shape))
                found[at] = _grown(found.get(at), ds)
                done = [found[at]]
    for axis in reversed(range(5)):  # the last axis of the place is what varies fastest
        lines: dict[tuple[int, ...], list[mx.array]] = {}
        for at in sorted(found):
            lines.setdefault((*at[:axis], 0, *at[axis + 1 :]), []).append(found[at])
        found = {at: _join(line, axis) for at, line in lines.items()}
    (whole,) = found.values()
    return [mx.reshape(whole, of_mask.shape).astype(of_mask.dtype)]


def sinks_gradient(*arrays: mx.array, **static: Any) -> list[mx.array]:
    """The gradient of the sinks, each of which has a weight in every row, and no value."""
    *_, sinks, out, top, total, cotangent = arrays
    dtype = total.dtype
    d = mx.sum(cotangent.astype(dtype) * out.astype(dtype), axis=-1, keepdims=True)
    weight = mx.exp(mx.reshape(sinks.astype(dtype), (-1, 1, 1)) - top) / total
    return [-mx.sum(weight * d, axis=(0, 2, 3)).astype(sinks.dtype)]


class _Backward(_Call):
    """The same with what `forward` gave and a cotangent of its output, the last four arrays."""

    def __init__(self, arrays: Sequence[mx.array], **static: Any) -> None:
        *primals, out, top, total, cotangent = arrays
        super().__init__(primals, **static)
        self.out, self.top, self.total = (self.grouped(x) for x in (out, top, total))
        self.cotangent = self.grouped(cotangent)

    def of_rows(self, part: Part, rows: Span) -> tuple[mx.array, ...]:
        """Of a block of rows: q, dO / z (for dv, and for dS), d / z, t; z is 1 if it is whole."""
        q, t = self.queries(part, rows), self.stacked(self.top, part, rows)
        c = self.stacked(self.cotangent, part, rows)
        if not self.whole(rows):
            c = c / self.stacked(self.total, part, rows)
        # Where nothing is seen the weights are uniform, and no score had a part in that.
        seen = c * (t > self.floor).astype(c.dtype) if self.blind else c
        d = mx.sum(seen * self.stacked(self.out, part, rows), axis=-1, keepdims=True)
        return q, c, seen, d, t

    def d_scores(
        self,
        of_rows: tuple[mx.array, ...],
        done: list[mx.array],
        part: Part,
        rows: Span,
        keys: Span,
    ) -> tuple[mx.array, mx.array, mx.array, mx.array]:
        """q and dO / z, which waited for `done`; e and dS of a block."""
        *waiting, d, t = of_rows
        q, c, seen = after(list(waiting), done)
        s = self.scores(q, part, rows, keys)
        e = mx.softmax(s, axis=-1) if self.whole(rows) else mx.exp(s - t)
        return q, c, e, e * (seen @ mx.swapaxes(self.of_keys(self.v, part, keys), -1, -2) - d)


def _grown(sum_: mx.array | None, term: mx.array) -> mx.array:
    """`sum_ + term`; under a causal mask some rows see fewer of the keys of a block."""
    if sum_ is None:
        return term
    length = max(sum_.shape[-2], term.shape[-2])
    return _filled(sum_, length) + _filled(term, length)


def _filled(x: mx.array, length: int) -> mx.array:
    shape = (*x.shape[:-2], length - x.shape[-2], x.shape[-1])
    # 0.31.1 has no batching rule for mx.pad.
    return mx.concatenate([x, mx.zeros(shape, x.dtype)], axis=-2) if shape[-2] else x
