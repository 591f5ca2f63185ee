"""What a model is made of is found once, and found again where it has changed."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from nn_models import close, loop

from mlxshim.nn import per_sample_value_and_grad


def test_a_model_that_is_changed_between_calls():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = [nn.Linear(3, 3), nn.Linear(3, 3)]
            self.more = {"scale": mx.ones((3,))}

        def __call__(self, x):
            for layer in self.layers:
                x = mx.tanh(layer(x))
            return x * self.more["scale"] * self.more.get("factor", 1.0)

    model, x = Model(), mx.random.normal((4, 3))

    def loss(model, x):
        return model(x).square().sum()

    def add_a_layer():
        model.layers.append(nn.Linear(3, 3))

    def exchange_a_layer():
        model.layers[0] = nn.Linear(3, 3, bias=False)

    def add_an_entry():
        model.more["factor"] = 2 * mx.ones((3,))

    def exchange_an_array():
        model.layers[1].weight = mx.random.normal((3, 3))

    class Doubled(nn.Linear):
        def __call__(self, x):
            return 2 * super().__call__(x)

    def exchange_a_class():
        model.layers[0].__class__ = Doubled

    def own_parameters():
        model.trainable_parameters = lambda: {"more": dict(model.more)}

    changes = [
        *(add_a_layer, lambda: model.layers[0].freeze(keys="bias"), exchange_a_layer),
        *(add_an_entry, exchange_an_array, lambda: model.layers[1].freeze()),
        *(lambda: model.unfreeze(), exchange_a_class, lambda: model.layers.pop(), own_parameters),
    ]
    fun = per_sample_value_and_grad(model, loss)
    fun(model, x)
    for change in changes:
        change()
        losses, grads = fun(model, x)
        want, want_grads = loop(model, loss, (x,))
        close(losses, want)
        assert type(model.layers[0]) is (Doubled if change in changes[-3:] else nn.Linear)
        names = {name for name, _ in tree_flatten(model.trainable_parameters())}
        assert {name for name, _ in tree_flatten(grads)} == names
        for name, g in tree_flatten(grads):
            close(g, want_grads[name])
