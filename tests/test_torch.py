"""torch.func, where PyTorch is installed, as the oracle on the same inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

import mlxshim
from mlxshim.core.versions import MLX
from mlxshim.nn import functional_call, stack_module_state

torch = pytest.importorskip("torch", reason="PyTorch is not part of the test extra")
func = pytest.importorskip("torch.func")

#: PyTorch's forward mode warns of its own ways to compile.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node:UserWarning"),
]
RNG = np.random.default_rng(0)
X, Y, W = (RNG.normal(size=s).astype("f") for s in ((4, 3), (4, 3), (4, 5, 3)))


class Library(NamedTuple):
    """What a test calls."""

    transforms: Any
    np: Any
    array: Callable[[Any], Any]
    torch: bool

    def axes(self, **given: Any) -> dict[str, Any]:
        """in_axes and out_axes under the library's own names."""
        return {key.replace("axes", "dims"): x for key, x in given.items()} if self.torch else given


OURS = Library(mlxshim, mx, mx.array, False)
TORCH = Library(func, torch, torch.tensor, True)


def leaves(tree: Any) -> list[np.ndarray]:
    if isinstance(tree, dict):
        return [x for key in sorted(tree) for x in leaves(tree[key])]
    if isinstance(tree, (list, tuple)):
        return [x for child in tree for x in leaves(child)]
    if tree is None:
        return []
    return [tree.detach().numpy() if isinstance(tree, torch.Tensor) else np.array(tree)]


def same(program: Callable[[Library], Any], tol: float = 1e-4) -> None:
    """`program(library)` answers the same in PyTorch and here."""
    got, want = leaves(program(OURS)), leaves(program(TORCH))
    assert len(got) == len(want) > 0
    for g, w in zip(got, want):
        assert g.shape == w.shape
        np.testing.assert_allclose(g, w, rtol=tol, atol=tol)


def both_refuse(program: Callable[[Library], Any], *words: str) -> None:
    with pytest.raises(Exception):  # noqa: B017
        program(TORCH)
    with pytest.raises((ValueError, TypeError, NotImplementedError)) as raised:
        program(OURS)
    for word in words:
        assert word in str(raised.value)


# vmap -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "in_axes, out_axes",
    [(0, 0), (1, -1), (-1, 1), ((1, None), -2), ((None, -2), 2), ((2, 2), 0), ((-3, 0), 1)],
)
def test_axes(in_axes, out_axes):
    def program(lib):
        def f(x, y):
            return lib.np.sin(x) + y.sum()

        mapped = lib.transforms.vmap(f, **lib.axes(in_axes=in_axes, out_axes=out_axes))
        return mapped(lib.array(W), lib.array(W))

    same(program)


def test_trees_and_nesting():
    def program(lib):
        def f(p, x):
            return {"out": p["w"] * x.sum() + p["b"][0], "t": (p["b"][1] * 2, x)}

        v = lib.transforms.vmap
        p = {"w": lib.array(X), "b": [lib.array(Y[0]), lib.array(X)]}
        axes = lib.axes(in_axes=({"w": 0, "b": [None, 0]}, 0), out_axes={"out": 1, "t": (0, 0)})
        outer = lib.axes(in_axes=(0, None))
        pairs = v(v(lambda x, y: x @ y, **lib.axes(in_axes=(None, 0))), **outer)
        return v(f, **axes)(p, lib.array(Y)), pairs(lib.array(X), lib.array(Y))

    same(program)


@pytest.mark.parametrize("chunk_size", [1, 3, 4, 100])
def test_chunks(chunk_size):
    def program(lib):
        return lib.transforms.vmap(lambda x: x.sum() * x, chunk_size=chunk_size)(lib.array(X))

    same(program)
    both_refuse(lambda lib: lib.transforms.vmap(lambda x: x, chunk_size=0)(lib.array(X)), "chunk")


@pytest.mark.parametrize("lib", [OURS, TORCH], ids=["mlxshim", "torch"])
@pytest.mark.parametrize("chunk_size", [None, 3])
def test_randomness(lib, chunk_size):
    def draw(x):
        noise = mx.random.uniform(shape=x.shape) if lib is OURS else torch.rand(x.shape)
        return x * 0 + noise

    x = lib.array(np.zeros((8, 16), "f"))

    def rows(randomness):
        mapped = lib.transforms.vmap(draw, randomness=randomness, chunk_size=chunk_size)
        (drawn,) = leaves(mapped(x))
        return len({row.tobytes() for row in drawn})

    assert rows("different") == 8
    if chunk_size is None:
        assert rows("same") == 1
    with pytest.raises((RuntimeError, ValueError)):
        rows("error")
    with pytest.raises((RuntimeError, ValueError)):
        rows("always")


