"""The same call in JAX and here: the same tree of the same numbers, or an error in both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
import pytest

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


def to_numpy(tree: Any) -> Any:
    """Arrays as NumPy's; what stands for JAX's float0 as zeros."""
    if isinstance(tree, dict):
        return {key: to_numpy(x) for key, x in tree.items()}
    if isinstance(tree, (list, tuple)):
        several = [to_numpy(x) for x in tree]
        return type(tree)(*several) if hasattr(tree, "_fields") else type(tree)(several)
    if tree is None or isinstance(tree, str):
        return tree
    x = np.array(tree, np.float32 if isinstance(tree, float) else None)
    return np.zeros(x.shape, np.int32) if x.dtype.names or x.dtype == jax.dtypes.float0 else x


def compare(got: Any, want: Any, tol: float = 1e-4, path: str = "result") -> None:
    assert type(got) is type(want), f"{path}: {type(got)}, JAX has {type(want)}"
    if isinstance(want, dict):
        assert set(got) == set(want), path
        for key in want:
            compare(got[key], want[key], tol, f"{path}[{key!r}]")
    elif isinstance(want, (list, tuple)):
        assert len(got) == len(want), path
        for i, (g, w) in enumerate(zip(got, want)):
            compare(g, w, tol, f"{path}[{i}]")
    elif want is None or isinstance(want, str):
        assert got == want, path
    else:
        assert got.shape == want.shape, f"{path}: {got.shape}, JAX has {want.shape}"
        assert got.dtype == want.dtype, f"{path}: {got.dtype}, JAX has {want.dtype}"
        np.testing.assert_allclose(got, want, rtol=tol, atol=tol, err_msg=path)


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
