"""Operations that move or copy elements and compute nothing."""

from __future__ import annotations

import mlx.core as mx

from .case import case, integers, normal

X = normal(2, 3, 4)

case("reshape", lambda x: mx.reshape(x, (4, -1)), X)
case("reshape/of a transpose", lambda x: mx.reshape(mx.transpose(x), (3, 8)), X)
case("flatten", mx.flatten, X)
case("flatten/axes", lambda x: mx.flatten(x, 1, 2), X)
case("unflatten", lambda x: mx.unflatten(x, -1, (2, 2)), X)
case("transpose", mx.transpose, X)
case("transpose/axes", lambda x: mx.transpose(x, (1, 2, 0)), X)
case("permute_dims", lambda x: mx.permute_dims(x, (2, 0, 1)), X)
case("matrix_transpose", lambda x: mx.matrix_transpose(x), X)
case("swapaxes", lambda x: mx.swapaxes(x, 0, -1), X)
case("moveaxis", lambda x: mx.moveaxis(x, 0, 2), X)
case("expand_dims", lambda x: mx.expand_dims(x, (0, -1)), normal(2, 3))
case("expand_dims/leading", lambda x: mx.expand_dims(x, (0, 1)), normal(2, 3))
case("expand_dims/inner", lambda x, w: mx.expand_dims(w * x, (1, 2)), normal(2, 3), normal(3))
case("squeeze", lambda x: mx.squeeze(x, (0, 2)), normal(1, 3, 1, 2))
case("squeeze/leading", lambda x: mx.squeeze(x, (1, 0)), normal(1, 1, 3))
case("squeeze/all", mx.squeeze, normal(1, 3, 1, 2))
case("atleast_1d", mx.atleast_1d, normal())
case("atleast_2d", lambda x, y: mx.atleast_2d(x, y), normal(), normal(3))
case("atleast_3d", lambda x, y: mx.atleast_3d(x, y), normal(2), normal(2, 3))
case("contiguous", lambda x: mx.contiguous(mx.transpose(x)), X)
case("contiguous/columns", lambda x: mx.contiguous(mx.transpose(x), True), X)

case("broadcast_to", lambda x: mx.broadcast_to(x, (4, 2, 3)), normal(2, 1))
case("broadcast_to/dtypes", lambda x: mx.broadcast_to(x, (4, 3)), integers(3))
case("broadcast_arrays", lambda x, y: mx.broadcast_arrays(x, y), normal(4, 1, 3), normal(2, 1))
case("meshgrid", lambda x, y: mx.meshgrid(x, y), normal(2), normal(3))
case("meshgrid/sparse", lambda x, y: mx.meshgrid(x, y, sparse=True), normal(2), normal(3))
case("meshgrid/ij", lambda x, y: mx.meshgrid(x, y, indexing="ij"), normal(2), normal(3))

case("stack", lambda x, y: mx.stack([x, y, x]), normal(2, 3), normal(2, 3))
case("stack/axis", lambda x, y: mx.stack([x, y], axis=-1), normal(2, 3), normal(2, 3))
case("concatenate", lambda x, y: mx.concatenate([x, y], axis=1), normal(2, 3), normal(2, 1))
case("concatenate/flat", lambda x, y: mx.concatenate([x, y], axis=None), normal(2, 3), normal(2))
case("concatenate/dtypes", lambda x, y: mx.concatenate([x, y]), normal(2, 3), integers(1, 3))
case("concat", lambda x, y: mx.concat([x, y]), normal(2, 3), normal(1, 3))
case("split", lambda x: mx.split(x, 2, axis=-1), X)
case("split/places", lambda x: mx.split(x, [1, 3], axis=2), X)
case("unstack", lambda x: mx.unstack(x, axis=1), normal(2, 3))
case("flip", lambda x: mx.flip(x, axis=1), X)
case("flip/everything", lambda x: mx.flip(x), normal(2, 3))

case("diag", mx.diag, normal(3))
case("diag/of a matrix", lambda x: mx.diag(x, k=1), normal(3, 4))
case("diag/below", lambda x: mx.diag(x, k=-1), normal(3))
case("diagonal", lambda x: mx.diagonal(x, 1, 0, 2), X)
case("diagonal/below", lambda x: mx.diagonal(x, -1), normal(4, 3))
# MLX 0.31 has tangents of a selection that are none: products are the oracle.
case("tril", mx.tril, normal(2, 3, 4), reference=lambda x: x * mx.tri(3, 4).astype(x.dtype))
case(
    "tril/offset",
    lambda x: mx.tril(x, -1),
    normal(3, 4),
    reference=lambda x: x * mx.tri(3, 4, -1).astype(x.dtype),
)
case(
    "triu",
    lambda x: mx.triu(x, 1),
    normal(2, 3, 4),
    reference=lambda x: x * (1 - mx.tri(3, 4, 0)).astype(x.dtype),
)
case("unique", lambda x: mx.unique(x, size=4), integers(6, high=5))
case(
    "unique/everything",
    lambda x: mx.unique(
        x, size=5, return_index=True, return_inverse=True, return_counts=True, fill_value=-1
    ),
    integers(2, 3, high=5),
)
