"""What a convolution, and the gradient of its weight, is computed by; for one sample or several.

Arrays that stand for several samples have one more dimension in front: as many convolutions of one
form, with a weight each. Grouped convolutions would serve, and do on a GPU in one and two
dimensions. MLX has none in three dimensions, and on the CPU only a plain loop over all products
(mlx/backend/cpu/conv.cpp): there, one batched product of matrices with the patches of the input.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import mlx.core as mx

from ..core import native
from ..core.interception import original
from . import _devices
from ._mlx_0_31 import matmul

Sizes = tuple[int, ...]


class Form(NamedTuple):
    """The static arguments of `mx.conv_general`, and the spatial sizes of input and kernel."""

    stride: Sizes
    low: Sizes
    high: Sizes
    dilation: Sizes
    input_dilation: Sizes
    groups: int
    flip: bool
    sizes: Sizes
    kernel: Sizes

    @property
    def ndim(self) -> int:
        """The dimensions of arrays that stand for one sample."""
        return len(self.sizes) + 2

    def spread(self) -> tuple[Sizes, Sizes]:
        """The sizes of input and kernel with the zeros of their dilation."""
        sizes = tuple(1 + d * (n - 1) for n, d in zip(self.sizes, self.input_dilation))
        return sizes, tuple(1 + d * (n - 1) for n, d in zip(self.kernel, self.dilation))

    def outputs(self) -> Sizes:
        sides = zip(*self.spread(), self.low, self.high, self.stride)
        return tuple((n + low + high - k) // s + 1 for n, k, low, high, s in sides)


Patches = Callable[[mx.array, Form], mx.array]

# MLX's own ---------------------------------------------------------------------------------------


def raw(x: mx.array, w: mx.array, form: Form) -> mx.array:
    return original(mx, "conv_general")(
        x,
        w,
        form.stride,
        (list(form.low), list(form.high)),
        form.dilation,
        form.input_dilation,
        form.groups,
        form.flip,
    )


def _raw_weight_gradient(x: mx.array, y: mx.array, form: Form) -> mx.array:
    w = mx.zeros((y.shape[-1], *form.kernel, x.shape[-1] // form.groups), x.dtype)
    return native.vjp(lambda w: raw(x, w, form), [w], [y])[1][0]


@functools.lru_cache(maxsize=512)
def right_gradients(form: Form) -> tuple[bool, bool]:
    """Whether MLX's own gradients of the input and of the weight are right.

    Of what it would have to crop it crops too much. Which side's padding it takes for the end of
    the first depends on its version.
    """
    of_inputs = [_of_input(form, padding) for padding in (form.low, form.high)]
    right = all(min(g.low + g.high) >= 0 and g.outputs() == form.sizes for g in of_inputs)
    return right, _by_patches(form) or min(_of_weight(form).high) >= 0


@functools.lru_cache(maxsize=512)
def right_derivatives(form: Form) -> bool:
    """Whether its gradients of these gradients are right, too, as they are convolutions."""
    of_input, of_weight = _of_input(form, form.low), _of_weight(form)
    if not all((*right_gradients(form), *right_gradients(of_input))):
        return False
    if not _by_patches(form):
        return all(right_gradients(of_weight))
    # Patches have no right derivative where they leave out the end.
    sides = zip(*form.spread(), form.low, form.high, form.stride)
    return all((n + low + high - k) % s == 0 for n, k, low, high, s in sides)


def _of_input(form: Form, padding: Sizes) -> Form:
    """The convolution of y that is the gradient of the input, by the padding of one side."""
    sizes, kernel = form.spread()
    spans = (1 + s * (n - 1) for n, s in zip(form.outputs(), form.stride))
    return form._replace(
        stride=form.input_dilation,
        low=tuple(k - 1 - low for k, low in zip(kernel, form.low)),
        high=tuple(n - span + p for n, span, p in zip(sizes, spans, padding)),
        input_dilation=form.stride,
        flip=not form.flip,
        sizes=form.outputs(),
    )


def _of_weight(form: Form) -> Form:
    """The convolution of x, with y as its kernel, that is the gradient of the weight."""
    spans = (1 + s * (n - 1) for n, s in zip(form.outputs(), form.stride))
    sides = zip(spans, *form.spread(), form.low)
    return form._replace(
        stride=form.dilation,
        high=tuple(span - n + k - low - 1 for span, n, k, low in sides),
        dilation=form.stride,
        flip=False,
        kernel=form.outputs(),
    )


def _by_patches(form: Form) -> bool:
    """Whether MLX takes the patches of the input for the gradient of the weight."""
    dilated = {1} != {*form.dilation, *form.input_dilation}
    return not dilated and not form.flip and form.groups == 1


def _plain_loop(form: Form) -> bool:
    """Whether the CPU has nothing but a plain loop for a convolution of this form."""
    dilated = {1} != {*form.dilation, *form.input_dilation}
    return dilated or (form.groups > 1 and (len(form.sizes) > 1 or form.flip))


# The choice --------------------------------------------------------------------------------------


def convolve(x: mx.array, w: mx.array, form: Form) -> mx.array:
    """y of x and w, each for one sample or each for several."""
    if _devices.gpu():
        if x.ndim == form.ndim:
            return raw(x, w, form)
        if len(form.sizes) < 3:
            return _in_groups(x, w, form)
    elif x.ndim == form.ndim and not _plain_loop(form):
        return raw(x, w, form)
    return patched(x, w, form, _strided_patches)


def weight_gradient(x: mx.array, y: mx.array, form: Form) -> mx.array:
    """The cotangent of w, of x and a cotangent of y."""
    quick = _devices.gpu() or not _plain_loop(form)
    if x.ndim == form.ndim and quick and right_gradients(form)[1]:
        return _raw_weight_gradient(x, y, form)
    return patched_weight_gradient(x, y, form, _strided_patches)


def _in_groups(x: mx.array, w: mx.array, form: Form) -> mx.array:
    """The samples are groups: their channels lie side by side."""
    samples = x.shape[0]
    x = mx.flatten(mx.moveaxis(x, 0, -2), -2, -1)
    y = raw(x, mx.flatten(w, 0, 1), form._replace(groups=samples * form.groups))
    return mx.moveaxis(mx.unflatten(y, -1, (samples, -1)), -2, 0)


# By products with patches ------------------------------------------------------------------------


def patched(x: mx.array, w: mx.array, form: Form, patches: Patches | None = None) -> mx.array:
    """y = patches of x times w: (S, G, N * outputs, kernel * C/G) by (S, G, kernel * C/G, O/G)."""
    dtype, lone = x.dtype, x.ndim == form.ndim
    x, w = _prepared(x, lone), _reversed(_prepared(w, lone), form)
    rows = (patches or _gathered_patches)(x, form)
    w = mx.reshape(w, (w.shape[0], form.groups, -1, rows.shape[-1]))
    y = mx.swapaxes(matmul(rows, mx.swapaxes(w, -1, -2)), 1, 2)
    y = mx.reshape(y, (*x.shape[:2], *form.outputs(), -1)).astype(dtype)
    return mx.squeeze(y, 0) if lone else y


def patched_weight_gradient(
    x: mx.array, y: mx.array, form: Form, patches: Patches | None = None
) -> mx.array:
    """w' = y transposed times patches of x: (S, G, O/G, N * outputs) by (.., kernel * C/G)."""
    dtype, lone = x.dtype, x.ndim == form.ndim
    x, y = _prepared(x, lone), _prepared(y, lone)
    rows = (patches or _gathered_patches)(x, form)
    columns = mx.reshape(y, (y.shape[0], rows.shape[2], form.groups, -1))
    w = matmul(mx.transpose(columns, (0, 2, 3, 1)), rows)
    w = mx.reshape(w, (y.shape[0], y.shape[-1], *form.kernel, -1)).astype(dtype)
    w = _reversed(w, form)
    return mx.squeeze(w, 0) if lone else w


