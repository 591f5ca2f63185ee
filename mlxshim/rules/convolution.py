"""Convolution: `mx.conv1d` … `mx.conv_general`, the transposed ones, and `mx.convolve`.

    y[n, j, o] = sum over t, c of x[n, i, c] w[o, t, c],    i d' + low = j s + t d

    x: (N, *sizes, C)    w: (O, *kernel, C / groups)    y: (N, *outputs, O)

with stride s, dilation d of the kernel and d' of the input; terms whose i lies outside are zero.
Source: mlx/ops.cpp (`conv_general`, `conv_transpose_general`), mlx/primitives.cpp (`Convolution`).

The form <conv(x, w), y> is linear in each of its three arrays. The derivatives of conv are the two
other functions of two of them, and theirs again one of the three:

    input_gradient(w, y)     a convolution of y: s and d' change places, w is reversed
    weight_gradient(x, y)    y times the patches of x

N is a dimension of x and y, O of w and y, C of x and w. A mapped axis that two of the three arrays
have is folded into the dimension that these two share; one that all three have is as many
convolutions at once (Rochette, Manoel, Tramel, "Efficient per-example gradient computations in
convolutional neural networks", 2019), for which `_convolution_calls` has the means.

MLX's own rules are right where the weight is in no trace. What comes here otherwise:

* an input and a weight both mapped: with groups, wrong numbers; in three dimensions, an error;
* the gradient of the weight under vmap: an error (`AsStrided` has no vmap);
* gradients, without any vmap, where the padding is not the same on both sides or wider than the
  kernel, or where the end of a dilated input is not used, and gradients of gradients where that is
  so of the convolution that the first one is: wrong numbers or shapes;
* jvp, of which there is none.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from ..core import levels
from ..core.interception import intercept, original
from ..core.primitive import Arrays, Axes, Primitive
from ..core.tracers import is_tracer
from ..core.versions import MLX
from . import _convolution_calls as calls
from ._convolution_calls import Form
from ._folding import on_stream

Ints = Any  # an int, or one for each spatial dimension

# The calls -------------------------------------------------------------------------------------


def _plain(name: str) -> None:
    @intercept(mx, name)
    def conv(
        input: mx.array,
        weight: mx.array,
        /,
        stride: Ints = 1,
        padding: Ints = 0,
        dilation: Ints = 1,
        groups: int = 1,
        *,
        stream: Any = None,
    ) -> mx.array:
        out = original(mx, name)(input, weight, stride, padding, dilation, groups, stream=stream)
        form = (_hashed(stride), _hashed(padding), _hashed(padding), _hashed(dilation), 1, groups)
        return _served(out, input, weight, form, stream)


def _transposed(name: str) -> None:
    @intercept(mx, name)
    def conv_transpose(
        input: mx.array,
        weight: mx.array,
        /,
        stride: Ints = 1,
        padding: Ints = 0,
        dilation: Ints = 1,
        output_padding: Ints = 0,
        groups: int = 1,
        *,
        stream: Any = None,
    ) -> mx.array:
        out = original(mx, name)(
            input, weight, stride, padding, dilation, output_padding, groups, stream=stream
        )
        n = weight.ndim - 2
        paddings, dilations = _each(_hashed(padding), n), _each(_hashed(dilation), n)
        more = _each(_hashed(output_padding), n)
        low = tuple(d * (k - 1) - p for k, d, p in zip(weight.shape[1:], dilations, paddings))
        high = tuple(a + b for a, b in zip(low, more))
        form = (1, low, high, dilations, _hashed(stride), groups, True)
        return _served(out, input, weight, form, stream)


for _dimensions in (1, 2, 3):
    _plain(f"conv{_dimensions}d")
    _transposed(f"conv_transpose{_dimensions}d")


@intercept(mx, "conv_general")
def conv_general(
    input: mx.array,
    weight: mx.array,
    /,
    stride: Ints = 1,
    padding: Any = 0,
    kernel_dilation: Ints = 1,
    input_dilation: Ints = 1,
    groups: int = 1,
    flip: bool = False,
    *,
    stream: Any = None,
) -> mx.array:
    out = original(mx, "conv_general")(
        input,
        weight,
        stride,
        padding,
        kernel_dilation,
        input_dilation,
        groups,
        flip,
        stream=stream,
    )
    sides = isinstance(padding, (list, tuple)) and padding and not isinstance(padding[0], int)
    low, high = padding if sides else (padding, padding)
    static = (stride, low, high, kernel_dilation, input_dilation)
    form = (*(_hashed(value) for value in static), groups, flip)
    return _served(out, input, weight, form, stream)


@intercept(mx, "convolve")
def convolve(a: mx.array, v: mx.array, /, mode: str = "full", *, stream: Any = None) -> mx.array:
    out = original(mx, "convolve")(a, v, mode, stream=stream)
    if not is_tracer(out):
        return out
    if a.size < v.size:
        a, v = v, a
    n = v.size
    low, high = {"full": (n - 1, n - 1), "valid": (0, 0), "same": (n // 2, (n - 1) // 2)}[mode]
    out = mx.conv_general(
        mx.reshape(a, (1, -1, 1), stream=stream),
        mx.reshape(v, (1, -1, 1), stream=stream),
        padding=([low], [high]),
        flip=True,
        stream=stream,
    )
    return mx.reshape(out, (-1,), stream=stream)


def _hashed(value: Any) -> Any:
    return value if isinstance(value, int) else tuple(value)


def _each(value: Any, count: int) -> tuple[int, ...]:
    several = (value,) if isinstance(value, int) else value
    return tuple(several) * count if len(several) == 1 else several


def _served(
    out: mx.array, x: mx.array, w: mx.array, static: tuple[Any, ...], stream: Any
) -> mx.array:
    """`out`, which is MLX's own answer, wherever MLX's own rules are right."""
    stack = levels.active()
    mapped, pushed = "vmap" in stack, "jvp" in stack
    form, right, right_again = _form_of(x.shape[1:-1], w.shape[1:-1], *static)
    right = right_again if stack.count("grad") > 1 else right
    if right and not pushed and (not mapped or not is_tracer(w)):
        return out
    if not is_tracer(out):
        return out
    return on_stream(stream, _ours, x.astype(out.dtype), w.astype(out.dtype), form, static)


def _ours(x: mx.array, w: mx.array, form: Form, static: tuple[Any, ...]) -> mx.array:
    if form.sizes != x.shape[1:-1]:
        # MLX's reading of negative padding, with which it answers.
        low, high = (_each(pads, len(form.sizes)) for pads in static[1:3])
        sides = zip(x.shape[1:-1], low, high)
        x = x[(slice(None), *(slice(max(-a, 0), n + min(b, 0)) for n, a, b in sides))]
    return _bind(conv, x, w, form)


@functools.lru_cache(maxsize=512)
def _form_of(
    sizes: tuple[int, ...],
    kernel: tuple[int, ...],
    stride: Any,
    low: Any,
    high: Any,
    dilation: Any,
    input_dilation: Any,
    groups: int,
    flip: bool = False,
) -> tuple[Form, bool, bool]:
    """The form, and whether MLX's own gradients are right, and gradients of them."""
    count = len(sizes)
    low, high = _each(low, count), _each(high, count)
    form = Form(
        _each(stride, count),
        tuple(max(p, 0) for p in low),
        tuple(max(p, 0) for p in high),
        _each(dilation, count),
        _each(input_dilation, count),
        groups,
        flip,
        tuple(n + min(a, 0) + min(b, 0) for n, a, b in zip(sizes, low, high)),
        tuple(kernel),
    )
    if any(n < 1 for n in form.outputs()):
        raise ValueError(
            f"[conv] A kernel of {kernel} does not fit in an input of {sizes} with this padding."
        )
    # Before 0.32.4 not of a flipped kernel of one entry, nor by wide padding.
    again = MLX >= (0, 32, 4) and calls.right_derivatives(form)
    return form, all(calls.right_gradients(form)), again


