"""A program that uses the public names as a typed program does; checked by pyright, strictly.

It runs, too: tests/test_public.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
from typing_extensions import assert_type

import mlxshim
from mlxshim import grad, value_and_grad, vmap
from mlxshim.nn import (
    across_ranks,
    add_lora,
    clipped_grad,
    empirical_ntk,
    ensemble,
    fisher_diagonal,
    functional_call,
    gradient_features,
    laplace,
    per_row,
    per_sample_norms,
    per_sample_value_and_grad,
    prompt_attention,
    random_projection,
    stack_adapters,
    stack_module_state,
    trak,
)
from mlxshim.nn import value_and_grad as module_value_and_grad

x = mx.ones((3,))


def predict(w: mx.array, x: mx.array) -> mx.array:
    return mx.tanh(w * x)


def loss(w: mx.array, x: mx.array) -> mx.array:
    return predict(w, x).sum()


def loss_and_aux(w: mx.array, x: mx.array) -> tuple[mx.array, dict[str, mx.array]]:
    return loss(w, x), {"x": x}


def double(x: mx.array) -> mx.array:
    return x * 2


# What a transform returns has the arguments of the function, and where they are known its results.
assert_type(vmap(predict, in_axes=(None, 0))(x, x), mx.array)
assert_type(vmap(loss_and_aux)(x, x), "tuple[mx.array, dict[str, mx.array]]")
named = vmap(predict, 0, 0, "i", 3, randomness="same", chunk_size=None, fallback="error")
assert_type(named(w=x, x=x), mx.array)
assert_type(vmap(grad(loss))(x, x), Any)
assert_type(value_and_grad(loss)(x, x), tuple[mx.array, Any])
assert_type(
    value_and_grad(loss_and_aux, has_aux=True)(x, x),
    "tuple[tuple[mx.array, dict[str, mx.array]], Any]",
)
assert_type(grad(loss_and_aux, (0, 1), has_aux=True)(x, x), "tuple[Any, dict[str, mx.array]]")
assert_type(mlxshim.grad_and_value(loss, argnums=1)(x, x), tuple[Any, mx.array])

output, pullback = mlxshim.vjp(predict, x, x)
assert_type(output, mx.array)
assert_type(pullback(output), tuple[Any, ...])
assert_type(mlxshim.vjp(predict, [x, x], [x]), tuple[list[mx.array], list[mx.array]])
_, pullback, aux = mlxshim.vjp(loss_and_aux, x, x, has_aux=True)
assert_type(aux, dict[str, mx.array])
assert_type(mlxshim.jvp(predict, (x, x), (x, x)), tuple[mx.array, mx.array])
assert_type(mlxshim.jvp(predict, [x, x], [x, x]), tuple[list[mx.array], list[mx.array]])
output, tangent_map = mlxshim.linearize(predict, x, x)
assert_type(tangent_map(x, x), mx.array)
transposed: tuple[Any, ...] = mlxshim.linear_transpose(double, x)(x)

jacobians: list[Callable[[mx.array, mx.array], Any]] = [
    mlxshim.jacrev(predict, argnums=(0, 1), chunk_size=2),
    mlxshim.jacfwd(predict),
    mlxshim.jacobian(predict),
    mlxshim.hessian(loss),
]
products: list[Any] = [mlxshim.hvp(loss, (x, x), (x, x)), mlxshim.vhp(loss, (x, x), (x, x))]


# Control flow and trees.
def step(carry: mx.array, x: mx.array) -> tuple[mx.array, mx.array]:
    return carry + x, carry


def is_small(x: mx.array) -> mx.array:
    return x.sum() < 10


carry, outputs = mlxshim.scan(step, x[0], x)
flow: list[Any] = [
    mlxshim.cond(x[0] > 0, double, mx.sin, x),
    mlxshim.switch(mx.array(1), [double, mx.sin], x),
    mlxshim.map(double, x, batch_size=2),
    mlxshim.associative_scan(mx.add, x),
    mlxshim.fori_loop(0, 3, lambda i, x: x * i, x),
]
assert_type(mlxshim.while_loop(is_small, double, x), mx.array)
assert_type(mlxshim.stop_gradient({"x": x}), dict[str, mx.array])
shapes: Any = mlxshim.eval_shape(predict, mlxshim.ShapeDtypeStruct((3,), mx.float32), x)
leaves, structure = mlxshim.tree_flatten({"x": x})
assert_type(leaves, list[Any])
again: Any = mlxshim.tree_unflatten(structure, leaves)
assert_type(mlxshim.tree_structure(again) == structure, bool)
assert_type(mlxshim.tree_leaves(again), list[Any])
mapped: Any = mlxshim.tree_map(double, again)
flat, unravel = mlxshim.ravel_pytree(again)
assert_type(flat, mx.array)
restored: Any = unravel(flat)


# Collectives.
def normalized(x: mx.array) -> Any:
    shift = mlxshim.pmax(x, "i") + mlxshim.pmin(x, "i") + mlxshim.pmean(x, "i")
    every = mlxshim.all_gather(x, "i", axis=0, tiled=False)
    moved = mlxshim.ppermute(x, "i", [(0, 1)]), mlxshim.pshuffle(x, "i", [1, 0])
    parts = mlxshim.all_to_all(x, "i", 0, 0), mlxshim.pswapaxes(x, "i", 0)
    mine = mlxshim.psum_scatter(x, "i"), mlxshim.axis_index("i") + mlxshim.axis_size("i")
    return shift, every, moved, parts, mine, mlxshim.psum(x, ("i", "j"))


# Rules of one's own; what is in place.
@mlxshim.custom_vjp
def clipped(x: mx.array, limit: float) -> mx.array:
    return x


def clipped_fwd(x: mx.array, limit: float) -> tuple[mx.array, float]:
    return x, limit


def clipped_bwd(limit: float, ct: mx.array) -> tuple[mx.array, None]:
    return mx.clip(ct, -limit, limit), None


@mlxshim.custom_jvp
def squared(x: mx.array) -> mx.array:
    return x * x


@squared.defjvp
def squared_jvp(
    primals: tuple[mx.array, ...], tangents: tuple[mx.array, ...]
) -> tuple[mx.array, mx.array]:
    return squared(*primals), 2 * primals[0] * tangents[0]


@mlxshim.custom_vmap
def looped(x: mx.array) -> mx.array:
    return x + 1


@looped.def_vmap
def looped_rule(axis_size: int, in_batched: list[Any], x: mx.array) -> tuple[mx.array, bool]:
    return x + axis_size, True


clipped.defvjp(clipped_fwd, clipped_bwd)
assert_type(clipped(x, 1.0), mx.array)
assert_type(vmap(looped)(x), mx.array)
assert_type(mlxshim.jvp(squared, (x,), (x,)), tuple[mx.array, mx.array])
assert_type(mlxshim.remat(mlxshim.checkpoint(predict))(x, x), mx.array)


@mlxshim.primitive
def cube(x: mx.array) -> mx.array:
    return x**3


cube.def_elementwise()
with mlxshim.patched():
    names: list[str] = mlxshim.intercepted()

try:
    vmap(loss)(x, x[:2])
except (mlxshim.NoBatchingRule, mlxshim.ConcretizationError, mlxshim.ArgumentError) as e:
    message = str(e)


# Modules. MLX's own have no complete types: a program says what it has.
def of_modules(model: Any, layers: list[Any]) -> None:
    def module_loss(model: Any, x: mx.array) -> mx.array:
        return model(x).sum()

    parameters, state = stack_module_state(layers)
    results: list[Any] = [
        functional_call(model, (parameters, state), x),
        ensemble(layers, in_axes=None)(x),
        module_value_and_grad(model, module_loss)(model, x),
        per_sample_value_and_grad(model, module_loss, chunk_size=2)(model, x),
        across_ranks(clipped_grad(model, module_loss, 1.0), ("samples", "sum", "samples"))(x),
        per_sample_norms(model, module_loss)(model, x),
        fisher_diagonal(model, module_loss)(model, x),
        laplace(model, parameters, 3).sample(2, key=mx.random.key(0)),
        per_row(add_lora(model, rank=2), stack_adapters([parameters]))(x, x),
    ]
    features: mx.array = random_projection(parameters, 4)
    print(results, features, gradient_features(model, module_loss, 4))
    print(empirical_ntk, prompt_attention, trak)