@pytest.mark.parametrize(
    "program, words",
    [
        (lambda t, x: t.vmap(lambda x: x, 2)(x), ["(4, 3)"]),
        (lambda t, x: t.vmap(lambda x, y: x)(x, x[:2]), ["size 4", "size 2"]),
        (lambda t, x: t.vmap(lambda x: x, None)(x), ["Nothing is mapped"]),
        (lambda t, x: t.vmap(lambda x: x, ({"a": 0},))(x), ["in_axes"]),
        (lambda t, x: t.vmap(lambda x: x, 0, 3)(x), ["out_axes"]),
        (lambda t, x: t.vmap(lambda x: "text")(x), ["'text'"]),
    ],
)
def test_refusals(program, words):
    both_refuse(lambda lib: program(lib.transforms, lib.array(X)), *words)


# Derivatives --------------------------------------------------------------------------------------


def apply(np_, p, x):
    return (np_.tanh(p["w"] @ x) ** 2).sum() + (p["b"] * x).sum()


@pytest.mark.parametrize("name", ["grad", "grad_and_value"])
@pytest.mark.parametrize("argnums", [0, 1, (0,), (1, 0), (0, 1), -1])
def test_gradients(name, argnums):
    def program(lib):
        p = {"w": lib.array(X), "b": lib.array(Y[0])}
        f = getattr(lib.transforms, name)(lambda p, x: apply(lib.np, p, x), argnums=argnums)
        return f(p, lib.array(Y[1]))

    same(program)


@pytest.mark.parametrize("name", ["grad", "grad_and_value"])
def test_has_aux(name):
    def program(lib):
        def f(x):
            return (x**2).sum(), {"aux": x * 2}

        return getattr(lib.transforms, name)(f, has_aux=True)(lib.array(X))

    same(program)
    both_refuse(
        lambda lib: getattr(lib.transforms, name)(lambda x: x.sum(), has_aux=True)(lib.array(X)),
        "has_aux",
    )
    both_refuse(lambda lib: getattr(lib.transforms, name)(lambda x: x)(lib.array(X)), "scalar")
    both_refuse(
        lambda lib: getattr(lib.transforms, name)(lambda x: x.sum(), argnums=3)(lib.array(X)),
        "argnums",
    )


def several(lib, x, y):
    return {"a": lib.np.sin(x) * y, "b": (x @ y, y * 2)}


def test_vjp_jvp_linearize():
    def program(lib):
        t, x, y = lib.transforms, lib.array(X[0]), lib.array(Y[0])

        def f(x, y):
            return several(lib, x, y)

        out, pullback = t.vjp(f, x, y)
        _, pullback_and_aux, aux = t.vjp(lambda x: (x * 2, x + 1), x, has_aux=True)
        linear, tangent_map = t.linearize(lambda x: lib.np.sin(x) * x, x)
        return [
            out,
            pullback(out),
            t.jvp(f, (x, y), (y, x)),
            t.jvp(lambda x: (x * 2, x + 1), (x,), (y,), has_aux=True),
            pullback_and_aux(y),
            aux,
            linear,
            tangent_map(y),
            tangent_map(x),
        ]

    same(program)


def test_a_pullback_of_one_argument_is_a_tuple_here_and_in_torch():
    for lib in (OURS, TORCH):
        pulled = lib.transforms.vjp(lambda x: x * 2, lib.array(X))[1](lib.array(Y))
        assert type(pulled) is tuple and len(pulled) == 1


@pytest.mark.parametrize(
    "program",
    [
        lambda t, x: t.jvp(lambda x: x, (x,), (x[0],)),
        lambda t, x: t.jvp(lambda x: x, x, x),
        lambda t, x: t.jvp(lambda x: x, (x,), (x, x)),
        lambda t, x: t.vjp(lambda x: x, x)[1](x[0]),
        lambda t, x: t.vjp(lambda x: (x, x), x)[1]((x,)),
        lambda t, x: t.linearize(lambda x: x, x)[1](x[0]),
    ],
)
def test_tangents_and_cotangents_that_do_not_go_together(program):
    both_refuse(lambda lib: program(lib.transforms, lib.array(X)))


@pytest.mark.parametrize("mode", ["jacrev", "jacfwd"])
@pytest.mark.parametrize("argnums", [0, (0,), (1, 0)])
def test_jacobians(mode, argnums):
    def program(lib):
        f = getattr(lib.transforms, mode)(lambda x, y: several(lib, x, y), argnums=argnums)
        return f(lib.array(X[0]), lib.array(Y[0]))

    same(program)


def test_jacobians_in_chunks_and_with_aux():
    def program(lib):
        def f(x):
            return lib.np.sin(x[:, None] * x[None]) @ x, x * 2

        x = lib.array(X[0])
        chunked = lib.transforms.jacrev(f, has_aux=True, chunk_size=2)(x)
        return chunked, lib.transforms.jacfwd(f, has_aux=True)(x)

    same(program)


