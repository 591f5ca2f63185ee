"""The doctor's cases beside attention: operations of every family, each under one transform."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

SAMPLES = 3


def loop(fun: Callable[..., Any], axes: Sequence[int | None]) -> Callable[..., list[mx.array]]:
    """What `vmap(fun, axes)` means; the first argument is mapped, all of them over axis 0."""

    def looped(*arrays: mx.array) -> list[mx.array]:
        results = [
            fun(*(x if a is None else x[i] for x, a in zip(arrays, axes)))
            for i in range(arrays[0].shape[0])
        ]
        return [mx.stack(list(outs)) for outs in zip(*results)]

    return looped


def weighed(out: mx.array) -> mx.array:
    """A sum of `out` whose gradient is another number for every entry."""
    out = out.astype(mx.float32)
    return (out * mx.cos(mx.arange(out.size).reshape(out.shape))).sum()


@dataclass(frozen=True)
class Operation:
    """`fun` of one sample under `transform`: "vmap", "vmap(grad)", …; `shapes` are one sample's.

    The last `shared` arguments are unmapped. `grad` is with respect to all arguments. Of what is
    `distinct` it is asked that no two samples be the same.
    """

    operation: str
    fun: Callable[..., mx.array]
    shapes: tuple[tuple[int, ...], ...]
    transform: str = "vmap"
    shared: int = 0
    distinct: bool = False
    dtype: str = "float32"

    @property
    def name(self) -> str:
        return f"{self.transform} {self.operation}"

    def parts(self, lib: Any) -> tuple[Callable[..., Any], Callable[..., Any], list[mx.array]]:
        """(the function under the transform, what it means, its arguments)."""
        mx.random.seed(0)
        mapped = len(self.shapes) - self.shared
        arrays = [
            mx.random.normal((SAMPLES, *shape) if n < mapped else shape)
            for n, shape in enumerate(self.shapes)
        ]
        axes = tuple(0 if n < mapped else None for n in range(len(arrays)))
        # MLX takes a tuple of axes only for several arguments.
        spec: Any = axes if len(axes) > 1 else 0
        mapped_fun = lib.vmap(self._of_one_sample(lib), in_axes=spec)
        if self.distinct:
            arrays = [mx.zeros(x.shape) for x in arrays]

            def same(*xs: mx.array) -> list[mx.array]:
                rows = mapped_fun(*xs)[0]
                pairs = mx.all(rows[:, None] == rows[None], axis=-1)
                return [pairs.sum().astype(mx.float32) - SAMPLES]

            return same, lambda *xs: [mx.zeros(())], arrays
        return mapped_fun, loop(self._of_one_sample(mx), axes), arrays

    def _of_one_sample(self, lib: Any) -> Callable[..., list[mx.array]]:
        if "grad" not in self.transform:
            return lambda *xs: [self.fun(*xs)]

        def loss(*xs: mx.array) -> mx.array:
            return weighed(self.fun(*xs))

        gradient = lib.grad(loss, argnums=list(range(len(self.shapes))))
        return lambda *xs: list(gradient(*xs))


def _update(y: mx.array, u: mx.array) -> mx.array:
    y = y + 0
    y[1:] = u
    return y


def _random(x: mx.array) -> mx.array:
    return mx.random.uniform(shape=(64,)) + x


def _matrix(*shape: int) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(7))


def _quantized(x: mx.array) -> mx.array:
    return mx.quantized_matmul(x, *mx.quantize(_matrix(16, 64)))


def _experts(x: mx.array, experts: mx.array) -> mx.array:
    return mx.gather_mm(x, experts, rhs_indices=mx.array([1, 0, 1, 3]))


def _depthwise(x: mx.array, w: mx.array) -> mx.array:
    return mx.conv1d(x, w, padding=1, groups=4)


def _convolution(x: mx.array, w: mx.array) -> mx.array:
    return mx.conv2d(x, w, padding=1)


def _checkpoint(x: mx.array) -> mx.array:
    return mx.checkpoint(lambda x: mx.tanh(x) * x)(x)  # pyright: ignore


def _solve(a: mx.array, b: mx.array) -> mx.array:
    return mx.linalg.solve(a, b, stream=mx.cpu)


def _embedding(table: mx.array) -> mx.array:
    return table[mx.array([3, 1, 3])]


def _norm(x: mx.array, w: mx.array) -> mx.array:
    return mx.fast.rms_norm(x, w, 1e-5)


def _rope(x: mx.array) -> mx.array:
    return mx.fast.rope(x, 8, traditional=False, base=1e4, scale=1.0, offset=3)


def operations() -> list[Operation]:
    return [
        Operation("y[1:] = u", _update, ((4, 5), (3, 5)), shared=1),
        Operation("y[1:] = u", _update, ((4, 5), (3, 5)), "vmap(grad)", shared=1),
        Operation("random.uniform", _random, ((),), distinct=True),
        Operation("quantized_matmul", _quantized, ((3, 64),)),
        Operation("quantized_matmul", _quantized, ((3, 64),), "vmap(grad)"),
        Operation("gather_mm, experts shared", _experts, ((4, 1, 8), (4, 8, 6)), shared=1),
        Operation("conv1d, depthwise, w mapped", _depthwise, ((1, 9, 4), (4, 3, 1))),
        Operation("conv2d", _convolution, ((1, 6, 6, 2), (3, 3, 3, 2)), "vmap(grad)", shared=1),
        Operation("checkpoint", _checkpoint, ((5,),), "vmap(grad)"),
        Operation("linalg.solve", _solve, ((4, 4), (4, 2))),
        Operation("embedding", _embedding, ((6, 4),), "vmap(grad)"),
        Operation("rms_norm", _norm, ((3, 8), (8,)), "vmap(grad)", shared=1),
        Operation("rope", _rope, ((1, 2, 5, 8),), "vmap(grad)"),
    ]