def _bind(function: Primitive, a: mx.array, b: mx.array, form: Form) -> mx.array:
    """A node, unless nothing traces: MLX has no jvp, and not always a right vjp."""
    if "vmap" in levels.active():
        return function(a, b, form=form)[0]
    if is_tracer(a) or is_tracer(b):
        return function.differentiable(a, b, form=form)[0]
    return function.lowering(a, b, form=form)[0]


# The third function ----------------------------------------------------------------------------


def input_gradient(w: mx.array, y: mx.array, form: Form) -> mx.array:
    """The cotangent of x: y spread by the stride, convolved with w reversed."""
    backward, start, stop = _backward(form)
    if start != (0,) * len(start) or stop != form.outputs():
        if any(a >= b for a, b in zip(start, stop)):  # the kernel meets nothing but padding
            channels = w.shape[-1] * form.groups
            return mx.zeros((*y.shape[: -len(start) - 1], *form.sizes, channels), y.dtype)
        spatial = (slice(a, b) for a, b in zip(start, stop))
        y = y[(*(slice(None),) * (y.ndim - 1 - len(start)), *spatial)]
    # Out and in channels change places, in each group.
    first = w.ndim - form.ndim
    if form.groups > 1:
        w = mx.unflatten(w, first, (form.groups, -1))
        w = mx.flatten(mx.swapaxes(w, first + 1, -1), first, first + 1)
    else:
        w = mx.swapaxes(w, first, -1)
    return _bind(conv, y, w, backward)


