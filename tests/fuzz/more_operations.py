"""Attention, quantized matrices, experts, linear algebra, spectra, random numbers, control."""

from __future__ import annotations

from .builder import Builder, Unfit, is_floating
from .operations import operation


@operation("attention", 6)
def attention(b: Builder):
    heads, kv_heads = b.choose([(2, 1), (2, 2), (1, 1), (4, 2)])
    batch, rows, columns, dim = b.choose([1, 2]), b.choose([3, 1, 4]), b.choose([3, 4, 6]), 4
    dtype = b.choose(["float32", "float32", "float16"])
    q = b.like("normal", (batch, heads, rows, dim), dtype)
    k = b.like("normal", (batch, kv_heads, columns, dim), dtype)
    v = b.choose([k, b.like("normal", (batch, kv_heads, columns, dim), dtype)])
    mask = b.number(0, 4)
    options = ""
    if mask == 1:
        options = ", mask='causal'"
    elif mask > 1:
        shape = b.choose([(rows, columns), (1, columns), (batch, 1, rows, columns), (heads, 1, 1)])
        m = b.like("booleans" if mask == 2 else "normal", shape, "" if mask == 2 else dtype)
        # A row in which all is hidden has no weights.
        keep = f"{m} | (mx.arange({columns}) == 0)" if mask == 2 else m
        options = f", mask={keep}"
    if b.chance(5):
        options += f", sinks={b.like('normal', (heads,), dtype)}"
    b.let(f"mx.fast.scaled_dot_product_attention({q}, {k}, {v}, scale=0.5{options})")


# Quantized matrices and experts -----------------------------------------------------------------


@operation("quantized", 2)
def quantized(b: Builder):
    bits, mode = b.choose([4, 8]), b.choose(["affine", "affine", "mxfp4"])
    w = b.like("normal", b.choose([(3, 32), (32, 32), (2, 4, 32)]), "float32")
    batch = b.arrays[w].shape[:-2]
    x = b.like("normal", b.choose([(32,), (2, 32), (*batch, 3, 32)]), "float32")
    if mode == "mxfp4":
        b.let(
            f"mx.quantized_matmul({x}, *pack, group_size=32, bits=4, mode='mxfp4')",
            setup=f"pack = mx.quantize({w}, group_size=32, bits=4, mode='mxfp4')",
        )
        return
    setup = f"pack = mx.quantize({w}, group_size=32, bits={bits})"
    if b.chance(3):
        b.let(f"mx.dequantize(*pack, group_size=32, bits={bits})", setup=setup)
    else:
        b.let(f"mx.quantized_matmul({x}, *pack, group_size=32, bits={bits})", setup=setup)


@operation("experts", 2)
def experts(b: Builder):
    which = b.like("integers", b.choose([(2,), (3, 1), ()]))
    w = b.like("normal", (4, 3, 2), "float32")
    x = b.like("normal", b.choose([(1, 3), (2, 1, 3), (3, 1, 1, 3)]), "float32")
    if b.chance(3):
        segments = b.like("integers", (3, 2))
        a, c = b.like("normal", (2, 4), "float32"), b.like("normal", (4, 3), "float32")
        b.let(f"mx.segmented_mm({a}, {c}, mx.sort({segments}.astype(mx.uint32), axis=-1))")
        return
    b.let(f"mx.gather_mm({x}, {w}, rhs_indices={which})")


# Linear algebra ---------------------------------------------------------------------------------


def _square(b: Builder) -> str:
    x = b.floating(2, lambda x: x.shape[-1] == x.shape[-2] and 0 < x.shape[-1] < 5)
    return f"{x}.astype(mx.float32)"


@operation("linalg", 2)
def norm(b: Builder):
    x = b.floating(1)
    axis = b.axis(b.arrays[x].ndim)
    form = b.choose(["{x} + 2", "{x} + 2, axis={a}", "{x} + 2, 1, {a}, keepdims=True"])
    b.let(f"mx.linalg.norm({form.format(x=x, a=axis)})")


@operation("linalg", 3)
def factorised(b: Builder):
    x = _square(b)
    n = x.split(".")[0]
    extent = b.arrays[n].shape[-1]
    spd = f"{x} @ mx.swapaxes({x}, -1, -2) + 2 * mx.eye({extent})"
    forms = ["mx.linalg.inv({s}, stream=mx.cpu)", "mx.linalg.cholesky({s}, stream=mx.cpu)"]
    forms += ["mx.linalg.solve({s}, {x}, stream=mx.cpu)", "mx.linalg.eigvalsh({s}, stream=mx.cpu)"]
    forms += ["mx.linalg.svd({s}, compute_uv=False, stream=mx.cpu)"]
    forms += ["mx.abs(mx.linalg.qr({s}, stream=mx.cpu)[1])", "mx.linalg.pinv({s}, stream=mx.cpu)"]
    forms += [
        "mx.linalg.tri_inv(mx.tril({s}), stream=mx.cpu)",
        "mx.linalg.lu({s}, stream=mx.cpu)[2]",
    ]
    b.let(b.choose(forms).format(s=spd, x=x))


