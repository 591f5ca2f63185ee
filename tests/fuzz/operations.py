"""The operations of which programs are made, by family: each adds a line, or does not fit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

from mlxshim.core.versions import MLX

from .builder import Builder, Unfit, is_floating, is_integer

Operation = Callable[[Builder], Any]
OPERATIONS: dict[str, list[Operation]] = {}


def operation(family: str, weight: int = 1) -> Callable[[Operation], Operation]:
    def register(op: Operation) -> Operation:
        OPERATIONS.setdefault(family, []).extend([op] * weight)
        return op

    return register


# Element by element -----------------------------------------------------------------------------

# fmt: off
ANYWHERE = [
    "sin", "cos", "tanh", "sigmoid", "square", "negative", "abs", "erf", "arctan", "arcsinh",
    "sign", "round", "floor", "ceil", "isnan", "isinf", "isfinite", "degrees", "stop_gradient",
    "logical_not", "nan_to_num", "zeros_like", "ones_like", "real",
]
# fmt: on
WITHIN = {
    "arccos": "0.9 * mx.tanh({})",
    "arcsin": "0.9 * mx.tanh({})",
    "arctanh": "0.9 * mx.tanh({})",
    "erfinv": "0.9 * mx.tanh({})",
    "log": "0.5 + mx.abs({})",
    "log1p": "mx.abs({})",
    "log2": "0.5 + mx.square({})",
    "log10": "0.5 + mx.square({})",
    "sqrt": "0.5 + mx.abs({})",
    "rsqrt": "0.5 + mx.square({})",
    "reciprocal": "0.5 + mx.square({})",
    "arccosh": "1.5 + mx.abs({})",
    "exp": "mx.tanh({})",
    "expm1": "mx.sin({})",
    "sinh": "mx.sin({})",
    "cosh": "mx.sin({})",
    "tan": "mx.sin({})",
}


@operation("elementwise", 4)
def unary(b: Builder):
    b.let(f"mx.{b.choose(ANYWHERE)}({b.floating()})")


@operation("elementwise", 2)
def bounded(b: Builder):
    name = b.choose(sorted(WITHIN))
    b.let(f"mx.{name}({WITHIN[name].format(b.floating())})")


@operation("elementwise", 4)
def binary(b: Builder):
    x = b.floating()
    y = b.partner(x)
    x, y = (y, x) if b.chance(2) else (x, y)
    form = b.choose(
        [
            "{x} * {y}",
            "{x} + {y}",
            "{x} - {y}",
            "mx.maximum({x}, {y})",
            "mx.minimum({x}, {y})",
            "{x} / (1 + mx.abs({y}))",
            "mx.logaddexp({x}, {y})",
            "mx.arctan2({x}, 2 + mx.abs({y}))",
            "(0.5 + mx.abs({x})) ** mx.tanh({y})",
            "mx.remainder({x}, 1 + mx.abs({y}))",
            "mx.floor_divide({x}, 1 + mx.abs({y}))",
            "mx.divmod({x}, 1 + mx.abs({y}))",
            "mx.clip({x}, -1.0, mx.abs({y}))",
            "mx.where({x} > 0, {x}, {y})",
            "mx.where(mx.abs({y}) < 1, {x}, 0.0)",
        ]
    )
    b.let(form.format(x=x, y=y))


@operation("elementwise", 2)
def scalar_operand(b: Builder):
    x = b.floating()
    forms = ["{x} * 2.5", "1 - {x}", "{x} ** 2", "{x} / 3", "3 / (1 + mx.abs({x}))", "2 + {x}"]
    forms += ["mx.clip({x}, -0.5, None)", "mx.maximum({x}, 0)", "-{x}", "abs({x})", "{x} // 0.7"]
    forms += ["{x} % 0.7", "{x} * mx.array(1.5)", "mx.add({x}, 1j).imag"]
    b.let(b.choose(forms).format(x=x))


@operation("elementwise")
def comparison(b: Builder):
    x = b.floating()
    y = b.choose([b.partner(x), "0.3"])
    form = b.choose(["{} < {}", "{} >= {}", "{} != {}", "{} == {}", "mx.isclose({}, {})"])
    b.let(f"({form.format(x, y)})")


@operation("elementwise")
def selection(b: Builder):
    x = b.floating()
    condition = b.some(lambda c: c.dtype.size == 1 and c.shape == b.arrays[x].shape)
    condition = condition or b.partner(x, "booleans")
    # Not as a cast, to which MLX's second derivatives give a slope of one (docs/mlx-issues.md).
    b.let(f"mx.where({condition} != 0, {x}, {b.partner(x)})")


@operation("elementwise", 2)
def of_integers(b: Builder):
    x = b.some(is_integer) or b.argument("integers", b.shape())
    y = b.choose([b.partner(x, "integers"), "3"])
    form = b.choose(
        [
            "{x} + {y}",
            "{x} * {y}",
            "{x} - {y}",
            "{x} & {y}",
            "{x} | {y}",
            "{x} ^ {y}",
            "{x} << 1",
            "{x} >> 1",
            "mx.left_shift({x}, {y} & 7)",  # by more than the width it is undefined
            "mx.bitwise_invert({x})",
            "{x} // (1 + mx.abs({y}))",
            "{x} % (1 + mx.abs({y}))",
            "{x} != {y}",
            "mx.not_equal({y}, {x})",
            "mx.maximum({x}, {y})",
            "{x} / (1 + mx.abs({y}))",
            "mx.divmod({x}, 1 + mx.abs({y}))",
            "mx.abs({x} - {y})",
        ]
    )
    b.let(form.format(x=x, y=y))


@operation("elementwise")
def of_booleans(b: Builder):
    def boolean(x: Any) -> bool:
        return str(x.dtype) == "mlx.core.bool"

    x = b.some(boolean) or b.argument("booleans", b.shape())
    y = b.partner(x, "booleans")
    forms = ["{} & {}", "{} | {}", "mx.logical_xor({}, {})", "mx.logical_and({}, {})", "{} == {}"]
    b.let(b.choose(forms).format(x, y))


@operation("elementwise")
def mixed_dtypes(b: Builder):
    x = b.floating()
    y = b.some(lambda y: not is_floating(y) and b.arrays[x].shape == y.shape)
    if y is None:
        y = b.argument(b.choose(["integers", "booleans"]), b.arrays[x].shape)
    b.let(b.choose(["{} * {}", "{} + {}", "mx.maximum({}, {})"]).format(x, y))


@operation("elementwise")
def cast(b: Builder):
    x = b.some(lambda _: True) or b.floating()
    dtype = b.choose(["float32", "float16", "bfloat16", "int32", "bool_", "uint8", "int64"])
    # What MLX's derivative makes of a float that becomes an integer is a slope of one.
    ends = is_floating(b.arrays[x]) and "float" not in dtype
    b.let(f"mx.stop_gradient({x}).astype(mx.{dtype})" if ends else f"{x}.astype(mx.{dtype})")


@operation("elementwise")
def complex_numbers(b: Builder):
    x = b.floating()
    y = b.partner(x)
    z = f"({x}.astype(mx.float32) + 1j * {y}.astype(mx.float32))"
    forms = [
        "mx.real({z} * {z})",
        "mx.imag(mx.conj({z}) * (2 + 1j))",
        "t.abs({z})",
    ]
    # MLX's own gradient of exp, which the loop takes, is wrong before 0.32.4.
    quotient = "{z} / (2 + t.abs({z}))"
    forms += [f"mx.real(mx.exp({quotient}))" if MLX >= (0, 32, 4) else f"mx.real({quotient})"]
    forms += ["mx.imag(mx.square({z}))"]
    b.let(b.choose(forms).format(z=z))


@operation("elementwise", 2)
def in_place(b: Builder):
    x = b.floating()
    y = b.choose([b.partner(x), "0.5"])
    if y in b.arrays and b.arrays[x].shape != (b.arrays[x] + b.arrays[y]).shape:
        raise Unfit
    if b.chance(2):
        setup, rebinds = f"{x} {b.choose(['+=', '*=', '-='])} {y}", x
        b.let(f"{x} * 1", setup=setup, rebinds=rebinds)
    else:
        copy = f"w{len(b.lines)}"
        setup = (
            f"{copy} = mx.array({x})\n{copy} {b.choose(['+=', '*=', '-=', '/='])} 1 + mx.abs({y})"
        )
        b.let(copy, setup=setup)


# Reductions and scans ---------------------------------------------------------------------------


def _axes(b: Builder, ndim: int) -> str:
    kind = b.number(0, 3)
    if kind == 0 or not ndim:
        return ""
    if kind == 1:
        return f", axis={b.axis(ndim)}"
    axes = b.subset(range(ndim))
    axes = [a - ndim if b.chance(4) else a for a in axes]
    return f", axis={tuple(axes) if b.chance(2) else axes}"


@operation("reductions", 4)
def reduction(b: Builder):
    x = b.floating()
    name = b.choose(["sum", "mean", "max", "min", "prod", "var", "std", "logsumexp", "all", "any"])
    axes = _axes(b, b.arrays[x].ndim) + b.choose(["", "", ", keepdims=True"])
    inside = f"mx.tanh({x})" if name == "prod" else x
    if name in ("std", "var") and b.chance(2):
        axes += ", ddof=1"
    method = f"{inside}.{name}({axes.removeprefix(', ')})"
    b.let(method if b.chance(3) else f"mx.{name}({inside}{axes})")


@operation("reductions")
def place_of_extremum(b: Builder):
    x = b.floating(1)
    axis = b.choose(["", f", axis={b.axis(b.arrays[x].ndim)}"])
    b.let(f"mx.{b.choose(['argmax', 'argmin'])}({x}{axis}{b.choose(['', ', keepdims=True'])})")


@operation("reductions", 2)
def scan(b: Builder):
    x = b.floating(1)
    axis = b.axis(b.arrays[x].ndim)
    name = b.choose(["mx.cumsum", "mx.cummax", "mx.cummin", "t.logcumsumexp", "mx.cumprod"])
    options = b.choose(["", ", reverse=True", ", inclusive=False"])
    inside = f"0.5 + mx.abs({x})" if name == "mx.cumprod" else x
    b.let(f"{name}({inside}, axis={axis}{options})")


@operation("reductions", 2)
def softmax(b: Builder):
    x = b.floating(1)
    axis = b.axis(b.arrays[x].ndim)
    b.let(f"mx.softmax({x}, axis={b.choose([axis, [axis]])}{b.choose(['', ', precise=True'])})")


@operation("reductions")
def sum_of_integers(b: Builder):
    x = b.some(lambda x: not is_floating(x)) or b.argument("integers", b.shape())
    b.let(f"mx.{b.choose(['sum', 'max', 'prod', 'any'])}({x}{_axes(b, b.arrays[x].ndim)})")


# Shapes -----------------------------------------------------------------------------------------


@operation("shapes", 3)
def other_axes(b: Builder):
    x = b.floating(1)
    n = b.arrays[x].ndim
    i, j = b.axis(n), b.axis(n)
    order = b.draw(st.permutations(range(n)))
    forms = [f"mx.transpose({x})", f"mx.swapaxes({x}, {i}, {j})", f"mx.moveaxis({x}, {i}, {j})"]
    forms += [f"mx.transpose({x}, {tuple(order)})", f"{x}.T", f"mx.flip({x}, axis={i})"]
    b.let(b.choose(forms))


@operation("shapes", 3)
def other_shape(b: Builder):
    x = b.floating()
    n, shape, size = b.arrays[x].ndim, b.arrays[x].shape, b.arrays[x].size
    forms = [
        f"mx.reshape({x}, (-1,))",
        f"mx.expand_dims({x}, {b.number(0, n)})",
        f"mx.squeeze({x})",
    ]
    forms += [f"mx.flatten({x})", f"mx.atleast_2d({x})", f"{x}.reshape(1, {size}, 1)"]
    forms += [f"mx.expand_dims({x}, (0, {n + 1}))", f"{x}[None]", f"{x}[..., None]"]
    if n >= 2:
        forms += [f"mx.flatten({x}, {b.number(0, n - 2)}, -1)", f"{x}.reshape({shape[::-1]})"]
        forms += [f"mx.reshape({x}, ({shape[0]}, -1))"]
    if n and shape[0] % 2 == 0:
        forms += [f"mx.unflatten({x}, 0, (2, -1))"]
    b.let(b.choose(forms))


@operation("shapes", 2)
def broadcasting(b: Builder):
    x = b.floating()
    shape = tuple(2 if m == 1 and b.chance(2) else m for m in b.arrays[x].shape)
    shape = (b.choose([2, 1, 3]), *shape) if b.chance(2) else shape
    y = b.partner(x)
    b.let(b.choose([f"mx.broadcast_to({x}, {shape})", f"mx.broadcast_arrays({x}, {y})"]))


@operation("shapes", 2)
def together(b: Builder):
    x = b.floating(1)
    y = b.like("normal", b.arrays[x].shape)
    axis = b.axis(b.arrays[x].ndim)
    forms = [f"mx.concatenate([{x}, {y}], axis={axis})", f"mx.stack([{x}, {y}, {x}], axis={axis})"]
    forms += [f"mx.concatenate([{y}, 2 * {x}, {y}], axis={axis})", f"mx.array([{x}, {y}])"]
    b.let(b.choose(forms))


@operation("shapes", 2)
def apart(b: Builder):
    x = b.floating(1, lambda x: x.size > 0)
    axis = b.axis(b.arrays[x].ndim)
    extent = b.arrays[x].shape[axis]
    forms = [f"mx.split({x}, [{b.number(0, extent)}], axis={axis})"]
    forms += [f"mx.split({x}, {extent}, axis={axis})", f"mx.unstack({x}, axis={axis})"]
    b.let(b.choose(forms))


@operation("shapes", 2)
def triangles(b: Builder):
    x = b.floating(2)
    k = b.number(-2, 2)
    forms = [f"mx.tril({x}, {k})", f"mx.triu({x}, {k})", f"mx.diagonal({x}, {k}, 0, -1)"]
    forms += [f"mx.trace({x})", f"mx.diagonal({x})"]
    if b.arrays[x].ndim == 2:
        forms += [f"mx.diag({x}, {k})"]
    b.let(b.choose(forms))


@operation("shapes")
def meshes(b: Builder):
    x = b.floating(1, lambda x: x.ndim == 1)
    y = b.floating(1, lambda y: y.ndim == 1)
    b.let(
        b.choose([f"mx.meshgrid({x}, {y}, indexing='ij')", f"mx.outer({x}, {y})", f"mx.diag({x})"])
    )


@operation("shapes", 2)
def fixed_slice(b: Builder):
    x = b.floating(1, lambda x: x.size > 0)
    shape = b.arrays[x].shape
    n = shape[0]
    keys = [
        f"{b.number(-n, n - 1)}",
        f"{b.number(0, n)}:",
        "::-1",
        "::2",
        f"..., {b.number(0, shape[-1] - 1)}",
    ]
    keys += [f"None, {b.number(0, n - 1)}", f":{b.number(1, n)}, None", "..., :1"]
    if len(shape) > 1:
        keys += [
            f"0, {b.number(0, shape[1] - 1)}",
            "1:, ::-1",
            f":, {b.number(0, shape[1] - 1)}, None",
        ]
    b.let(f"{x}[{b.choose(keys)}]")


@operation("shapes")
def constants(b: Builder):
    x = b.floating(1)
    n = b.arrays[x].shape[-1]
    forms = ["{x} + mx.arange({n})", "{x} * mx.linspace(0, 1, {n})", "{x} * mx.full({n}, {n})"]
    forms += ["mx.full_like({x}, 2) * {x}", "{x} + mx.eye({n})[:1]", "mx.contiguous({x})"]
    forms += ["mx.view({x}.astype(mx.float32), mx.int32)"]
    if n in (1, 2, 4, 12):
        forms += ["mx.hadamard_transform({x})"]
    b.let(b.choose(forms).format(x=x, n=n))


# Products ---------------------------------------------------------------------------------------


def _operand(b: Builder, x: str) -> str:
    """A right operand of `x @ …`, with its batch dimensions, some of them or none."""
    shape = b.arrays[x].shape
    if len(shape) == 1 or b.chance(4):
        tail = (shape[-1],) if b.chance(3) else (shape[-1], b.choose([2, 3, 1, 4]))
        return b.like("normal", tail, b.dtype(x))
    batch = b.choose([(), shape[:-2], tuple(1 for _ in shape[:-2])])
    return b.like("normal", (*batch, shape[-1], b.choose([2, 3, 1, 4])), b.dtype(x))


@operation("matmul", 4)
def matmul(b: Builder):
    x = b.floating(1)
    y = _operand(b, x)
    form = b.choose(["{x} @ {y}", "mx.matmul({x}, {y})", "mx.inner({x}, mx.swapaxes({y}, 0, -1))"])
    b.let(form.format(x=x, y=y))


@operation("matmul", 2)
def addmm(b: Builder):
    x = b.floating(2)
    y = _operand(b, x)
    shape = (b.arrays[x] @ b.arrays[y]).shape
    c = b.like("normal", b.choose([shape, shape[-1:], shape[-2:], (1,) * len(shape)]), b.dtype(x))
    b.let(f"mx.addmm({c}, {x}, {y})")  # MLX's own jvp leaves out alpha and beta


@operation("matmul", 2)
def contraction(b: Builder):
    x = b.floating(2, lambda x: x.ndim in (2, 3))
    shape = b.arrays[x].shape
    y = b.like("normal", (shape[-1], b.choose([2, 3])), b.dtype(x))
    left = "ij" if len(shape) == 2 else "bij"
    forms = ["mx.einsum('{l},jk->{m}k', {x}, {y})", "mx.tensordot({x}, {y}, axes=1)"]
    forms += ["mx.einsum('{l},jk->k{m}', {x}, {y})", "mx.einsum('{l}->j', {x})"]
    forms += ["mx.kron({x}, {y})", "mx.einsum('{l},{l}->i', {x}, {x})"]
    b.let(b.choose(forms).format(x=x, y=y, l=left, m=left[:-1]))


# Norms and positions ----------------------------------------------------------------------------


@operation("norms", 3)
def rms_norm(b: Builder):
    x = b.floating(1)
    last = b.arrays[x].shape[-1:]
    w = b.choose([b.like("normal", last, b.dtype(x)), "None"])
    b.let(f"mx.fast.rms_norm({x}, {w}, 1e-2)")


@operation("norms", 3)
def layer_norm(b: Builder):
    x = b.floating(1)
    last = b.arrays[x].shape[-1:]
    w = b.choose([b.like("normal", last, b.dtype(x)), "None"])
    bias = b.choose([b.like("normal", last, b.dtype(x)), "None"])
    b.let(f"mx.fast.layer_norm({x}, {w}, {bias}, 1e-2)")


@operation("norms", 2)
def rope(b: Builder):
    x = b.floating(2, lambda x: x.ndim >= 3 and x.shape[-1] % 2 == 0 and x.size > 0)
    dims = b.arrays[x].shape[-1]
    base, traditional = "100.0", b.choose(["False", "True"])
    offset = b.choose(["3", b.like("integers", ())])
    b.let(
        f"mx.fast.rope({x}, {dims}, traditional={traditional}, base={base}, scale=1.0, "
        f"offset={offset})"
    )