def test_hessians():
    def program(lib):
        t, x = lib.transforms, lib.array(X)

        def f(x):
            return (lib.np.tanh(x[:-1] * x[1:]) ** 2).sum()

        if not lib.torch and MLX < (0, 32, 0):  # an index has no second derivative there
            f = lambda x: (mx.tanh(mx.split(x, [2])[0] * mx.split(x, [1])[1]) ** 2).sum()  # noqa: E731
        return [
            t.hessian(f)(x[0]),
            t.vmap(t.hessian(f))(x),
            t.jacfwd(t.jacrev(f))(x[1]),
            t.jacrev(t.jacfwd(f))(x[1]),
            t.vmap(t.grad(t.grad(lambda s: lib.np.sin(s) * s)))(x[0]),
        ]

    same(program, 1e-3)


def test_per_sample_gradients():
    def program(lib):
        t, x = lib.transforms, lib.array(W)
        p = {"w": lib.array(X), "b": lib.array(Y[0])}
        per_sample = t.vmap(t.grad(lambda p, x: apply(lib.np, p, x)), **lib.axes(in_axes=(None, 0)))
        outer = t.vmap(per_sample, **lib.axes(in_axes=(None, 0)))
        return per_sample(p, x[0]), outer(p, x)

    same(program)


@pytest.mark.skipif(MLX < (0, 32, 0), reason="refused on MLX 0.31")
def test_the_gradient_of_a_complex_argument_is_torchs():
    z = (X[0] + 1j * Y[0]).astype("F")

    def program(lib):
        convention = {} if lib.torch else {"conjugate": True}
        f = lib.transforms.grad(lambda z: (lib.np.abs(z * z + z) ** 2).sum(), **convention)
        return f(lib.array(z))

    same(program)


# Modules ----------------------------------------------------------------------------------------


class Ours(nn.Module):
    def __init__(self, width: int = 5):
        super().__init__()
        self.fc1, self.norm, self.fc2 = (
            nn.Linear(3, width),
            nn.LayerNorm(width),
            nn.Linear(width, 2),
        )

    def __call__(self, x):
        return self.fc2(mx.tanh(self.norm(self.fc1(x))))


class Theirs(torch.nn.Module):
    def __init__(self, model: Ours, width: int = 5):
        super().__init__()
        self.fc1, self.fc2 = torch.nn.Linear(3, width), torch.nn.Linear(width, 2)
        self.norm = torch.nn.LayerNorm(width)
        values = {name: torch.tensor(np.array(x)) for name, x in tree_flatten(model.parameters())}
        self.load_state_dict(values)

    def forward(self, x):
        return self.fc2(torch.tanh(self.norm(self.fc1(x))))


def by_name(tree: Any) -> dict[str, Any]:
    return dict(tree_flatten(tree)) if any(isinstance(x, dict) for x in tree.values()) else tree


@pytest.fixture
def models():
    ours = [Ours() for _ in range(3)]
    return ours, [Theirs(model) for model in ours]


def test_functional_call(models):
    (ours, other, _), (theirs, _, _) = models
    replaced = dict(tree_flatten(other.parameters()))
    partly = {name: replaced[name] for name in ("fc1.weight", "norm.bias")}
    for some in (replaced, partly):
        got = functional_call(ours, some, mx.array(X))
        given = {name: torch.tensor(np.array(x)) for name, x in some.items()}
        want = func.functional_call(theirs, given, (torch.tensor(X),))
        np.testing.assert_allclose(np.array(got), want.detach().numpy(), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="no parameter 'other'"):
        functional_call(ours, {"other": mx.zeros(1)}, mx.array(X))


def test_ensembles_and_their_gradients(models):
    ours, theirs = models

    def answers(lib, several, call, x):
        params, buffers = (stack_module_state if lib is OURS else func.stack_module_state)(several)

        def loss(params, buffers, x):
            return (call(several[0], (params, buffers), x) ** 2).mean()

        axes = lib.axes(in_axes=(0, 0, None))
        grads, values = lib.transforms.vmap(lib.transforms.grad_and_value(loss), **axes)(
            params, buffers, x
        )
        first = {name: p[0] for name, p in by_name(params).items()}
        per_sample = lib.transforms.vmap(
            lib.transforms.grad(loss), **lib.axes(in_axes=(None, None, 0))
        )(first, {}, x)
        return [by_name(params), by_name(grads), values, by_name(per_sample)]

    got = answers(OURS, ours, functional_call, mx.array(X))
    want = answers(TORCH, theirs, lambda m, p, x: func.functional_call(m, p, (x,)), torch.tensor(X))
    for g, w in zip(got, want):
        if isinstance(w, dict):
            assert set(g) == set(w)
        for a, b in zip(leaves(g), leaves(w)):
            assert a.shape == b.shape
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


def test_models_that_differ_are_refused(models):
    ours, theirs = models
    with pytest.raises(Exception):  # noqa: B017
        func.stack_module_state([*theirs, torch.nn.Linear(2, 2)])
    with pytest.raises(ValueError, match="Model 3 is a Linear"):
        stack_module_state([*ours, nn.Linear(2, 2)])
    for stack in (stack_module_state, func.stack_module_state):
        with pytest.raises((ValueError, RuntimeError)):
            stack([])
