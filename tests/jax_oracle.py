"""The same call in JAX and here: the same tree of the same numbers, or an error in both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import mlx.core as mx
import pytest
from libraries import compare, to_numpy

import mlxshim
from mlxshim.core.versions import MLX

jax = pytest.importorskip("jax")
jnp = pytest.importorskip("jax.numpy")


reverse_of_complex = pytest.mark.skipif(MLX < (0, 32, 0), reason="refused on MLX 0.31")


class Library(NamedTuple):
    """What a test calls: transforms, array functions, and how it makes an array."""

    transforms: Any
    np: Any
    array: Callable[[Any], Any]


OURS = Library(mlxshim, mx, mx.array)
JAX = Library(jax, jnp, jnp.asarray)


def same(program: Callable[[Library], Any], tol: float = 1e-4) -> None:
    """`program(library)` answers the same in JAX and here."""
    compare(to_numpy(program(OURS)), to_numpy(program(JAX)), tol)


def both_refuse(program: Callable[[Library], Any], *words: str) -> None:
    """`program(library)` is an error in JAX, and one here that says `words`."""
    with pytest.raises(Exception):  # noqa: B017
        to_numpy(program(JAX))
    with pytest.raises((ValueError, TypeError)) as raised:
        to_numpy(program(OURS))
    for word in words:
        assert word in str(raised.value), raised.value
