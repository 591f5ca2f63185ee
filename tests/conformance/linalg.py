"""Factorisations are compared through what they are unique in: products, absolute values."""

from __future__ import annotations

import functools

import mlx.core as mx

from .case import case, normal

la, cpu = mx.linalg, mx.cpu
#: MLX factorises in float32 and float64 alone.
single = functools.partial(case, half=False)


def spd(*shape: int, n: int = 4):
    def draw() -> mx.array:
        x = mx.random.normal((*shape, n, n))
        return x @ mx.swapaxes(x, -1, -2) + mx.eye(n)

    return draw


def regular(*shape: int, n: int = 4):
    """Well-conditioned, and in need of pivoting."""
    return lambda: 0.5 * mx.random.normal((*shape, n, n)) + 2 * mx.eye(n)[::-1]


def triangular(*shape: int, n: int = 4):
    """Well-conditioned in either triangle; what lies across must not count."""
    return lambda: mx.random.normal((*shape, n, n)) + 3 * mx.eye(n)


def upper_of(x: mx.array) -> mx.array:
    return mx.triu(x)


def square(x: mx.array) -> mx.array:
    return x @ mx.swapaxes(x, -1, -2)


# Norms and products have derivatives.

case("linalg.norm", lambda x: la.norm(x), normal(3, 4))
case("linalg.norm/axis", lambda x: la.norm(x, axis=-1, keepdims=True), normal(2, 3, 4))
case("linalg.norm/axes", lambda x: la.norm(x, axis=(0, 2)), normal(2, 3, 4))
for order in (0, 1, 3, float("inf"), -float("inf")):
    case(f"linalg.norm/vector {order}", lambda x, p=order: la.norm(x, p, axis=0), normal(3, 4))
for order in (1, -1, float("inf"), -float("inf"), "fro"):
    case(f"linalg.norm/matrix {order}", lambda x, p=order: la.norm(x, p), normal(3, 4))
for order in (2, -2, "nuc"):
    single(
        f"linalg.norm/matrix {order}",
        lambda x, p=order: la.norm(x, p, axis=(0, 2), stream=cpu),
        normal(3, 2, 4),
    )
case("linalg.cross", lambda a, b: la.cross(a, b), normal(2, 3), normal(2, 3))
case("linalg.cross/axis", lambda a, b: la.cross(a, b, axis=0), normal(3, 4), normal(2, 1))

# Inverses.

single("linalg.inv", lambda a: la.inv(a, stream=cpu), regular())
single("linalg.inv/batch", lambda a: la.inv(a, stream=cpu), regular(2, n=3))
single("linalg.pinv", lambda a: la.pinv(a, stream=cpu), normal(3, 5))
single("linalg.tri_inv", lambda a: la.tri_inv(a, stream=cpu), triangular())
single("linalg.tri_inv/upper", lambda a: la.tri_inv(a, True, stream=cpu), triangular(2, n=3))
single("linalg.cholesky_inv", lambda a: la.cholesky_inv(a, stream=cpu), triangular())
single(
    "linalg.cholesky_inv/upper", lambda a: la.cholesky_inv(a, upper=True, stream=cpu), triangular()
)

# Factorisations.

single("linalg.cholesky", lambda a: la.cholesky(a, stream=cpu), spd())
single("linalg.cholesky/upper", lambda a: la.cholesky(a, upper=True, stream=cpu), spd(2, n=3))


def _qr(a: mx.array) -> list[mx.array]:
    q, r = la.qr(a, stream=cpu)
    return [mx.matmul(q, r), mx.matmul(mx.swapaxes(q, -1, -2), q), mx.abs(r), mx.tril(r, -1)]


single("linalg.qr/tall", _qr, normal(5, 3))
single("linalg.qr/wide", _qr, normal(2, 3, 5))


def _svd(a: mx.array) -> list[mx.array]:
    u, s, vt = la.svd(a, stream=cpu)
    n = s.shape[-1]
    return [s, mx.matmul(u[..., :n] * mx.expand_dims(s, -2), vt[..., :n, :]), square(u), square(vt)]


single("linalg.svd", _svd, normal(3, 4))
single("linalg.svd/batch", _svd, normal(2, 4, 3))
single("linalg.svd/values", lambda a: la.svd(a, compute_uv=False, stream=cpu)[0], normal(2, 3, 4))


def _eigh(a: mx.array, side: str = "L") -> list[mx.array]:
    w, v = la.eigh(a, side, stream=cpu)
    return [w, mx.matmul(v * mx.expand_dims(w, -2), mx.swapaxes(v, -1, -2)), square(v)]


single("linalg.eigh", _eigh, spd())
single("linalg.eigh/one side", lambda a: _eigh(a, "U"), normal(2, 3, 3))
single("linalg.eigvalsh", lambda a: la.eigvalsh(a, stream=cpu), normal(2, 3, 3))


def _eig(a: mx.array) -> list[mx.array]:
    w, v = la.eig(a, stream=cpu)
    return [mx.sort(mx.abs(w)), mx.abs(mx.matmul(a.astype(v.dtype), v) - v * mx.expand_dims(w, -2))]


single("linalg.eig", _eig, normal(3, 3))
single("linalg.eigvals", lambda a: mx.sort(mx.abs(la.eigvals(a, stream=cpu))), normal(2, 3, 3))


single("linalg.lu", lambda a: la.lu(a, stream=cpu), regular())
single("linalg.lu/tall", lambda a: la.lu(a, stream=cpu), normal(2, 5, 3))
single("linalg.lu/wide", lambda a: la.lu(a, stream=cpu), normal(3, 5))
single("linalg.lu_factor", lambda a: la.lu_factor(a, stream=cpu), regular(2, n=3))

# Systems: MLX has the derivatives in the right-hand side.

single("linalg.solve", lambda a, b: la.solve(a, b, stream=cpu), regular(), normal(4, 3))
single("linalg.solve/vector", lambda a, b: la.solve(a, b, stream=cpu), regular(), normal(4))
single(
    "linalg.solve/batch", lambda a, b: la.solve(a, b, stream=cpu), regular(2, n=3), normal(1, 3, 2)
)
case(
    "linalg.solve/one matrix",
    lambda b: la.solve(mx.array([[1.0, 2, 0], [3, 1, 1], [0, 1, 5]]), b, stream=cpu),
    normal(3, 2),
)
single(
    "linalg.solve_triangular",
    lambda a, b: la.solve_triangular(a, b, stream=cpu),
    triangular(),
    normal(4, 3),
)
single(
    "linalg.solve_triangular/upper, vector",
    lambda a, b: la.solve_triangular(a, b, upper=True, stream=cpu),
    triangular(),
    normal(4),
)
single(
    "linalg.solve_triangular/batch",
    lambda a, b: la.solve_triangular(a, b, stream=cpu),
    triangular(2, n=3),
    normal(3, 2),
)
case(
    "linalg.solve_triangular/one matrix",
    lambda b: la.solve_triangular(mx.array([[1.0, 7, 7], [3, 1, 7], [0, 1, 5]]), b, stream=cpu),
    normal(3, 2),
)

if hasattr(la, "det"):
    case("linalg.det", lambda a: la.det(a, stream=cpu), normal(3, 3))
    single("linalg.det/large", lambda a: la.det(a, stream=cpu), normal(2, 5, 5))
    case("linalg.slogdet", lambda a: la.slogdet(a, stream=cpu), normal(2, 2))
    single("linalg.slogdet/large", lambda a: la.slogdet(a, stream=cpu), normal(5, 5))