@operation("linalg")
def cross(b: Builder):
    x = b.floating(1, lambda x: x.shape[-1] == 3)
    b.let(f"mx.linalg.cross({x}, {b.like('normal', b.arrays[x].shape, b.dtype(x))})")


# Spectra ----------------------------------------------------------------------------------------


@operation("fft", 2)
def spectrum(b: Builder):
    x = b.floating(1, lambda x: x.size > 0)
    axis = b.axis(b.arrays[x].ndim)
    x = f"{x}.astype(mx.float32)"
    forms = ["mx.real(mx.fft.fft({x}, axis={a}))", "mx.real(mx.fft.rfft({x}, axis={a}))"]
    forms += ["mx.imag(mx.fft.ifft({x}, axis={a}))", "mx.fft.irfft({x} + 0j, n=4, axis={a})"]
    forms += ["mx.real(mx.fft.fftn({x}))", "mx.fft.fftshift({x})"]
    b.let(b.choose(forms).format(x=x, a=axis))


# Random numbers, with keys ----------------------------------------------------------------------


@operation("random", 3)
def draws(b: Builder):
    key = b.like("bits", (2,))
    x = b.floating(0)
    shape = b.arrays[x].shape
    forms = ["normal({s}, key={k})", "uniform(shape={s}, key={k})", "bernoulli(0.4, {s}, key={k})"]
    forms += ["randint(0, 9, {s}, key={k})", "gumbel({s}, key={k})", "split({k})"]
    forms += ["truncated_normal(-1, 1, {s}, key={k})", "bernoulli(mx.sigmoid({x}), key={k})"]
    forms += ["normal({s}, loc={x}, key={k})", "uniform(0, 1 + mx.abs({x}), {s}, key={k})"]
    forms += ["bits({s}, key={k})", "laplace({s}, key={k})", "permutation(5, key={k})"]
    if len(shape):
        forms += ["categorical({x}, key={k})", "permutation({x}, key={k})"]
    b.let(f"mx.random.{b.choose(forms)}".format(s=shape, k=key, x=x))


# Control ----------------------------------------------------------------------------------------


@operation("control", 2)
def recomputed(b: Builder):
    x = b.floating()
    y = b.partner(x)
    wrap = b.choose(["t.recomputed", "mx.compile", "mx.custom_function"])
    body = b.choose(["mx.sin(p) * q", "mx.tanh(p + q)", "mx.exp(-mx.square(p)) - q"])
    b.let(f"{wrap}(lambda p, q: {body})({x}, {y})")


@operation("control")
def waiting(b: Builder):
    x, y = b.floating(), b.floating()
    b.let(b.choose([f"mx.depends({x}, {y})", f"mx.depends([{x}, {y}], [mx.sin({y})])"]))


@operation("control", 3)
def mapped_inside(b: Builder):
    """A vmap in the program, of a function that captures what it finds around it."""
    x = b.floating(1)
    y, z = b.like("normal", b.arrays[x].shape, b.dtype(x)), b.floating()
    axis = b.number(0, b.arrays[x].ndim - 1)
    bodies = ["mx.sin(p) * mx.sum(q)", "mx.softmax(p + q, axis=-1)", f"p * mx.sum({z})", "p"]
    bodies += [f"mx.cumsum(mx.flatten(p)) * mx.max({z})", "mx.max(q) - mx.mean(p)"]
    bodies += ["t.grad(lambda r: mx.sum(mx.sin(r) * q))(p)", f"mx.sum({z}) + mx.sum(q)"]
    axes = b.choose([f"({axis}, None)", f"({axis}, {axis})", f"(None, {axis})"])
    b.let(f"t.lightly_mapped(lambda p, q: {b.choose(bodies)}, {axes})({x}, {y})")


@operation("control", 2)
def differentiated_inside(b: Builder):
    x, z = b.floating(), b.floating()
    bodies = ["mx.sum(mx.tanh(p) * p)", f"mx.sum(mx.sin(p) * mx.mean({z}))", "mx.logsumexp(p)"]
    body = b.choose(bodies)
    forms = [f"t.grad(lambda p: {body})({x})"]
    forms += [f"t.jvp_of(lambda p: mx.sin(p) * mx.mean({z}), [{x}], [mx.cos({x})])[1][0]"]
    forms += [f"t.grad(lambda p: mx.sum(mx.square(t.grad(lambda p: {body})(p))))({x})"]
    b.let(b.choose(forms))


@operation("control")
def repeated(b: Builder):
    """A loop of Python's."""
    x = b.floating()
    y = b.partner(x)
    if (b.arrays[x] * b.arrays[y]).shape != b.arrays[x].shape:
        raise Unfit
    w = f"w{len(b.lines)}"
    step = b.choose([f"{w} = mx.tanh({w} * {y})", f"{w} += mx.sin({y})", f"{w} = {w} + {y} * n"])
    b.let(w, setup=f"{w} = mx.array({x})\nfor n in range({b.number(1, 3)}):\n    {step}")


@operation("control")
def branch(b: Builder):
    x = b.some(is_floating) or b.floating()
    b.let(f"mx.sin({x}) if {x}.ndim > 1 and {x}.dtype != mx.int32 else {x} * 2")
