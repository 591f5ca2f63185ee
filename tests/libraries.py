"""JAX's names and ours in one namespace each, so that a program is written once for both libraries.

The fixture `jax` (conftest.py) is JAX's, and skips where there is none; `OURS` is always there.
"""

from __future__ import annotations

import types
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import mlxshim

OURS = types.SimpleNamespace(
    **{name: getattr(mlxshim, name) for name in mlxshim.__all__ if name != "map"},
    np=mx,
    jit=mx.compile,
    lax=mlxshim,
    i32=mx.int32,
)

_NAMES = (
    "vmap grad value_and_grad vjp jvp jacrev jacfwd hessian linearize custom_vjp custom_jvp "
    "checkpoint jit lax"
)


def jax_library() -> types.SimpleNamespace:
    jax = pytest.importorskip("jax")
    jnp = pytest.importorskip("jax.numpy")
    batching = pytest.importorskip("jax.custom_batching")
    return types.SimpleNamespace(
        **{name: getattr(jax, name) for name in _NAMES.split()},
        np=jnp,
        custom_vmap=batching.custom_vmap,
        i32=jnp.int32,
    )


def normal(lib, *shape, seed=0):
    return lib.np.array(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


# Trees of arrays of either library ---------------------------------------------------------------


def to_numpy(tree: Any) -> Any:
    """Arrays as NumPy's; what stands for JAX's float0, a dtype with a name, as zeros."""
    if isinstance(tree, dict):
        return {key: to_numpy(x) for key, x in tree.items()}
    if isinstance(tree, (list, tuple)):
        several = [to_numpy(x) for x in tree]
        return type(tree)(*several) if hasattr(tree, "_fields") else type(tree)(several)
    if tree is None or isinstance(tree, str):
        return tree
    x = np.array(tree, np.float32 if isinstance(tree, float) else None)
    return np.zeros(x.shape, np.int32) if x.dtype.names else x


def compare(got: Any, want: Any, tol: float = 1e-4, path: str = "result") -> None:
    """Trees of NumPy's arrays: the same containers, shapes, dtypes and numbers."""
    assert type(got) is type(want), f"{path}: {type(got)}, not {type(want)}"
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
        assert got.shape == want.shape, f"{path}: {got.shape}, not {want.shape}"
        assert got.dtype == want.dtype, f"{path}: {got.dtype}, not {want.dtype}"
        np.testing.assert_allclose(got, want, rtol=tol, atol=tol, err_msg=path)


def same(got: Any, want: Any, tol: float = 2e-5) -> None:
    compare(to_numpy(got), to_numpy(want), tol)