@functools.lru_cache(maxsize=512)
def _backward(form: Form) -> tuple[Form, tuple[int, ...], tuple[int, ...]]:
    """The form of the input's gradient, of y from `start` to `stop`.

    A convolution whose padding would be negative leaves out what of y lies outside.
    """
    sizes, kernel = form.spread()
    outputs = form.outputs()
    low = [k - 1 - p for k, p in zip(kernel, form.low)]
    high = [n + p - 1 - s * (m - 1) for n, p, m, s in zip(sizes, form.low, outputs, form.stride)]
    # Entries of y are s apart: so many lie outside.
    before = [-(min(p, 0) // s) for p, s in zip(low, form.stride)]
    after = [-(min(p, 0) // s) for p, s in zip(high, form.stride)]
    start = tuple(before)
    stop = tuple(m - n for m, n in zip(outputs, after))
    backward = Form(
        stride=form.input_dilation,
        low=tuple(p + n * s for p, n, s in zip(low, before, form.stride)),
        high=tuple(p + n * s for p, n, s in zip(high, after, form.stride)),
        dilation=form.dilation,
        input_dilation=form.stride,
        groups=form.groups,
        flip=not form.flip,
        sizes=tuple(b - a for a, b in zip(start, stop)),
        kernel=form.kernel,
    )
    return backward, start, stop


# The rules -------------------------------------------------------------------------------------


def _conv_batch(
    size: int, arrays: Arrays, axes: Axes, form: Form
) -> tuple[list[mx.array], list[int]]:
    (x, w), (x_axis, w_axis) = arrays, axes
    if x_axis is not None and w_axis is not None:
        return _as_samples(conv, size, arrays, axes, form)
    if x_axis is not None:  # N
        first = x.ndim - 1 - form.ndim  # after the samples, if there are any
        x = mx.flatten(_moved(x, x_axis, first), first, first + 1)
        return [mx.unflatten(_bind(conv, x, w, form), first, (size, -1))], [first]
    y = _bind(conv, x, _into_filters(w, w_axis, form), form)  # O
    return _out_of_channels(y, size, form)


def _weight_gradient_batch(
    size: int, arrays: Arrays, axes: Axes, form: Form
) -> tuple[list[mx.array], list[int]]:
    (x, y), (x_axis, y_axis) = arrays, axes
    if x_axis is not None and y_axis is not None:
        return _as_samples(weight_gradient, size, arrays, axes, form)
    if x_axis is not None:  # C
        w = _bind(weight_gradient, _into_channels(x, x_axis, form), y, form)
        return [mx.unflatten(w, -1, (size, -1))], [w.ndim - 1]
    w = _bind(weight_gradient, x, _into_channels(y, y_axis, form), form)  # O
    first = w.ndim - form.ndim
    w = mx.unflatten(w, first, (form.groups, size, -1))
    w = mx.moveaxis(w, first + 1, 0)
    return [mx.flatten(w, first + 1, first + 2)], [0]


def _as_samples(
    function: Primitive, size: int, arrays: Arrays, axes: Axes, form: Form
) -> tuple[list[mx.array], list[int]]:
    a, b = (_moved(x, axis, 0) for x, axis in zip(arrays, axes))
    if a.ndim == form.ndim + 1:
        return [_bind(function, a, b, form)], [0]
    out = _bind(function, mx.flatten(a, 0, 1), mx.flatten(b, 0, 1), form)
    return [mx.unflatten(out, 0, (size, -1))], [0]


def _moved(x: mx.array, axis: Any, place: int) -> mx.array:
    return x if axis == place else mx.moveaxis(x, axis, place)


def _into_filters(w: mx.array, axis: Any, form: Form) -> mx.array:
    """(B, O, ...) as (G, B, O/G, ...), flat: a group's filters of every sample side by side."""
    first = w.ndim - 1 - form.ndim
    w = _moved(w, axis, first)
    if form.groups == 1:
        return mx.flatten(w, first, first + 1)
    w = mx.swapaxes(mx.unflatten(w, first + 1, (form.groups, -1)), first, first + 1)
    return mx.flatten(w, first, first + 2)


def _into_channels(x: mx.array, axis: Any, form: Form) -> mx.array:
    """(..., B, C) as (..., G, B, C/G), flat."""
    x = _moved(x, axis, x.ndim - 2)
    if form.groups == 1:
        return mx.flatten(x, -2, -1)
    return mx.flatten(mx.swapaxes(mx.unflatten(x, -1, (form.groups, -1)), -3, -2), -3, -1)


def _out_of_channels(y: mx.array, size: int, form: Form) -> tuple[list[mx.array], list[int]]:
    if form.groups == 1:
        return [mx.unflatten(y, -1, (size, -1))], [y.ndim - 1]
    y = mx.moveaxis(mx.unflatten(y, -1, (form.groups, size, -1)), -2, 0)
    return [mx.flatten(y, -2, -1)], [0]


def _conv_vjp(primals: Arrays, cotangents: Arrays, outputs: Arrays, form: Form) -> list[mx.array]:
    (x, w), (y,) = primals, cotangents
    return [input_gradient(w, y, form), _bind(weight_gradient, x, y, form)]


def _weight_gradient_vjp(
    primals: Arrays, cotangents: Arrays, outputs: Arrays, form: Form
) -> list[mx.array]:
    (x, y), (w,) = primals, cotangents
    return [input_gradient(w, y, form), _bind(conv, x, w, form)]


def _product_rule(
    function: Primitive, primals: Arrays, tangents: Sequence[mx.array | None], form: Form
) -> list[mx.array]:
    (a, b), (da, db) = primals, tangents
    terms = [] if da is None else [_bind(function, da, b, form)]
    terms += [] if db is None else [_bind(function, a, db, form)]
    return [sum(terms[1:], terms[0])]


# A node's value must not be differentiated: MLX has no jvp of it. In a trace it is mapped too and
# thrown away, so MLX's own will do if only it does not raise.


def _conv_value(x: mx.array, w: mx.array, form: Form) -> list[mx.array]:
    x, w = mx.stop_gradient(x), mx.stop_gradient(w)
    own = x.ndim == form.ndim and len(form.sizes) < 3
    return [calls.raw(x, w, form) if own else calls.patched(x, w, form)]


def _conv_lowering(x: mx.array, w: mx.array, form: Form) -> list[mx.array]:
    return [calls.convolve(mx.stop_gradient(x), mx.stop_gradient(w), form)]


def _weight_gradient_value(x: mx.array, y: mx.array, form: Form) -> list[mx.array]:
    return [calls.patched_weight_gradient(mx.stop_gradient(x), mx.stop_gradient(y), form)]


def _weight_gradient_lowering(x: mx.array, y: mx.array, form: Form) -> list[mx.array]:
    return [calls.weight_gradient(mx.stop_gradient(x), mx.stop_gradient(y), form)]


conv = Primitive(
    "conv_general",
    decomposition=_conv_value,
    lowering=_conv_lowering,
    batch=_conv_batch,
    vjp=_conv_vjp,
    jvp=lambda primals, tangents, form: _product_rule(conv, primals, tangents, form),
)
weight_gradient = Primitive(
    "conv_weight_gradient",
    decomposition=_weight_gradient_value,
    lowering=_weight_gradient_lowering,
    batch=_weight_gradient_batch,
    vjp=_weight_gradient_vjp,
    jvp=lambda primals, tangents, form: _product_rule(weight_gradient, primals, tangents, form),
)