def _prepared(x: mx.array, lone: bool) -> mx.array:
    # MLX's own convolutions on the CPU compute in float32, and its products of halves are slow.
    x = x if _devices.gpu() or x.dtype == mx.float64 else x.astype(mx.float32)
    return mx.expand_dims(x, 0) if lone else x


def _reversed(w: mx.array, form: Form) -> mx.array:
    if not form.flip:
        return w
    # MLX 0.31 has a batching rule of a reversed axis of one that loses it.
    spatial = (slice(None, None, -1) if n > 1 else slice(None) for n in form.kernel)
    return w[(slice(None), slice(None), *spatial)]


def _strided_patches(x: mx.array, form: Form) -> mx.array:
    """(S, G, N * outputs, kernel * C/G) of (S, N, *sizes, C), by one copy.

    Where nothing traces: `mx.as_strided` has no batching rule.
    """
    if form.input_dilation != (1,) * len(form.sizes):
        x = _with_zeros_between(x, form.input_dilation)
    if any(form.low) or any(form.high):
        x = mx.pad(x, [(0, 0), (0, 0), *zip(form.low, form.high), (0, 0)])
    samples, images, channels = x.shape[0], x.shape[1], x.shape[-1]
    sample, image, *steps, _ = (math.prod(x.shape[i + 1 :]) for i in range(x.ndim))
    each, outputs = channels // form.groups, form.outputs()
    patches = mx.as_strided(
        mx.contiguous(x),  # a slice of one entry counts as contiguous when it is flattened
        (samples, form.groups, images, *outputs, *form.kernel, each),
        (
            sample,
            each,
            image,
            *(step * s for step, s in zip(steps, form.stride)),
            *(step * d for step, d in zip(steps, form.dilation)),
            1,
        ),
    )
    return _as_matrices(patches, form)


