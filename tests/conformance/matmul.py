from __future__ import annotations

from typing import Any

import mlx.core as mx

from mlxshim.testing import MODES

from .case import booleans, case, normal, uniform

HALF = (mx.float32, mx.float16)
#: MLX's own jvp of addmm, which would be the oracle, leaves out alpha and beta.
SCALED = tuple(m for m in MODES if "jvp" not in m)

case("matmul", lambda a, b: a @ b, normal(3, 4), normal(4, 5), dtypes=HALF)
case("matmul/batched", lambda a, b: a @ b, normal(2, 3, 4), normal(2, 4, 5))
case("matmul/broadcast", lambda a, b: a @ b, normal(2, 1, 3, 4), normal(3, 4, 5))
case("matmul/3-D and 2-D", lambda a, b: a @ b, normal(2, 3, 4), normal(4, 5))
case("matmul/vector, matrix", lambda a, b: a @ b, normal(4), normal(4, 5))
case("matmul/matrix, vector", lambda a, b: a @ b, normal(3, 4), normal(4))
case("matmul/vectors", lambda a, b: a @ b, normal(4), normal(4))


def linear(alpha: float = 1.0, beta: float = 1.0):
    return lambda c, a, b: mx.addmm(c, a, b, alpha, beta)


case("addmm", linear(), normal(5), normal(3, 4), normal(4, 5), dtypes=HALF)
case("addmm/vector", linear(), normal(5), normal(4), normal(4, 5))
case("addmm/3-D", linear(0.5, 2.0), normal(5), normal(2, 3, 4), normal(4, 5), modes=SCALED)
case("addmm/matrix", linear(0.5, -2.0), normal(3, 5), normal(3, 4), normal(4, 5), modes=SCALED)
case("addmm/column", linear(), normal(3, 1), normal(3, 4), normal(4, 5))
case("addmm/scalar", linear(), normal(), normal(3, 4), normal(4, 5))
case("addmm/batched", linear(0.5), normal(2, 1, 5), normal(2, 3, 4), normal(4, 5), modes=SCALED)
case("addmm/matrix, vector", linear(), normal(3), normal(3, 4), normal(4))
case("addmm/broadcast", linear(), normal(5), normal(2, 1, 3, 4), normal(3, 4, 5))


def blocks(out: bool, lhs: bool, rhs: bool):
    def fun(a: mx.array, b: mx.array, *masks: mx.array) -> mx.array:
        given = iter(masks)
        named = {
            name: next(given)
            for name, there in (("mask_out", out), ("mask_lhs", lhs), ("mask_rhs", rhs))
            if there
        }
        return mx.block_masked_mm(a, b, 32, **named)

    return fun


def _masked(name: str, *arguments: Any) -> None:
    # The CPU's kernel takes float32 alone; without a mask it is a matmul.
    case(
        f"block_masked_mm/{name}",
        *arguments,
        half=name == "no mask" or mx.default_device() == mx.gpu,
    )


A, B = normal(40, 33), normal(33, 35)
_masked("out", blocks(True, False, False), A, B, booleans(2, 2))
_masked("operands", blocks(False, True, True), A, B, booleans(2, 2), booleans(2, 2))
_masked("lhs", blocks(False, True, False), A, B, booleans(2, 2))
_masked("rhs", blocks(False, False, True), A, B, booleans(2, 2))
_masked("floating", blocks(False, True, True), A, B, uniform(2, 2), uniform(2, 2))
_masked("floating out", blocks(True, False, False), A, B, uniform(2, 2))
_masked(
    "batched",
    blocks(True, False, False),
    normal(2, 34, 8),
    normal(8, 33),
    booleans(2, 2, 2),
)
_masked("no mask", blocks(False, False, False), normal(3, 4), normal(4, 5))
_masked("vector", blocks(False, False, True), normal(40), normal(40, 35), booleans(2, 2))

case("hadamard_transform", lambda x: mx.hadamard_transform(x), normal(3, 8))
case("hadamard_transform/scale", lambda x: mx.hadamard_transform(x, scale=0.3), normal(3, 12))
case("einsum", lambda a, b: mx.einsum("ij,jk->ik", a, b), normal(3, 4), normal(4, 5))
case(
    "einsum/batched", lambda a, b: mx.einsum("bij,bkj->bik", a, b), normal(2, 3, 4), normal(2, 5, 4)
)
case("einsum/sum", lambda a, b: mx.einsum("ij,k->j", a, b), normal(3, 4), normal(5))
case("einsum/trace", lambda a: mx.einsum("ii->", a), normal(4, 4))
case("einsum/diagonal", lambda a, b: mx.einsum("ii,ij->ij", a, b), normal(4, 4), normal(4, 5))
case(
    "einsum/ellipsis",
    lambda a, b: mx.einsum("...ij,jk->...ik", a, b),
    normal(2, 3, 4),
    normal(4, 5),
)
case(
    "einsum/three",
    lambda a, b, c: mx.einsum("ij,jk,kl->il", a, b, c),
    normal(2, 3),
    normal(3, 4),
    normal(4, 5),
)
case("tensordot", lambda a, b: mx.tensordot(a, b), normal(2, 3, 4), normal(3, 4, 5))
case(
    "tensordot/axes",
    lambda a, b: mx.tensordot(a, b, [[0, 2], [1, 0]]),
    normal(2, 3, 4),
    normal(4, 2),
)
case("tensordot/1", lambda a, b: mx.tensordot(a, b, 1), normal(3, 4), normal(4, 5))
case("inner", lambda a, b: mx.inner(a, b), normal(4), normal(4))
case("inner/matrices", lambda a, b: mx.inner(a, b), normal(3, 4), normal(5, 4))
case("outer", lambda a, b: mx.outer(a, b), normal(3), normal(4))
case("outer/matrices", lambda a, b: mx.outer(a, b), normal(2, 3), normal(4))
case("kron", lambda a, b: mx.kron(a, b), normal(2, 3), normal(4, 5))
case("kron/vector", lambda a, b: mx.kron(a, b), normal(3), normal(2, 4))
