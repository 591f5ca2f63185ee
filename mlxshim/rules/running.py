"""Running sums in log space: `mx.logcumsumexp`.

MLX's pullback takes the logarithm of the cotangent's two signs apart, so that its own derivatives
are of logarithms of zero: the third derivative is not a number; and there is no jvp. Both are

    W(a, b, v) = exp(b) C (v exp(a))     C: the sum of what comes up to each place

with numbers that neither overflow nor cancel. It is linear in v, and its derivatives are W again:

    y = log C exp(x)    dy  = W(x, -y, dx)                        x~ = W'(-y, x, y~)
    w = W(a, b, v)      dw  = db w + W(a, b, dv + v da)           v~ = W'(b, a, w~)
                        a~  = v v~        b~ = w~ w               W': from the other end

Source: mlx/primitives.cpp, `Scan::vjp`.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from ..core import levels
from ..core.interception import intercept, original
from ..core.opaque import in_front
from ..core.primitive import Arrays, Axes, Primitive, full
from ._devices import within


def _scan(x: mx.array, axis: int, reverse: bool, inclusive: bool) -> mx.array:
    x = mx.stop_gradient(x)
    return original(mx, "logcumsumexp")(x, axis, reverse=reverse, inclusive=inclusive)


def _logs(x: mx.array, **form: Any) -> list[mx.array]:
    return [_scan(x, **form)]


def _weighed(a: mx.array, b: mx.array, v: mx.array, **form: Any) -> list[mx.array]:
    a, b, v = (mx.stop_gradient(x) for x in (a, b, v))
    nothing = mx.array(float("-inf"), v.dtype)
    sizes = mx.log(mx.abs(v))
    parts = [mx.where(sign * v > 0, sizes, nothing) for sign in (1, -1)]
    above, below = (mx.exp(_scan(part + a, **form) + b) for part in parts)
    return [above - below]


def _batch(size: int, arrays: Arrays, axes: Axes, bind: Any, axis: int, **form: Any) -> Any:
    return [bind(*in_front(size, arrays, axes), axis=axis + 1, **form)], [0]


def _behind(y: mx.array) -> mx.array:
    """-y, but for the logarithm of nothing, of which there is a finite number of times nothing."""
    return -mx.maximum(y, mx.array(mx.finfo(y.dtype).min, y.dtype))


def _back(form: dict[str, Any]) -> dict[str, Any]:
    return {**form, "reverse": not form["reverse"]}


def _bound(primitive: Primitive) -> Any:
    def bind(*arrays: mx.array, **form: Any) -> mx.array:
        run = primitive if "vmap" in levels.active() else primitive.differentiable
        return run(*arrays, **form)[0]

    return bind


def _sum_vjp(primals: Arrays, cotangents: Arrays, outputs: Arrays, **form: Any) -> list[mx.array]:
    a, b, v = primals
    pulled = weighed(b, a, cotangents[0], **_back(form))
    return [v * pulled, cotangents[0] * weighed(a, b, v, **form), pulled]


def _sum_jvp(primals: Arrays, tangents: Any, **form: Any) -> list[mx.array]:
    a, b, v = primals
    da, db, dv = full(primals, tangents)
    return [db * weighed(a, b, v, **form) + weighed(a, b, dv + v * da, **form)]


def _log_vjp(primals: Arrays, cotangents: Arrays, outputs: Arrays, **form: Any) -> list[mx.array]:
    (x,) = primals
    return [weighed(_behind(logs(x, **form)), x, cotangents[0], **_back(form))]


def _log_jvp(primals: Arrays, tangents: Any, **form: Any) -> list[mx.array]:
    (x,) = primals
    return [weighed(x, _behind(logs(x, **form)), tangents[0], **form)]


weighed: Any = _bound(
    Primitive(
        "running sum",
        decomposition=_weighed,
        lowering=_weighed,
        batch=lambda size, arrays, axes, **form: _batch(size, arrays, axes, weighed, **form),
        vjp=_sum_vjp,
        jvp=_sum_jvp,
    )
)
logs: Any = _bound(
    Primitive(
        "logcumsumexp",
        decomposition=_logs,
        lowering=_logs,
        batch=lambda size, arrays, axes, **form: _batch(size, arrays, axes, logs, **form),
        vjp=_log_vjp,
        jvp=_log_jvp,
    )
)


def _register(owner: Any) -> None:
    @intercept(owner, "logcumsumexp")
    def logcumsumexp(
        a: mx.array,
        axis: int | None = None,
        *,
        reverse: bool = False,
        inclusive: bool = True,
        stream: Any = None,
    ) -> mx.array:
        form: dict[str, Any] = {"reverse": reverse, "inclusive": inclusive}
        if levels.differentiates():
            if mx.issubdtype(a.dtype, mx.complexfloating):
                raise NotImplementedError(
                    "[logcumsumexp] of complex numbers has no right derivative in MLX: take "
                    "mx.logsumexp of slices instead."
                )
            if axis is None:
                a, axis = mx.reshape(a, (-1,), stream=stream), 0
            if mx.issubdtype(a.dtype, mx.floating) and -a.ndim <= axis < a.ndim:
                with within(stream):
                    return logs(a, axis=axis % a.ndim, **form)
        return original(owner, "logcumsumexp")(a, axis, stream=stream, **form)


_register(mx)
_register(mx.array)
