"""Common mistakes, made with JAX and with mlxshim: what each of the two says.

    python -m tests.errors > docs/errors.md

Every mistake is one expression that both libraries are asked to evaluate, with `np` their arrays
and the transforms under the same names. tests/test_errors.py reads the same list.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx

import mlxshim

PAGE = Path(__file__).resolve().parents[1] / "docs" / "errors.md"


class Mistake(NamedTuple):
    title: str
    program: str
    #: What our message has to say: the argument's name, and how to mend it.
    names: str
    mends: str


MISTAKES = [
    Mistake(
        "in_axes has too few entries",
        "vmap(lambda x, y: x + y, in_axes=(0,))(xs, xs)",
        "in_axes", "one entry for each of the 2",
    ),
    Mistake(
        "in_axes is a tree that the argument is not",
        "vmap(lambda params: params['w'], in_axes=({'b': 0},))({'w': xs})",
        "argument params", "containers like its own",
    ),
    Mistake(
        "in_axes is no axis",
        "vmap(lambda x: x, in_axes='0')(xs)",
        "in_axes", "must be an int, None or a tree",
    ),
    Mistake(
        "An axis out of range",
        "vmap(lambda x, y: x + y, in_axes=(0, 2))(xs, xs)",
        "argument y", "its axes are -2 to 1",
    ),
    Mistake(
        "A scalar is mapped",
        "vmap(lambda x, scale: x * scale)(xs, np.array(2.0))",
        "argument scale", "in_axes=None",
    ),
    Mistake(
        "Mapped axes of different sizes",
        "vmap(lambda x, y: x.sum() + y.sum())(xs, xs.T)",
        "y: shape", "in in_axes",
    ),
    Mistake(
        "Nothing is mapped",
        "vmap(lambda x: x, in_axes=None)(xs)",
        "in_axes", "axis_size",
    ),
    Mistake(
        "axis_size is not the size of the axis",
        "vmap(lambda x: x, axis_size=3)(xs)",
        "axis_size", "leave axis_size out",
    ),
    Mistake(
        "out_axes is None for an output that is mapped",
        "vmap(lambda x: x * 2, out_axes=None)(xs)",
        "out_axes", "give it an axis",
    ),
    Mistake(
        "out_axes is a tree that the output is not",
        "vmap(lambda x: (x, x), out_axes=(0, 0, 0))(xs)",
        "out_axes", "containers like its own",
    ),
    Mistake(
        "out_axes out of range",
        "vmap(lambda x: x, out_axes=2)(xs)",
        "out_axes", "from -2 to 1",
    ),
    Mistake(
        "A mapped function that returns no array",
        "vmap(lambda x: (x, 'text'))(xs)",
        "output", "must return arrays",
    ),
    Mistake(
        "A collective over a name that is not there",
        "vmap(lambda x: psum(x, 'batch'), axis_name='i')(xs)",
        "'batch'", "axis_name",
    ),
    Mistake(
        "The gradient of a function that is not scalar",
        "grad(lambda x: x * 2)(x)",
        "function", "sum it, or use jacrev",
    ),
    Mistake(
        "The gradient of a function with two results",
        "grad(lambda x: (x.sum(), x))(x)",
        "function", "has_aux=True",
    ),
    Mistake(
        "has_aux without a pair",
        "grad(lambda x: x.sum(), has_aux=True)(x)",
        "has_aux", "pair",
    ),
    Mistake(
        "The gradient with respect to an integer array",
        "grad(lambda x, index: x[index].sum(), argnums=(0, 1))(x, index)",
        "rgument index", "allow_int",
    ),
    Mistake(
        "The gradient with respect to what is no array",
        "grad(lambda params: params['w'].sum())({'w': x, 'name': 'layer'})",
        "params['name']", "must be an array",
    ),
    Mistake(
        "argnums out of range",
        "grad(lambda x, y: (x * y).sum(), argnums=2)(x, x)",
        "argnums", "2 positional",
    ),
    Mistake(
        "argnums that is no number",
        "grad(lambda x: x.sum(), argnums='x')(x)",
        "argnums", "must be an int",
    ),
    Mistake(
        "The gradient of a real function with an integer result",
        "grad(lambda x: (x > 0).sum())(x)",
        "function", "floating",
    ),
    Mistake(
        "The gradient of a complex function",
        "grad(lambda z: (z * z).sum())(z)",
        "rgument z", "holomorphic",
    ),
    Mistake(
        "holomorphic of real arguments",
        "grad(lambda x: x.sum(), holomorphic=True)(x)",
        "rgument x", "must be complex",
    ),
    Mistake(
        "A tangent of another shape",
        "jvp(lambda x, y: x * y, (x, x), (x, xs))",
        "argument y", "must have its shape",
    ),
    Mistake(
        "A tangent of another dtype",
        "jvp(lambda x: x * 2, (x,), (x.astype(np.float16),))",
        "argument x", "dtype",
    ),
    Mistake(
        "primals that are no tuple",
        "jvp(lambda x: x * 2, x, x)",
        "primals", "Write (primal,)",
    ),
    Mistake(
        "A cotangent of another structure",
        "vjp(lambda x: {'a': x, 'b': x}, x)[1]((x, x))",
        "output", "tree like it",
    ),
    Mistake(
        "A cotangent of another shape",
        "vjp(lambda x: x.sum(), x)[1](x)",
        "output", "must have its shape",
    ),
    Mistake(
        "The transpose of a function that is not linear",
        "linear_transpose(lambda x: x * x, x)(x)",
        "arguments", "vjp",
    ),
    Mistake(
        "A custom_vjp that is called before it has its rule",
        "custom_vjp(lambda x: x * 2)(x)",
        "custom_vjp", "defvjp(fwd, bwd)",
    ),
    Mistake(
        "A bwd that returns another number of cotangents",
        "[f := custom_vjp(lambda x: x * 2),"
        " f.defvjp(lambda x: (x * 2, None), lambda _, ct: (ct, ct)),"
        " grad(lambda x: f(x).sum())(x)]",
        "bwd", "a cotangent for each of its 1 arguments",
    ),
    Mistake(
        "A bwd that returns a cotangent of another shape",
        "[f := custom_vjp(lambda x: x * 2),"
        " f.defvjp(lambda x: (x * 2, None), lambda _, ct: (ct[:2],)),"
        " grad(lambda x: f(x).sum())(x)]",
        "bwd", "of the shapes of the arguments",
    ),
    Mistake(
        "Forward mode of a custom_vjp",
        "[f := custom_vjp(lambda x: x * 2),"
        " f.defvjp(lambda x: (x * 2, None), lambda _, ct: (ct,)),"
        " jvp(f, (x,), (x,))]",
        "custom_vjp", "use vjp, grad or jacrev",
    ),
    Mistake(
        "A rule of a custom_jvp that returns no tangent",
        "[f := custom_jvp(lambda x: x * 2),"
        " f.defjvp(lambda primals, tangents: primals[0] * 2),"
        " jvp(f, (x,), (x,))]",
        "custom_jvp", "must return a pair (output, tangent)",
    ),
    Mistake(
        "A scan whose carry changes its shape",
        "scan(lambda carry, x: (np.concatenate([carry, carry]), x), x, xs)",
        "carry", "cast or reshape",
    ),
    Mistake(
        "Branches of different results",
        "vmap(lambda p, x: cond(p, lambda x: x, lambda x: x.sum(), x))(xs[:, 0] > 0, xs)",
        "false_fun", "cast or reshape",
    ),
    Mistake(
        "A while_loop that asks for more than one truth",
        "while_loop(lambda x: x > 0, lambda x: x - 1, x)",
        "cond_fun", "reduce it",
    ),
]  # fmt: skip

#: When it is found out, no transform of ours is there any more: this message is MLX's.
LEAK = Mistake(
    "What a traced function has left behind is read later",
    "[kept := [], vmap(lambda x: kept.append(x * 2) or x)(xs), kept[0].tolist()]",
    "", "",
)  # fmt: skip


def namespace(library: str) -> dict[str, Any]:
    """The names that a program may use."""
    names: dict[str, Any] = {}
    if library == "mlxshim":
        for name in mlxshim.__all__:
            names[name] = getattr(mlxshim, name)
        np: Any = mx
    else:
        import jax

        for name in ("vmap", "grad", "vjp", "jvp", "linear_transpose", "custom_vjp", "custom_jvp"):
            names[name] = getattr(jax, name)
        for name in ("psum", "scan", "cond", "while_loop"):
            names[name] = getattr(jax.lax, name)
        np = jax.numpy
    x, z = np.array([1.0, 2.0, 3.0]), np.array([1.0 + 2.0j])
    xs, index = np.ones((2, 3)), np.array([1, 0])
    return {**names, "np": np, "x": x, "xs": xs, "z": z, "index": index}


def error_of(program: str, library: str) -> Exception | None:
    try:
        eval(compile(program, "<program>", "eval"), namespace(library))
    except Exception as e:
        return e
    return None


def said(error: Exception | None, limit: int = 500) -> str:
    if error is None:
        return "no error"
    text = re.sub(r"\s+", " ", str(error).split("\n------")[0]).strip()
    text = re.sub(r" at 0x[0-9a-f]+| with object id \d+", "", text)
    text = text if len(text) <= limit else text[:limit].rsplit(" ", 1)[0] + " …"
    return f"{type(error).__name__}: {text}"


def page() -> str:
    import jax

    text = [
        "# Error messages, side by side with JAX's",
        f"Written by `python -m tests.errors`, with JAX {jax.__version__}, MLX {mx.__version__}. "
        "Each mistake is made with both libraries, `np` being their arrays: `x` has shape (3,), "
        "`xs` (2, 3), `z` is complex, `index` holds integers. An `ArgumentError` is a `ValueError` "
        "and a `TypeError`. JAX's messages are cut where they are long.",
    ]
    for n, mistake in enumerate([*MISTAKES, LEAK], 1):
        text.append(f"## {n}. {mistake.title}\n\n    {mistake.program}")
        text.append(f"**mlxshim** — {code(said(error_of(mistake.program, 'mlxshim'), 10**4))}")
        text.append(f"**JAX** — {code(said(error_of(mistake.program, 'jax')))}")
    text.append("The last one is MLX's own message: when it is found out, no transform runs.")
    return "\n\n".join(text) + "\n"


def code(text: str) -> str:
    fence = "``" if "`" in text else "`"
    return f"{fence}{' ' * (fence == '``')}{text}{' ' * (fence == '``')}{fence}"


if __name__ == "__main__":
    print(page(), end="")