def _with_zeros_between(x: mx.array, dilation: Sizes) -> mx.array:
    for axis, d in enumerate(dilation, 2):
        if d > 1:
            n = x.shape[axis]
            widths = [(0, 0)] * (x.ndim + 1)
            widths[axis + 1] = (0, d - 1)
            x = mx.flatten(mx.pad(mx.expand_dims(x, axis + 1), widths), axis, axis + 1)
            x = x[(*(slice(None),) * axis, slice(0, 1 + d * (n - 1)))]
    return x


def _gathered_patches(x: mx.array, form: Form) -> mx.array:
    """The same of operations that MLX can map, 0.31's pad not among them."""
    n = len(form.sizes)
    for axis in range(n):
        # Those before it have grown by a dimension each.
        places, inside, whole = _places(form, axis)
        x = mx.take(x, places, axis=2 + 2 * axis)
        if not whole:
            inside = mx.reshape(inside, (*places.shape, *(1,) * (x.ndim - 4 - 2 * axis)))
            x = mx.where(inside, x, mx.array(0, x.dtype))
    x = mx.unflatten(x, -1, (form.groups, -1))
    outputs, kernel = range(2, 2 + 2 * n, 2), range(3, 2 + 2 * n, 2)
    x = mx.transpose(x, (0, 2 + 2 * n, 1, *outputs, *kernel, 3 + 2 * n))
    return _as_matrices(x, form)


@functools.lru_cache(maxsize=64)
def _places(form: Form, axis: int) -> tuple[mx.array, mx.array, bool]:
    """(outputs, kernel): where on the axis the input lies, whether inside, and whether all do."""
    size, step = form.sizes[axis], form.input_dilation[axis]
    places = [
        [
            j * form.stride[axis] + t * form.dilation[axis] - form.low[axis]
            for t in range(form.kernel[axis])
        ]
        for j in range(form.outputs()[axis])
    ]
    inside = [[p % step == 0 and 0 <= p < size * step for p in row] for row in places]
    clipped = [[min(max(p // step, 0), size - 1) for p in row] for row in places]
    return mx.array(clipped), mx.array(inside), all(map(all, inside))


def _as_matrices(patches: mx.array, form: Form) -> mx.array:
    rows = patches.shape[2] * math.prod(form.outputs())
    return mx.reshape(patches, (*patches.shape[:2], rows, -1))
