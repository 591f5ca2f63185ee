"""Functions with rules of their own, written once for both libraries, and what is asked of them."""

from __future__ import annotations

import functools

from libraries import OURS, normal


def rules(lib, fun, fwd, bwd, **options):
    f = lib.custom_vjp(fun, **options)
    f.defvjp(fwd, bwd)
    return f


def jvp_rule(lib, fun, rule):
    f = lib.custom_jvp(fun)
    f.defjvp(rule)
    return f


def vmap_rule(lib, fun, rule):
    f = lib.custom_vmap(fun)
    f.def_vmap(rule)
    return f


# Functions of a scalar: each is run by both libraries. No rule is its function's derivative ---


def with_vjp(lib):
    @lib.custom_vjp
    def f(x, y):
        return lib.np.sin(x) * y

    def fwd(x, y):
        return lib.np.sin(x) * y, (lib.np.cos(x), {"y": y})

    def bwd(res, ct):
        c, rest = res
        return 3 * c * rest["y"] * ct, -2 * c * ct

    f.defvjp(fwd, bwd)
    return lambda x: f(x, x * x) + x


def with_vjp_of_trees(lib):
    def f(scale, tree, k):
        return {"out": tree["a"] * tree["b"][0] * scale, "n": k + 1}

    def fwd(scale, tree, k):
        return f(scale, tree, k), (tree, k, None, "kept")

    def bwd(scale, res, ct):
        tree, _, nothing, word = res
        assert nothing is None and word == "kept"
        return {"a": 5 * ct["out"] * tree["b"][0] * scale, "b": [None, None]}, None

    rule = lib.custom_vjp(f, nondiff_argnums=(0,))
    if lib is OURS:  # JAX's residuals hold no words
        rule.defvjp(fwd, bwd)
    else:
        rule.defvjp(
            lambda s, t, k: (f(s, t, k), (t, k)), lambda s, r, ct: bwd(s, (*r, None, "kept"), ct)
        )
    k = lib.np.array(2)
    return lambda x: rule(0.5, {"a": x, "b": [x + 1, x]}, k)["out"] * x


def with_vjp_of_functions(lib):
    @functools.partial(lib.custom_vjp, nondiff_argnums=(0, 2))
    def apply(fun, x, power=3):
        return fun(x) ** power

    apply.defvjp(
        lambda fun, x, power: (fun(x) ** power, x),
        lambda fun, power, x, ct: (power * fun(x) * ct,),
    )
    return lambda x: apply(lib.np.cos, x) + apply(lib.np.sin, x, 2) * x


def clipped(lib):
    """A second derivative is that of the forward function, not of the rule."""

    @lib.custom_vjp
    def f(x):
        return x

    f.defvjp(lambda x: (x, None), lambda _, ct: (lib.np.clip(ct, -0.5, 0.5),))
    return lambda x: f(x) ** 2 + lib.np.sin(f(x))


def vjp_in_vjp(lib):
    inner = with_vjp(lib)

    @lib.custom_vjp
    def f(x):
        return inner(x) * x

    f.defvjp(lambda x: (f(x), x), lambda x, ct: (inner(x) * ct,))
    return lambda x: f(x) + inner(f(x))


def with_jvp(lib):
    @lib.custom_jvp
    def f(x, y):
        return lib.np.sin(x) * y

    @f.defjvp
    def rule(primals, tangents):
        (x, y), (dx, dy) = primals, tangents
        return f(x, y), 3 * lib.np.cos(x) * y * dx + 7 * y * dy

    return lambda x: f(x, x * x) + x


def with_jvps(lib):
    f = lib.custom_jvp(lambda x, y, z: x * y * z)
    f.defjvps(lambda t, out, x, y, z: 10 * t * y + out * t, None, lambda t, out, x, y, z: t * x)
    return lambda x: f(x, x + 1, lib.np.sin(x))


def with_jvp_of_trees(lib):
    @functools.partial(lib.custom_jvp, nondiff_argnums=(1,))
    def f(tree, fun):
        return {"out": fun(tree["a"]) * tree["n"], "twice": 2 * tree["a"]}

    @f.defjvp
    def rule(fun, primals, tangents):
        (tree,), (along,) = primals, tangents
        slope = 3 * along["a"] * tree["a"]
        return f(tree, fun), {"out": slope, "twice": -slope}

    n = lib.np.array(3)

    def run(x):
        out = f({"a": x, "n": n}, lib.np.cos)
        return out["out"] * x + out["twice"]

    return run


