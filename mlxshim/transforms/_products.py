"""One function of arrays under MLX's reverse and forward mode; what all derivatives stand on.

MLX's `vjp` leaves an output that is a `stop_gradient` out when it deals out cotangents, so that
the others get the wrong ones: here every output is a node of its own. What MLX returns of a
function besides the differentiated outputs has no derivative further out: here it is kept aside.

For complex arrays MLX's pullback is that of the conjugate Jacobian, J^H c, as PyTorch's is. The
transpose J^T c of JAX is the conjugate of what MLX answers to the conjugate of c.

Some operations, a scatter among them, so every gradient of an index, have no forward mode. The
transpose of the pullback stands in for it (Townsend, "A new trick for calculating Jacobian vector
products", 2017).

Source: mlx/transforms.cpp (`vjp`, `jvp`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from ..core import native, replay
from ..core.errors import ArgumentError
from ..core.fronted import fronted_gradients
from ..core.levels import at_level, standing_in
from ..core.tangents import tied
from ..core.versions import MLX, MLX_VERSION
from ._structure import Parts, output_namer

Flat = Callable[..., "list[mx.array]"]


class Traced:
    """`fun` as a function of the arrays of its `primals` that have a derivative.

    It returns the arrays that have one; the form of the output and the auxiliary data of the first
    run, which is outside of the derivative, are kept. Every run draws the same random numbers.
    """

    def __init__(
        self, fun: Callable[..., Any], primals: Parts, tag: str, has_aux: bool = False
    ) -> None:
        self.fun, self.has_aux = standing_in(fun), has_aux
        self.primals, self.tag = primals, tag
        self._start: list[mx.array] = []
        self.outputs: Any = None
        self.aux: Any = None

    @property
    def run(self) -> Flat:
        # Not kept: it would keep this, and all its arrays, until the next garbage collection.
        return replay.same_draws(self._run, self._start)

    def _run(self, *arrays: mx.array) -> list[mx.array]:
        result = self.fun(*self.primals.fill(arrays))
        aux = None
        if self.has_aux:
            result, aux = pair(result, self.tag)
        outputs = Parts(result, output_namer(self.tag))
        if self.outputs is None:
            self.outputs, self.aux = outputs, aux
        return outputs.arrays

    def value(self) -> Any:
        """What the function returns, in a run of its own."""
        arrays = self.run(*self.primals.arrays)
        return self.outputs.fill(arrays)

    def pull(self, cotangents: Sequence[mx.array]) -> list[mx.array]:
        """J^T c for each of the primal's arrays."""
        check_complex((*self.primals.arrays, *cotangents), self.tag)
        return pull(self.run, self.primals.arrays, cotangents)

    def push(self, tangents: Sequence[mx.array]) -> tuple[list[mx.array], list[mx.array]]:
        """(outputs, J t for each of them)."""
        return push(self.run, self.primals.arrays, tangents)


def pull(run: Flat, primals: Sequence[mx.array], cotangents: Sequence[mx.array]) -> list[mx.array]:
    if not primals or not cotangents:
        return [mx.zeros_like(x) for x in primals]

    def body(*arrays: mx.array) -> list[mx.array]:
        return [mx.expand_dims(y, 0) for y in run(*arrays)]

    seeds = [mx.expand_dims(conjugate(c), 0) for c in cotangents]
    pulled = native.vjp(at_level("grad", body), list(primals), seeds)[1]
    return fronted_gradients([conjugate(g) for g in pulled])


def push(
    run: Flat, primals: Sequence[mx.array], tangents: Sequence[mx.array]
) -> tuple[list[mx.array], list[mx.array]]:
    """(outputs, J t for each of them); `run` draws the same in every call."""
    if not primals:
        outputs = run()
        return outputs, [mx.zeros_like(y) for y in outputs]
    tangents = tied(tangents)
    try:
        return native.jvp(at_level("jvp", run), list(primals), list(tangents))
    except (ValueError, RuntimeError) as e:
        if not any(words in str(e) for words in _NO_FORWARD_MODE):
            raise

    # The pullback is linear in its cotangents, and the transpose of it is the tangent map.
    def pulled(*cotangents: mx.array) -> list[mx.array]:
        return pull(run, primals, cotangents)

    outputs = run(*primals)
    return outputs, pull(pulled, [mx.zeros_like(y) for y in outputs], tangents)


#: What MLX says of an operation that has a reverse mode and no forward mode.
_NO_FORWARD_MODE = (
    "jvp] Not implemented",
    "JVP not yet implemented",
    "jvp NYI",
    "JVP is not implemented",
    "JVP for product, minimum and maximum not implemented",
)


def check_complex(arrays: Sequence[mx.array], tag: str) -> None:
    """Refuse reverse mode of complex arrays where MLX's own pullbacks do not agree with each other.

    Before 0.32 that of exp or sin is J^T c, that of a product J^H c.
    """
    if MLX < (0, 32, 0) and any(x.dtype == mx.complex64 for x in arrays):
        raise NotImplementedError(
            f"[{tag}] of a complex64 argument needs MLX 0.32 (this is {MLX_VERSION}), before which "
            "its own derivatives conjugate in some operations only."
        )


def conjugate(x: mx.array) -> mx.array:
    return mx.conjugate(x) if x.dtype == mx.complex64 else x


def copies(arrays: Sequence[mx.array]) -> list[mx.array]:
    """The same arrays, out of reach of a later assignment to their entries."""
    return [x.astype(x.dtype) for x in arrays]


def pair(result: Any, tag: str) -> tuple[Any, Any]:
    if not isinstance(result, (tuple, list)) or len(result) != 2:
        what = type(result).__name__
        what = f"a {what} of {len(result)}" if isinstance(result, (tuple, list)) else what
        raise ArgumentError(
            f"[{tag}] With has_aux=True the function must return a pair (output, aux), found "
            f"{what}."
        )
    return result[0], result[1]
