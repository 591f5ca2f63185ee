"""Convolutions beyond the suite: plain derivatives, layers, GPUs' means, what is computed."""

from __future__ import annotations

import io

import mlx.core as mx
import mlx.nn as nn
import pytest
from conformance.case import load
from conformance.convolution import FEW, defined

import mlxshim
from mlxshim.rules import _devices
from mlxshim.testing import check, loop

CASES = {name: c for name, c in load().items() if name.startswith("conv")}


def close(got: mx.array, want: mx.array, tolerance: float = 1e-4) -> bool:
    scale = max(1.0, mx.abs(want).max().item())
    return got.shape == want.shape and mx.abs(got - want).max().item() <= tolerance * scale


def normal(*shape: int) -> mx.array:
    return mx.random.normal(shape)


# With no vmap at all -------------------------------------------------------------------------

GEOMETRIES = [
    {"padding": ([2], [0])},
    {"padding": ([0], [2])},
    {"padding": ([4], [4])},
    {"padding": ([4], [5]), "stride": 2},
    {"padding": ([5], [4]), "stride": 3, "dilation": 2},
    {"stride": 3, "input_dilation": 2},
    {"stride": 2, "input_dilation": 3, "padding": ([1], [3]), "flip": True},
    {"padding": 1},
]


@pytest.mark.parametrize("static", GEOMETRIES, ids=str)
def test_plain_derivatives_are_those_of_the_definition(static: dict):
    rest = {**static}
    dilation = rest.pop("dilation", 1)

    def fun(x: mx.array, w: mx.array) -> mx.array:
        return mx.conv_general(x, w, kernel_dilation=dilation, **rest)

    truth = defined(1, **static)
    x, w = normal(2, 5, 2), normal(3, 2, 2)
    y = truth(x, w)
    c, dx, dw = normal(*y.shape), normal(*x.shape), normal(*w.shape)
    want = mx.vjp(truth, [x, w], [c])[1]
    for got, true in zip(mlxshim.vjp(fun, [x, w], [c])[1], want):
        assert close(got, true)
    got = mlxshim.jvp(fun, [x, w], [dx, dw])[1][0]
    assert close(got, truth(dx, w) + truth(x, dw))


def test_a_hessian_of_a_sum_of_squares():
    x = normal(1, 4, 2)

    def loss(w: mx.array) -> mx.array:
        return mx.sum(mx.conv1d(x, w, padding=1) ** 2)

    def by_product(w: mx.array) -> mx.array:
        return mx.sum(defined(1, padding=1)(x, w) ** 2)

    w, v = normal(2, 3, 2), normal(2, 3, 2)
    got = mlxshim.jvp(mlxshim.grad(loss), [w], [v])[1][0]
    assert close(got, mx.jvp(mx.grad(by_product), [w], [v])[1][0])


def test_gradients_of_gradients():
    def loss(x: mx.array, w: mx.array) -> mx.array:
        return mx.sum(mx.conv2d(x, w, padding=2) ** 3)

    def penalty(x: mx.array, w: mx.array) -> mx.array:
        return mx.sum(mlxshim.grad(loss, argnums=1)(x, w) ** 2)

    xs, ws = normal(3, 1, 3, 3, 2), normal(3, 2, 2, 2, 2) * 0.3
    for n in (0, 1):
        got = mlxshim.vmap(mlxshim.grad(penalty, argnums=n))(xs, ws)
        assert close(got, loop(mlxshim.grad(penalty, argnums=n), (0, 0))(xs, ws))


AGAIN = [  # the input's size, the kernel's, and what MLX's own second derivatives do not survive
    (1, 3, {"padding": 1, "input_dilation": 2, "flip": True}),  # a shape with no entries
    (5, 2, {"padding": 1, "stride": 3}),  # wrong numbers: an end that is left out
    (32, 3, {"padding": 1, "stride": 2}),
    (2, 1, {"stride": 2}),  # an error
    (4, 2, {"padding": ([1], [2]), "input_dilation": 2, "flip": True}),
    (5, 1, {"stride": 2, "flip": True}),  # on 0.31
    (5, 3, {"padding": 2, "stride": 3}),
    (6, 3, {"padding": 1}),
]


@pytest.mark.parametrize("size, kernel, static", AGAIN, ids=str)
def test_second_derivatives_are_those_of_the_definition(size: int, kernel: int, static: dict):
    x, w = normal(2, size, 2), normal(3, kernel, 2)
    of_x, of_w = normal(*x.shape), normal(*w.shape)

    def again(transforms: object, conv: object) -> list[mx.array]:
        def loss(x: mx.array, w: mx.array) -> mx.array:
            return mx.sin(conv(x, w)).sum()

        def slope(x: mx.array, w: mx.array) -> mx.array:
            dx, dw = transforms.grad(loss, argnums=(0, 1))(x, w)
            return (dx * of_x).sum() + (dw * of_w).sum()

        return transforms.grad(slope, argnums=(0, 1))(x, w)

    got = again(mlxshim, lambda x, w: mx.conv_general(x, w, **static))
    for g, want in zip(got, again(mx, defined(1, **static))):
        assert close(g, want)


