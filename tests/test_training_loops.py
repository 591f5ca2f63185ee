"""Training loops as people write them, for MLX alone, inside patched(): the same numbers.

Each has the shape of a program of mlx-examples: what is compiled, captured, updated and returned.
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map

from mlxshim import patched

STEPS = 3


class MLP(nn.Module):
    def __init__(self, *sizes: int):
        super().__init__()
        self.layers = [nn.Linear(*pair) for pair in pairwise(sizes)]

    def __call__(self, x):
        for layer in self.layers[:-1]:
            x = nn.relu(layer(x))
        return self.layers[-1](x)


def logistic_regression():
    """Arrays, mx.grad, an update by hand."""
    x, w = mx.random.normal((20, 5)), mx.zeros(5)
    y = (x @ mx.random.normal((5,)) > 0).astype(mx.float32)

    def loss_fn(w):
        logits = x @ w
        return mx.mean(mx.logaddexp(0.0, logits) - y * logits)

    grad_fn, losses = mx.grad(loss_fn), []
    for _ in range(STEPS):
        w = w - 0.5 * grad_fn(w)
        mx.eval(w)
        losses.append(loss_fn(w))
    return losses, {"w": w}


def classifier():
    """nn.value_and_grad of a loss that takes the model, a step without compilation."""
    model = MLP(8, 16, 4)
    optimizer = optim.SGD(0.3)
    x, y = mx.random.normal((12, 8)), mx.random.randint(0, 4, (12,))

    def loss_fn(model, x, y):
        return nn.losses.cross_entropy(model(x), y, reduction="mean")

    loss_and_grad_fn, losses = nn.value_and_grad(model, loss_fn), []
    for _ in range(STEPS):
        loss, grads = loss_and_grad_fn(model, x, y)
        optimizer.update(model, grads)
        mx.eval(model.parameters(), optimizer.state)
        losses.append(loss)
    return losses, model.parameters()


def images():
    """Convolutions and the running statistics of batch norm; loss and accuracy come back."""
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.BatchNorm(4),
        nn.ReLU(),
        nn.MaxPool2d(2),
        lambda x: x.flatten(1),
        nn.Linear(4 * 4 * 4, 3),
    )
    optimizer = optim.SGD(0.1, momentum=0.9, weight_decay=1e-4)
    x, y = mx.random.normal((6, 8, 8, 3)), mx.array([0, 1, 2, 0, 1, 2])
    state = [model.state, optimizer.state]

    def train_step(model, x, y):
        output = model(x)
        loss = mx.mean(nn.losses.cross_entropy(output, y))
        return loss, mx.mean(mx.argmax(output, axis=1) == y)

    losses = []
    for _ in range(STEPS):
        (loss, accuracy), grads = nn.value_and_grad(model, train_step)(model, x, y)
        optimizer.update(model, grads)
        mx.eval(state)
        losses += [loss, accuracy]
    return losses, model.parameters()


class Language(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(16, 8)
        self.transformer = nn.TransformerEncoder(2, 8, 2, 16, dropout=0.2, norm_first=True)
        self.out = nn.Linear(8, 16)

    def __call__(self, x):
        mask = nn.MultiHeadAttention.create_additive_causal_mask(x.shape[1])
        return self.out(self.transformer(self.embedding(x), mask))


def language_model():
    """Dropout, checkpointed layers, a schedule, gradients clipped and accumulated."""
    model = Language()
    model.transformer.layers = [Checkpointed(layer) for layer in model.transformer.layers]
    optimizer = optim.SGD(optim.linear_schedule(0.0, 0.5, 2), momentum=0.9)
    tokens = mx.random.randint(0, 16, (2, 4, 7))

    def loss_fn(model, x, y):
        losses = nn.losses.cross_entropy(model(x), y)
        return mx.mean(losses), losses.size

    loss_and_grad_fn, losses = nn.value_and_grad(model, loss_fn), []
    for _ in range(STEPS):
        total = None
        for batch in tokens:
            (loss, _), grads = loss_and_grad_fn(model, batch[:, :-1], batch[:, 1:])
            total = grads if total is None else tree_map(mx.add, total, grads)
        clipped, norm = optim.clip_grad_norm(total, 1.0)
        optimizer.update(model, clipped)
        mx.eval(model.state, optimizer.state, mx.random.state)
        losses += [loss, norm]
    return losses, model.parameters()


class Checkpointed(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def __call__(self, *args):
        return nn.utils.checkpoint(self.layer)(*args)


def autoencoder():
    """Two models, two optimizers, noise drawn in the loss, frozen parts."""
    encoder, decoder = MLP(6, 8, 4), MLP(2, 8, 6)
    decoder.layers[1].freeze(keys="bias")
    x = mx.random.normal((10, 6))

    def loss_fn(encoder_parameters, decoder_parameters, x):
        encoder.update(encoder_parameters)
        decoder.update(decoder_parameters)
        mean, logvar = mx.split(encoder(x), 2, axis=-1)
        z = mean + mx.exp(0.5 * logvar) * mx.random.normal(mean.shape)
        kl = -0.5 * mx.sum(1 + logvar - mean.square() - logvar.exp())
        return nn.losses.mse_loss(decoder(z), x, "sum") + kl

    step, losses = mx.value_and_grad(loss_fn, argnums=(0, 1)), []
    optimizers = optim.SGD(1e-3), optim.SGD(1e-3, momentum=0.5)
    for _ in range(STEPS):
        parts = encoder.trainable_parameters(), decoder.trainable_parameters()
        loss, grads = step(*parts, x)
        for model, optimizer, grad in zip((encoder, decoder), optimizers, grads):
            optimizer.update(model, grad)
            mx.eval(model.parameters(), optimizer.state)
        losses.append(loss)
    return losses, [encoder.parameters(), decoder.parameters()]


def meta_learning():
    """The gradient through steps of gradient descent, over tasks."""
    tasks = mx.random.normal((3, 2, 5, 4))
    w = mx.random.normal((4,))

    def loss(w, x):
        return mx.mean(mx.tanh(x @ w - 1).square())

    def after_adapting(w, task):
        adapted = w - 0.1 * mx.grad(loss)(w, task[0])
        return loss(adapted, task[1])

    def over_tasks(w):
        return mx.mean(mx.stack([after_adapting(w, task) for task in tasks]))

    losses = []
    for _ in range(STEPS):
        value, g = mx.value_and_grad(over_tasks)(w)
        w = w - 0.2 * g
        mx.eval(w)
        losses.append(value)
    return losses, {"w": w}


def compiled():
    """The state of the model and the optimizer captured, random numbers too."""
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Dropout(0.5))
    optimizer = optim.SGD(0.1)
    x = mx.random.normal((6, 4))
    state = [model.state, optimizer.state, mx.random.state]
    loss_and_grad_fn = nn.value_and_grad(model, lambda x: mx.mean(model(x) @ x.T))

    @partial(mx.compile, inputs=state, outputs=state)
    def step(x):
        loss, grads = loss_and_grad_fn(x)
        optimizer.update(model, grads)
        return loss

    losses = []
    for _ in range(STEPS):
        losses.append(step(x))
        mx.eval(state)
    return losses, model.parameters()


def numbers(result):
    return [np.array(x) for _, x in tree_flatten(result) if isinstance(x, mx.array)]


LOOPS = [
    logistic_regression,
    classifier,
    images,
    language_model,
    autoencoder,
    meta_learning,
    compiled,
]


@pytest.fixture(autouse=True)
def _only_what_is_about_it_is_compiled(request):
    """On a CPU each kernel is a call of a C++ compiler."""
    if request.node.callspec.params["loop"] is not compiled:
        mx.disable_compile()
    yield
    mx.enable_compile()


@pytest.mark.parametrize("loop", LOOPS)
def test_the_same_numbers(loop):
    mx.random.seed(5)
    want = numbers(loop())
    mx.random.seed(5)
    with patched():
        got = numbers(loop())
    assert len(got) == len(want) > STEPS
    losses = [float(x) for x in want[:STEPS] if x.ndim == 0]
    assert len(set(losses)) == STEPS, "it does not train"
    for g, w in zip(got, want):
        np.testing.assert_allclose(g, w, rtol=1e-4, atol=1e-5)