def jvp_in_jvp(lib):
    inner = with_jvp(lib)
    f = lib.custom_jvp(lambda x: inner(x) * x)
    f.defjvp(lambda p, t: (f(*p), inner(p[0]) * t[0] * lib.np.cos(p[0])))
    return lambda x: f(x) + inner(f(x))


def checkpointed(lib):
    w = lib.np.array([0.5, -1.0])

    def block(x, i, scale=2.0):
        return lib.np.sin(x * w[i]) * scale

    safe = lib.checkpoint(block, static_argnums=(1,))
    return lambda x: safe(safe(x, 0), 1, scale=3.0) * x


def checkpoint_of_captured(lib):
    def f(x):
        y = lib.np.sin(x)
        inner = lib.checkpoint(lambda z: lib.np.cos(z * y) * x)
        return lib.checkpoint(lambda: inner(y) * inner(x))()

    return f


def jvp_in_checkpoint(lib):
    inner = with_jvp(lib)
    return lib.checkpoint(lambda x: lib.np.cos(inner(x)) * inner(x * x))


def vjp_in_checkpoint(lib):
    inner = with_vjp(lib)
    return lib.checkpoint(lambda x: lib.np.cos(inner(x)) * inner(x * x))


def checkpoint_in_vjp(lib):
    block = lib.checkpoint(lambda x: lib.np.sin(x * x))

    @lib.custom_vjp
    def f(x):
        return block(x)

    f.defvjp(lambda x: (block(x), block(x * 2)), lambda res, ct: (block(res) * ct,))
    return lambda x: f(x) * x


def in_scan(make):
    def of(lib):
        f = make(lib)

        def run(x):
            def step(carry, y):
                carry = f(carry * y)
                return carry, carry * x

            xs = lib.np.array([0.5, 1.0, -0.3])
            if lib is OURS:
                carry, ys = lib.scan(step, x, xs)
                return carry + ys.sum()
            # Reverse mode of JAX's scan takes the second derivative of a rule that is none for
            # another number than that of its loop.
            carry, ys = x, []
            for y in xs:
                carry, y = step(carry, y)
                ys.append(y)
            return carry + sum(ys)

        return run

    of.__name__ = f"{make.__name__} in scan"
    return of


def in_cond(make):
    def of(lib):
        f = make(lib)
        return lambda x: lib.lax.cond(x > 0, lambda x: f(x) * x, lambda x: 2 * f(-x), x)

    of.__name__ = f"{make.__name__} in cond"
    return of


def in_while(make):
    def of(lib):
        f = make(lib)

        def run(x):
            def body(state):
                return state[0] + 1, f(state[1]) * 0.5 + 0.3

            n = (lib.np.abs(x) * 2).astype(lib.i32) + 1
            return lib.lax.while_loop(lambda state: state[0] < n, body, (n * 0, x))[1]

        return run

    of.__name__ = f"{make.__name__} in while"
    return of


def of_scan(lib):
    @lib.checkpoint
    def loop(x):
        def step(carry, y):
            return lib.np.sin(carry * y) + x, carry

        carry, ys = lib.lax.scan(step, x, lib.np.array([0.5, 1.0, -0.3]))
        return lib.lax.cond(x > 0, lambda: carry * ys.sum(), lambda: carry - (ys * ys).sum())

    return loop


def vjp_of_scan(lib):
    def forward(x):
        return lib.lax.scan(lambda c, y: (lib.np.sin(c * y), c), x, lib.np.array([0.5, 1.0]))

    @lib.custom_vjp
    def f(x):
        return forward(x)[0]

    def bwd(ys, ct):
        return (lib.lax.scan(lambda c, y: (c * y + 1, None), ct, ys)[0],)

    f.defvjp(lambda x: forward(x), bwd)
    return f