# Layers ----------------------------------------------------------------------------------------


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, padding=1)
        self.depthwise = nn.Conv2d(4, 4, 3, stride=2, padding=1, groups=4)
        self.up = nn.ConvTranspose2d(4, 3, 2, stride=2, output_padding=1)

    def __call__(self, x: mx.array) -> mx.array:
        return self.up(mx.tanh(self.depthwise(mx.sin(self.first(x)))))


def test_per_sample_gradients_of_a_network():
    network, xs = Network(), normal(3, 1, 4, 4, 2)
    parameters = network.parameters()

    def loss(parameters: dict, x: mx.array) -> mx.array:
        network.update(parameters)
        return mx.sum(network(x) ** 2)

    got = mlxshim.vmap(mlxshim.grad(loss), in_axes=(None, 0))(parameters, xs)
    network.update(parameters)
    truth = [mlxshim.grad(loss)(parameters, x) for x in xs]
    for layer in ("first", "depthwise", "up"):
        for name in ("weight", "bias"):
            assert close(got[layer][name], mx.stack([t[layer][name] for t in truth]))


# What is computed --------------------------------------------------------------------------------


def operations(*outputs: mx.array) -> str:
    dot = io.StringIO()
    mx.export_to_dot(dot, *outputs)
    return dot.getvalue()


def test_nothing_mapped_after_all():
    x, w, y = normal(1, 4, 4, 2), normal(3, 2, 2, 2), normal(3)

    def fun(y: mx.array) -> mx.array:
        frozen = mlxshim.grad(lambda w: mx.sum(mx.conv2d(x, w, padding=([3, 3]))))(w)
        return mx.sum(frozen) * y

    assert close(mlxshim.vmap(fun)(y), loop(fun, [0])(y))
    assert close(mx.compile(mlxshim.vmap(fun))(y), loop(fun, [0])(y))


@pytest.mark.parametrize("axes", [(0, None), (None, 0), (0, 0)])
def test_three_dimensions_nothing_mapped_after_all(axes: tuple):
    x, w, y = normal(2, 2, 3, 3, 2), normal(2, 2, 2, 2, 2), normal(3)

    def fun(x: mx.array, w: mx.array, y: mx.array) -> mx.array:
        return mlxshim.vmap(lambda y: mx.conv3d(x, w) * y)(y)

    xs, ws = (z if a is None else mx.stack([z, 2 * z]) for z, a in zip((x, w), axes))
    got = mlxshim.vmap(fun, in_axes=(*axes, None))(xs, ws, y)
    assert close(got, loop(fun, (*axes, None))(xs, ws, y))


def test_a_shared_weight_is_one_call_of_the_batch():
    xs, w = normal(5, 2, 4, 4, 2), normal(3, 2, 2, 2)
    got = operations(mlxshim.vmap(lambda x, w: mx.conv2d(x, w), in_axes=(0, None))(xs, w))
    assert got.count('label ="Convolution"') == 1
    assert "CustomTransforms" not in got


def test_a_kernel_that_does_not_fit_is_refused():
    # MLX reads beyond the input where the stride is larger than what is missing.
    with pytest.raises(ValueError, match="does not fit in an input of"):
        mlxshim.vmap(lambda x, w: mx.conv1d(x, w, stride=3, dilation=2))(
            normal(2, 1, 4, 2), normal(2, 3, 3, 2)
        )


def test_mlx_refuses_what_it_refuses_outside():
    with pytest.raises(ValueError, match="input channels"):
        mlxshim.vmap(lambda x, w: mx.conv1d(x, w))(normal(2, 1, 4, 2), normal(2, 3, 3, 4))


def test_dtypes_are_promoted():
    xs, ws = normal(2, 1, 4, 2).astype(mx.float16), normal(2, 3, 2, 2)
    gradient = mlxshim.vmap(mlxshim.grad(lambda x, w: mx.conv1d(x, w).sum(), argnums=(0, 1)))
    assert [g.dtype for g in gradient(xs, ws)] == [mx.float16, mx.float32]


# As on a GPU -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["conv1d/grouped", "conv2d/depthwise", "conv_general/everything"])
def test_samples_as_groups(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_devices, "gpu", lambda: True)
    case = CASES[name]
    check(case.fun, *case.arrays, **{**case.options, "modes": FEW})
