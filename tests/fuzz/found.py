"""Programs that have failed once."""

PROGRAMS = {
    "a mixed second derivative of a convolution": """
def program(t):
    def f(a, b):
        return [t.convolution(a, b, stride=[1, 1], padding=[1, 1])]

    g = t.jvp(f, [1])
    g = t.jvp(g, [0])
    return g


INPUTS = [
    ("normal", (1, 3, 3, 1), "float32"),
    ("normal", (1, 2, 2, 1), "float32"),
    ("normal", (1, 2, 2, 1), "float32"),
    ("normal", (1, 3, 3, 1), "float32"),
]
ROUNDOFF, CALLS = 2**-24, 1
""",
    "a view of what is strided": """
def program(t):
    def f(a, b):
        v0 = a[None, b % 2, b % 2, ::2]
        return [mx.as_strided(v0, (1, 1), (1, 1), 0)]

    g = t.vmap(f, (0, None), [0])
    return g


INPUTS = [("normal", (2, 2, 2, 2), "float32"), ("integers", (), "int32")]
ROUNDOFF, CALLS = 2**-24, 1
""",
    "the gradient of nothing taken along an axis": """
def program(t):
    def f(a, b):
        return [mx.take_along_axis(a, b % 2, axis=1)]

    g = t.value_and_grad(f, [0])
    g = t.vmap(g, (None, 0), [0, 0])
    return g


INPUTS = [("normal", (0, 2), "float32"), ("integers", (2, 0, 1), "int32")]
ROUNDOFF, CALLS = 2**-24, 1
""",
    "a primitive with an argument that is called axes, at a later trace": """
def program(t):
    def f(a, b, c):
        return [t.slice_update(a, c, b % mx.array([2]), (0,))]

    g = t.vmap(f, (None, 0, 0), [0])
    g = t.checkpoint(g)
    g = t.vmap(g, (0, None, None), [0])
    return g


INPUTS = [
    ("normal", (2, 2), "float32"),
    ("integers", (2, 1), "int32"),
    ("normal", (2, 1), "float32"),
]
ROUNDOFF, CALLS = 2**-24, 1
""",
    "an assignment to nothing, beside an array": """
def program(t):
    def f(a, d, e):
        a[:0, (mx.arange(2) + d) % 2] = e
        return [a * 1, a.at[:0, (mx.arange(2) + d) % 2].add(0.5)]

    g = t.vmap(f, (0, None, None), [0, 0])
    return g


INPUTS = [
    ("normal", (2, 2, 2), "float32"),
    ("integers", (), "int32"),
    ("normal", (0, 2), "float32"),
]
ROUNDOFF, CALLS = 2**-24, 1
""",
    "the cotangent of a trace, mapped over its last axis": """
def program(t):
    def f(a):
        return [mx.trace(a)]

    g = t.vmap(f, (0,), [0])
    g = t.vjp(g, [0], 1)
    g = t.vmap(g, (None, 1), [0, 0])
    return g


INPUTS = [("normal", (2, 2, 2), "float32"), ("normal", (2, 2), "float32")]
ROUNDOFF, CALLS = 2**-24, 1
""",
    "a scan of one entry, whose argument is written to": """
def program(t):
    def f(a):
        v2 = t.associative_scan(mx.maximum, a, axis=2)
        a += a
        return [a * 1, v2]

    g = t.compile(f)
    return g


INPUTS = [("normal", (2, 2, 1), "float32")]
ROUNDOFF, CALLS = 2**-24, 2
""",
    "the place of the largest of all entries, with its axes": """
def program(t):
    def f(a):
        return [mx.argmax(a, keepdims=True), mx.argmin(a, keepdims=True), a.argmax(keepdims=True)]

    g = t.vmap(f, (2,), [0, 0, 0])
    g = t.vmap(g, (3,), [0, 0, 0])
    return g


INPUTS = [("normal", (2, 3, 3, 4, 2), "float32")]
ROUNDOFF, CALLS = 2**-24, 1
""",
    "a partition of rows that share memory": """
def program(t):
    def f(a, b):
        low = mx.partition(a, 2)[:2]
        high = mx.topk(a, 2)
        return [b * 1, mx.sort(low), mx.sort(high)]

    g = t.checkpoint(f)
    g = t.value_and_grad(g, [0])
    g = t.vmap(g, (None, 0), [0, 0])
    return g


INPUTS = [("normal", (4,), "float32"), ("integers", (2,), "int32")]
ROUNDOFF, CALLS = 2**-24, 1
""",
    "an update of every entry, of two equals": """
def program(t):
    def f(a, b):
        return [a.at[:].maximum(a), b * 1]

    g = t.vmap(f, (None, 0), [0, 0])
    g = t.value_and_grad(g, [0])
    return g


INPUTS = [("normal", (2, 2), "float32"), ("normal", (2,), "float32")]
ROUNDOFF, CALLS = 2**-24, 1
""",
    "a second derivative of a broadcast, mapped over its last axis": """
def program(t):
    def f(a, b):
        return [a * b]

    g = t.vmap(f, (0, 0), [0])
    g = t.vjp(g, [1], 1)
    g = t.vjp(g, [2], 2)
    g = t.vmap(g, (None, None, None, None, 1), [0, 0, 0])
    return g


INPUTS = [
    ("normal", (2, 2, 2, 1), "float32"),
    ("normal", (2,), "float32"),
    ("normal", (2, 2, 2, 1), "float32"),
    ("normal", (2, 2, 2, 1), "float32"),
    ("normal", (2, 2), "float32"),
]
ROUNDOFF, CALLS = 2**-24, 1
""",
    "the cotangent of an einsum that sums, mapped over its last axis": """
def program(t):
    def f(a):
        return [mx.einsum("bij->j", a)]

    g = t.vjp(f, [0], 1)
    g = t.vmap(g, (None, 1), [0, 0])
    return g


INPUTS = [("normal", (2, 3, 3), "float32"), ("normal", (3, 3), "float32")]
ROUNDOFF, CALLS = 2**-24, 1
""",
    "a second derivative of a product with a mapped mask of truths": """
def program(t):
    def f(a, b, c):
        return [mx.block_masked_mm(a, b, 32, None, c, None)]

    g = t.vmap(f, (None, None, 0), [0])
    g = t.value_and_grad(g, [0])
    g = t.value_and_grad(g, [1])
    return g


INPUTS = [
    ("normal", (2, 3), "float32"),
    ("normal", (3, 4), "float32"),
    ("booleans", (5, 1, 1), "bool_"),
]
ROUNDOFF, CALLS = 2**-24, 3
""",
    "a loop of no rounds, whose argument is written to": """
def program(t):
    def f(a, b, c):
        v1 = t.fori_loop(1, b, lambda i, p: mx.sin(p), a)
        a[0] = c
        return [a, v1]

    g = t.value_and_grad(f, [0])
    return g


INPUTS = [("normal", (2,), "float32"), ("integers", (), "int32"), ("normal", (), "float32")]
ROUNDOFF, CALLS = 2**-24, 1
""",
    "a product of no entries, over two axes": """
def program(t):
    def f(a):
        return [mx.prod(mx.tanh(a), axis=[0, 1])]

    g = t.vmap(f, (0,), [0])
    return g


INPUTS = [("normal", (2, 2, 0, 2), "float32")]
ROUNDOFF, CALLS = 2**-24, 1
""",
    "a sum of no entries in a branch": """
def program(t):
    def f(a, b, d):
        return [t.cond(d > 1, lambda p: mx.sin(p), lambda p: p + 0.1 * mx.sum(a), b)]

    g = t.vmap(f, (1, None, 0), [0])
    return g


INPUTS = [
    ("normal", (0, 2, 2, 2), "float32"),
    ("normal", (2,), "float32"),
    ("integers", (2,), "int32"),
]
ROUNDOFF, CALLS = 2**-24, 1
""",
    "the tangent of a mean of no entries": """
def program(t):
    def f(a):
        return [mx.array(a[None]).std()]

    g = t.jvp(f, [0])
    return g


INPUTS = [("normal", (0,), "float32"), ("normal", (0,), "float32")]
ROUNDOFF, CALLS = 2**-24, 1
""",
    "the second derivative of the absolute value of a complex number": """
def program(t):
    def f(a, b):
        return [t.abs(a + 1j * b)]

    g = t.value_and_grad(f, [0])
    g = t.value_and_grad(g, [0])
    return g


INPUTS = [("normal", (2,), "float32"), ("normal", (2,), "float32")]
ROUNDOFF, CALLS = 2**-24, 1
""",
    "the gradient of the tangent of what is recomputed": """
def program(t):
    def f(a, e):
        return [t.recomputed(lambda p, q: mx.sin(p) * q)(e, a)]

    g = t.jvp(f, [1])
    g = t.value_and_grad(g, [0])
    g = t.vmap(g, (0, None, None), [0, 0])
    return g


INPUTS = [("normal", (2,), "float32"), ("normal", (), "float32"), ("normal", (), "float32")]
ROUNDOFF, CALLS = 2**-24, 1
""",
    "codes that multiply a cotangent": """
def program(t):
    def f(d):
        v1 = mx.dequantize(*mx.quantize(d, group_size=32, bits=4), group_size=32, bits=4)
        return [t.lightly_mapped(lambda p, q: mx.max(q) - mx.mean(p), (None, 1))(v1, v1)]

    g = t.value_and_grad(f, [0])
    return g


INPUTS = [("normal", (2, 4, 32), "float32")]
ROUNDOFF, CALLS = 2**-24, 1
""",
    "terms of a third derivative that cancel": """
def program(t):
    def f(d):
        return [t.lightly_mapped(lambda p, q: mx.softmax(p + q, axis=-1), (3, 3))(d, d)]

    g = t.value_and_grad(f, [0])
    g = t.value_and_grad(g, [0])
    g = t.value_and_grad(g, [0])
    return g


INPUTS = [("normal", (1, 2, 1, 4), "float32")]
ROUNDOFF, CALLS = 2**-24, 1
""",
    "a branch that is not taken, which is not a number": """
def program(t):
    def f(a, b):
        v0 = mx.cummax(a, axis=0, inclusive=False)
        return [t.cond(b > 1, lambda p: p * mx.cos(v0), lambda p: mx.sin(p), a)]

    g = t.value_and_grad(f, [0])
    return g


INPUTS = [("normal", (2,), "float32"), ("integers", (), "int32")]
ROUNDOFF, CALLS = 2**-24, 1
""",
    "the tangent of what is taken from nothing": """
def program(t):
    def f(a, b):
        return [mx.var(mx.take(a, b % 2, axis=0), axis=[0, 1])]

    g = t.jvp(f, [0])
    return g


INPUTS = [("normal", (2, 0), "float32"), ("integers", (0,), "int32"), ("normal", (2, 0), "float32")]
ROUNDOFF, CALLS = 2**-24, 1
""",
    "the gradient of a tangent that a checkpoint's other argument has not": """
def program(t):
    def f(c, f):
        return [mx.max(f), mx.sin(c)]

    g = t.checkpoint(f)
    g = t.jvp(g, [0])
    g = t.value_and_grad(g, [1])
    return g


INPUTS = [("normal", (2,), "float32"), ("normal", (2, 2), "float32"), ("normal", (2,), "float32")]
ROUNDOFF, CALLS = 2**-24, 1
""",
    "two derivatives of one array, of which one captures the other": """
def program(t):
    def f(a):
        v0 = t.grad(lambda r: mx.sum(mx.sin(r) * a))(a)
        return [t.grad(lambda p: mx.sum(mx.sin(p) * mx.mean(v0)))(a)]

    g = t.value_and_grad(f, [0])
    return g


INPUTS = [("normal", (2,), "float32")]
ROUNDOFF, CALLS = 2**-24, 1
""",
    "the third derivative of a running logarithm": """
def program(t):
    def f(c):
        return [t.logcumsumexp(c, 0)]

    g = t.vjp(f, [0], 1)
    g = t.jvp(g, [0])
    g = t.value_and_grad(g, [0])
    return g


INPUTS = [("normal", (4, 3), "float32")] * 3
ROUNDOFF, CALLS = 2**-24, 1
""",
}
