"""What else there is in MLX's list: other names of operations, methods, and whole families."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from .builder import Builder, Unfit, is_integer
from .operations import operation

# Element by element -----------------------------------------------------------------------------

# fmt: off
NAMES = {
    "{}": ["trunc", "isposinf", "isneginf", "conjugate", "radians", "asinh", "atan", "empty_like"],
    "0.9 * mx.tanh({})": ["acos", "asin", "atanh"],
    "1.5 + mx.abs({})": ["acosh"],
}
METHODS = ["log", "log10", "log1p", "log2", "reciprocal", "rsqrt", "sqrt"]
OF_INTEGERS = [
    "bitwise_and", "bitwise_or", "bitwise_xor", "bitwise_left_shift", "bitwise_right_shift",
    "right_shift", "not_equal", "greater", "less_equal",
]
# fmt: on
_MADE = "empty_like"  # whose values are none


@operation("elementwise", 2)
def named(b: Builder):
    inside = b.choose(sorted(NAMES))
    name, x = b.choose(NAMES[inside]), inside.format(b.floating())
    b.let(f"mx.{name}({x}) == mx.{name}({x})" if name == _MADE else f"mx.{name}({x})")


@operation("elementwise")
def methods(b: Builder):
    x = b.floating()
    forms = [f"(0.5 + mx.abs({x})).{b.choose(METHODS)}()", f"(3 * {x}).round()"]
    b.let(b.choose([*forms, f"mx.tanh({x}).prod()", f"mx.array({x}).{b.choose(['std', 'var'])}()"]))


@operation("elementwise")
def compared(b: Builder):
    x = b.floating()
    y = b.partner(x)
    forms = ["mx.greater({x}, {y})", "mx.greater_equal({x}, {y})", "mx.less({x}, {y})"]
    forms += ["mx.less_equal({x}, {y})", "mx.array_equal({x}, {x})", "mx.allclose({x}, {y})"]
    forms += ["mx.power(0.5 + mx.abs({x}), {y})", "mx.pow(0.5 + mx.abs({x}), 1.5)"]
    forms += ["mx.atan2({x}, 2 + mx.abs({y}))", "mx.subtract({y}, {x})", "mx.multiply({x}, {y})"]
    b.let(b.choose(forms).format(x=x, y=y))


@operation("elementwise")
def of_integers_by_name(b: Builder):
    x = b.some(is_integer) or b.argument("integers", b.shape())
    name, y = b.choose(OF_INTEGERS), b.partner(x, "integers")
    b.let(f"mx.{name}({x}, {y} & 7)" if "shift" in name else f"mx.{name}({x}, {y})")


@operation("elementwise")
def bytes_of_floats(b: Builder):
    x = b.floating()
    b.let(f"mx.from_fp8(mx.to_fp8(mx.stop_gradient({x})), mx.float32)")


# Reductions and scans ---------------------------------------------------------------------------


@operation("reductions", 3)
def along(b: Builder):
    x = b.floating(1, lambda x: x.size > 0)
    axis = b.axis(b.arrays[x].ndim)
    y = b.like("normal", b.arrays[x].shape, b.dtype(x))
    forms = ["mx.median({x}, axis={a})", "mx.median({x}, keepdims=True)", "mx.diff({x}, axis={a})"]
    forms += ["mx.minmax({x}, axis={a})", "mx.vecdot({x}, {y}, axis={a})", "{x}.min(axis={a})"]
    forms += ["mx.count_nonzero({x} > 0, axis={a})", "mx.diff({x}, n=2)", "{x}.cummax({a})"]
    forms += ["mx.cumulative_sum({x}, axis={a})", "mx.cumulative_prod(mx.tanh({x}), axis={a})"]
    forms += ["t.logcumsumexp({x}, {a})", "{x}.cummin({a}, reverse=True)", "({x} > 0).all({a})"]
    b.let(b.choose(forms).format(x=x, y=y, a=axis))


# Shapes -----------------------------------------------------------------------------------------


@operation("shapes", 2)
def reshaped(b: Builder):
    x = b.floating()
    n = b.arrays[x].ndim
    forms = ["mx.atleast_1d({x})", "mx.atleast_3d({x})", "mx.asarray({x})", "{x}.squeeze()"]
    if n:
        order = tuple(range(n))[::-1]
        forms += [f"mx.permute_dims({{x}}, {order})", "mx.concat([{x}, {x}], axis=-1)"]
    if n >= 2:
        forms += ["mx.matrix_transpose({x})", "{x}.mT", "{x}[0].T", "{x}.moveaxis(0, -1)"]
        forms += ["{x} * mx.tri({x}.shape[-2], {x}.shape[-1], 0)"]
        forms += ["mx.identity({x}.shape[-2]) @ {x}.astype(mx.float32)"]
    b.let(b.choose(forms).format(x=x))


@operation("shapes")
def windowed(b: Builder):
    x = b.floating(1, lambda x: x.shape[-1] > 1)
    name = b.choose(["hanning", "hamming", "blackman", "bartlett"])
    b.let(f"{x} * mx.{name}({b.arrays[x].shape[-1]})")


# Products ---------------------------------------------------------------------------------------


@operation("matmul")
def convolved(b: Builder):
    x = b.floating(1, lambda x: x.ndim == 1 and 0 < x.size < 9)
    y = b.like("normal", (b.choose([2, 3, 1]),), b.dtype(x))
    b.let(f"mx.convolve({x}, {y}, {b.choose(['full', 'same', 'valid'])!r})")


@operation("matmul")
def masked_by_blocks(b: Builder):
    x, y = b.like("normal", (2, 3), "float32"), b.like("normal", (3, 4), "float32")
    # Second derivatives with masks of floats are wrong in MLX.
    masks = [
        b.choose(
            ["None", b.like("booleans", (1, 1)), f"mx.stop_gradient({b.like('normal', (1, 1))})"]
        )
        for _ in range(3)
    ]
    b.let(f"mx.block_masked_mm({x}, {y}, 32, {', '.join(masks)})")


@operation("experts")
def quantized_experts(b: Builder):
    w = b.like("normal", (4, 3, 32), "float32")
    x = b.like("normal", b.choose([(1, 32), (2, 1, 32)]), "float32")
    which = b.like("integers", b.choose([(2,), (3, 1), ()]))
    mode, more = b.choose([("affine", ", bits=4"), ("mxfp4", "")])
    options = f"group_size=32{more}, mode={mode!r}"
    b.let(
        f"mx.gather_qmm({x}, *pack, rhs_indices={which}, {options})",
        setup=f"pack = mx.quantize({w}, {options})",
    )


@operation("attention")
def gated_delta(b: Builder):
    batch, length, heads, dim = b.choose([1, 2]), b.choose([3, 1]), 2, 4
    q, k, v = (b.like("normal", (batch, length, heads, dim), "float32") for _ in range(3))
    gates = f"mx.sigmoid({b.like('normal', (batch, length, heads), 'float32')})"
    b.let(f"mx.fast.gated_delta_update(0.1 * {q}, 0.1 * {k}, {v}, {gates}, 1 - {gates})")


@operation("norms")
def losses(b: Builder):
    x = b.floating(2, lambda x: x.ndim == 2 and x.size > 0)
    rows, classes = b.arrays[x].shape
    b.let(f"mx.fast.cross_entropy({x}, {b.like('integers', (rows,))} % {classes})")


# Linear algebra and spectra ---------------------------------------------------------------------


@operation("linalg", 2)
def more_of_squares(b: Builder):
    x = b.floating(2, lambda x: x.shape[-1] == x.shape[-2] and 0 < x.shape[-1] < 5)
    n = b.arrays[x].shape[-1]
    a = f"({x}.astype(mx.float32) + 3 * mx.eye({n}))"
    forms = ["mx.linalg.det({a}, stream=mx.cpu)", "mx.linalg.slogdet({a}, stream=mx.cpu)"]
    forms += ["mx.linalg.eigh({a} + mx.swapaxes({a}, -1, -2), stream=mx.cpu)[0]"]
    forms += ["mx.linalg.cholesky_inv(mx.tril({a}), stream=mx.cpu)"]
    forms += ["mx.linalg.lu_factor({a}, stream=mx.cpu)[0]", "mx.linalg.norm({a}, 'fro')"]
    forms += ["mx.linalg.eigvals({a}, stream=mx.cpu).sum().real"]
    forms += ["mx.linalg.solve_triangular({a}, {a}, stream=mx.cpu)"]
    forms += ["mx.linalg.solve_triangular({a}, {a}, upper=True, stream=mx.cpu)"]
    b.let(b.choose(forms).format(a=a))


@operation("fft")
def of_two_axes(b: Builder):
    x = b.floating(2, lambda x: x.size > 0)
    x = f"{x}.astype(mx.float32)"
    forms = ["mx.fft.fft2({x}).real", "mx.fft.ifft2({x}).imag", "mx.fft.rfft2({x}).real"]
    forms += [
        "mx.fft.irfft2({x} + 0j, s=(2, 4))",
        "mx.fft.ifftn({x}).real",
        "mx.fft.ifftshift({x})",
    ]
    forms += ["mx.fft.rfftn({x}).imag", "mx.fft.irfftn({x} + 0j, s=(2, 4), axes=(-2, -1))"]
    b.let(b.choose(forms).format(x=x))


@operation("random")
def of_a_covariance(b: Builder):
    key, mean = b.like("bits", (2,)), b.like("normal", (2,), "float32")
    root = b.like("normal", (2, 2), "float32")
    spread = f"mx.abs({root} @ {root}.T) * mx.eye(2) + mx.eye(2)"  # the sign of a root is free
    call = f"multivariate_normal({mean}, {spread}, (3,), key={key}, stream=mx.cpu)"
    b.let(f"mx.abs(mx.random.{call} - {mean})")


@operation("sorting")
def unique(b: Builder):
    if not hasattr(mx, "unique"):
        raise Unfit
    x: Any = b.some(lambda x: is_integer(x) and x.size > 0) or b.argument("integers", (5,))
    b.let(f"mx.unique({x}, size={b.number(1, 4)})")
