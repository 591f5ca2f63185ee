"""The empirical neural tangent kernel: products of the Jacobians of pairs of samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn

from ..transforms import _chunks
from ..transforms.linear import vjp
from ..transforms.vmap import vmap
from . import _state

Compute = Literal["full", "trace", "diagonal"]


def empirical_ntk(
    model: nn.Module,
    x1: mx.array,
    x2: mx.array | None = None,
    *,
    fun: Callable[[Any, mx.array], mx.array] | None = None,
    compute: Compute = "full",
    chunk_size: int | None = None,
) -> mx.array:
    """K[i, j] = J(x1[i]) J(x2[j])^T, J the Jacobian with respect to the trainable parameters.

    Args:
        model: It is left as it was.
        x1: Samples on axis 0.
        x2: Likewise; `x1` again where it is not given.
        fun: `fun(model, x)` of one sample, an array of any shape; `model(x)` by default.
        compute: "full" for every pair of outputs; the "diagonal", each output with itself; the
            "trace", its sum.
        chunk_size: Jacobians of at most twice so many samples are in memory at a time.

    Returns:
        float32: (n1, n2, *out, *out), (n1, n2, *out) or (n1, n2), out being the shape of one
        sample's output.

    Raises:
        ValueError: an unknown `compute`, nothing trainable.

    Example:
        >>> import mlx.core as mx
        >>> import mlx.nn as nn
        >>> from mlxshim.nn import empirical_ntk
        >>> model = nn.Linear(2, 1, bias=False)
        >>> empirical_ntk(model, mx.array([[1.0, 2.0], [3.0, 4.0]]), compute="trace")
        array([[5, 11],
               [11, 25]], dtype=float32)

    Source: Jacot et al. 2018, "Neural tangent kernel"; Novak et al. 2022, "Fast finite width neural
    tangent kernel", whose Jacobian contraction this is.
    """
    if compute not in ("full", "trace", "diagonal"):
        raise ValueError(
            f'[empirical_ntk] compute must be "full", "trace" or "diagonal", found {compute!r}.'
        )
    jacobians = _jacobians(model, fun or (lambda m, x: m(x)))
    shape: tuple[int, ...] = ()
    rows = []
    with _chunks.OneAtATime():
        for part1 in _parts(x1, chunk_size):
            first, shape = jacobians(part1)
            row = []
            for part2 in _parts(x1 if x2 is None else x2, chunk_size):
                second = first if part2 is part1 else jacobians(part2)[0]
                row.append(_contracted(first, second, compute))
                if chunk_size is not None:
                    _chunks.compute(row[-1:])
            rows.append(mx.concatenate(row, axis=1) if len(row) > 1 else row[0])
    kernel = mx.concatenate(rows) if len(rows) > 1 else rows[0]
    out = {"full": (*shape, *shape), "diagonal": shape, "trace": ()}[compute]
    return mx.reshape(kernel, (*kernel.shape[:2], *out))


def _parts(x: mx.array, size: int | None) -> Iterator[mx.array]:
    if size is None or x.shape[0] <= size:
        yield x
        return
    for start in range(0, x.shape[0], size):
        yield x[start : start + size]


def _jacobians(
    model: nn.Module, fun: Callable[[Any, mx.array], mx.array]
) -> Callable[[mx.array], tuple[list[mx.array], tuple[int, ...]]]:
    """(samples, outputs, parameters) of each parameter, and the shape of an output."""
    places = _state.trainable(model)
    if not places.unique:
        raise ValueError("[empirical_ntk] The model has no trainable parameters.")
    values = [place.get() for place in places.unique]
    shape: tuple[int, ...] = ()

    def one(x: mx.array) -> list[mx.array]:
        nonlocal shape

        def output(parameters: list[mx.array]) -> mx.array:
            with _state.untouched(model), _state.substituted(places.unique, parameters):
                return fun(model, x)

        y, pullback = vjp(output, values, has_aux=False)
        shape = tuple(y.shape)
        basis = mx.reshape(mx.eye(y.size, dtype=y.dtype), (y.size, *y.shape))
        return vmap(lambda cotangent: pullback(cotangent)[0])(basis)

    def of(x: mx.array) -> tuple[list[mx.array], tuple[int, ...]]:
        found = vmap(one)(x)
        flat = [mx.reshape(j, (*j.shape[:2], -1)).astype(mx.float32) for j in found]
        return flat, shape

    return of


def _contracted(first: list[mx.array], second: list[mx.array], compute: Compute) -> mx.array:
    total: mx.array | None = None
    for a, b in zip(first, second):
        (n1, k, size), n2 = a.shape, b.shape[0]
        if compute == "full":
            flat = mx.reshape(a, (n1 * k, size)) @ mx.reshape(b, (n2 * k, size)).T
            part = mx.swapaxes(mx.reshape(flat, (n1, k, n2, k)), 1, 2)
        elif compute == "trace":
            part = mx.reshape(a, (n1, -1)) @ mx.reshape(b, (n2, -1)).T
        else:
            part = mx.moveaxis(mx.swapaxes(a, 0, 1) @ mx.transpose(b, (1, 2, 0)), 0, -1)
        total = part if total is None else total + part
    assert total is not None
    return total