REVERSE = [
    with_vjp,
    with_vjp_of_trees,
    with_vjp_of_functions,
    clipped,
    vjp_in_vjp,
    vjp_in_checkpoint,
    checkpoint_in_vjp,
    in_scan(with_vjp),
    in_cond(with_vjp),
    vjp_of_scan,
]
BOTH = [
    with_jvp,
    with_jvps,
    with_jvp_of_trees,
    jvp_in_jvp,
    checkpointed,
    checkpoint_of_captured,
    jvp_in_checkpoint,
    in_scan(with_jvp),
    in_cond(with_jvp),
    in_scan(checkpointed),
    in_cond(checkpointed),
    of_scan,
]


def compositions(lib, f):
    x, xs, grid = normal(lib), normal(lib, 4, seed=1), normal(lib, 2, 3, seed=2)
    yield "value", f(x)
    yield "vmap", lib.vmap(f)(xs)
    yield "vmap(vmap)", lib.vmap(lib.vmap(f), in_axes=1, out_axes=1)(grid)
    yield "compile(vmap)", lib.jit(lib.vmap(f))(xs)


def reverse(lib, f):
    x, xs, grid = normal(lib), normal(lib, 4, seed=1), normal(lib, 2, 3, seed=2)
    yield from compositions(lib, f)
    yield "grad", lib.grad(f)(x)
    yield "compile(grad)", lib.jit(lib.grad(f))(x)
    yield "grad(compile)", lib.grad(lib.jit(f))(x)
    yield "vmap(grad)", lib.vmap(lib.grad(f))(xs)
    yield "grad(vmap)", lib.grad(lambda xs: (lib.vmap(f)(xs) ** 2).sum())(xs)
    yield "grad(vmap(compile))", lib.grad(lambda xs: lib.vmap(lib.jit(f))(xs).sum())(xs)
    yield "compile(vmap(grad))", lib.jit(lib.vmap(lib.grad(f)))(xs)
    yield "grad(grad)", lib.grad(lib.grad(f))(x)
    yield "vmap(grad(grad))", lib.vmap(lib.grad(lib.grad(f)))(xs)
    yield "grad(vmap(grad))", lib.grad(lambda xs: lib.vmap(lib.grad(f))(xs).sum())(xs)
    yield (
        "grad(grad(vmap))",
        lib.grad(lambda x: lib.grad(lambda x: lib.vmap(f)(x * xs).sum())(x))(x),
    )
    yield "vmap(vmap(grad))", lib.vmap(lib.vmap(lib.grad(f)))(grid)
    yield "vmap(grad(vmap))", lib.vmap(lib.grad(lambda xs: lib.vmap(f)(xs).sum()))(grid)
    yield "grad(vmap(vmap))", lib.grad(lambda g: lib.vmap(lib.vmap(f))(g).sum())(grid)
    yield "jacrev(vmap)", lib.jacrev(lib.vmap(f))(xs)
    yield "vjp", lib.vjp(lib.vmap(f), xs)[1](xs)
    # Samples that share the argument.
    yield "grad, shared", lib.grad(lambda x: lib.vmap(lambda y: f(x) * y + f(x + y))(xs).sum())(x)


def both(lib, f):
    x, xs, ts = normal(lib), normal(lib, 4, seed=1), normal(lib, 4, seed=2)
    yield from reverse(lib, f)
    yield "jvp", lib.jvp(f, (x,), (ts[0],))
    yield "jvp(vmap)", lib.jvp(lib.vmap(f), (xs,), (ts,))
    yield "vmap(jvp)", lib.vmap(lambda x, t: lib.jvp(f, (x,), (t,)))(xs, ts)
    yield "jacfwd(vmap)", lib.jacfwd(lib.vmap(f))(xs)
    yield "hessian", lib.hessian(f)(x)
    yield "vmap(hessian)", lib.vmap(lib.hessian(f))(xs)
    yield "jvp(grad)", lib.jvp(lib.grad(f), (x,), (ts[0],))
    yield "grad(jvp)", lib.grad(lambda x: lib.jvp(f, (x,), (ts[0],))[1])(x)
    yield "jvp(jvp)", lib.jvp(lambda x: lib.jvp(f, (x,), (x,))[1], (x,), (ts[0],))
    yield "vmap(jvp(grad))", lib.vmap(lambda x, t: lib.jvp(lib.grad(f), (x,), (t,)))(xs, ts)
    yield "jvp(vmap(grad))", lib.jvp(lib.vmap(lib.grad(f)), (xs,), (ts,))
    yield "linearize", lib.linearize(lib.vmap(f), xs)[1](ts)
