"""Modules as values: functional_call, stack_module_state, ensemble."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten, tree_map
from nn_models import CASES, LoRA, Mixed, close, mixed_case, snapshot

from mlxshim import grad, jvp, value_and_grad, vmap
from mlxshim.nn import ensemble, functional_call, stack_module_state
from mlxshim.nn import value_and_grad as module_value_and_grad


def doubled(model):
    def double(x):
        return 2 * x if mx.issubdtype(x.dtype, mx.floating) else x

    return tree_map(double, model.parameters())


@pytest.mark.parametrize("name", CASES)
def test_call_with_other_arrays(name):
    model, _, (x, *_) = CASES[name]()
    x = x[0]
    before, parameters = snapshot(model), doubled(model)
    got = functional_call(model, parameters, x)
    assert snapshot(model) == before
    flat = functional_call(model, dict(tree_flatten(parameters)), x)
    model.update(parameters)
    assert mx.array_equal(got, model(x)) and mx.array_equal(flat, model(x))


def test_part_of_the_arrays_and_several_trees():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    x, zero = mx.ones((1, 2)), {"layers": [{}, {"weight": mx.zeros((2, 3))}]}
    close(functional_call(model, zero, x), model.layers[1].bias[None])
    bias = {"layers.1.bias": mx.ones((2,))}
    close(functional_call(model, (zero, bias), x), mx.ones((1, 2)))


def test_frozen_arrays_can_be_given():
    layer = nn.Linear(2, 2, bias=False)
    layer.freeze()
    close(functional_call(layer, {"weight": mx.eye(2)}, mx.ones((1, 2))), mx.ones((1, 2)))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_untouched_whatever_happens(error):
    class Fails(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.calls, self.seen = nn.Linear(2, 2), 0, [mx.zeros(1)]

        def __call__(self, x):
            self.calls += 1
            self.seen.append(x)
            self.inner.weight = x
            self.new = x
            del self.inner.bias
            raise error

    model = Fails()
    before, inner = snapshot(model), list(model.inner)
    with pytest.raises(error):
        functional_call(model, doubled(model), mx.ones((2, 2)))
    assert snapshot(model) == before and list(model.inner) == inner
    assert model.calls == 0 and "new" not in model and len(model.seen) == 1


def test_tied_arrays_stay_tied():
    model = nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 4, bias=False))
    model.layers[1].weight = model.layers[0].weight
    new = mx.random.normal((4, 3))
    ids = mx.array([1, 2])
    got = functional_call(model, {"layers.0.weight": new}, ids)
    close(got, new[ids] @ new.T)
    both = {"layers.0.weight": new, "layers.1.weight": 2 * new}
    close(functional_call(model, both, ids), 2 * new[ids] @ new.T)


def test_under_transforms():
    model, loss, (x, y) = mixed_case()
    parameters = model.trainable_parameters()

    def of(p, x, y):
        return nn.losses.cross_entropy(functional_call(model, p, x), y, reduction="mean")

    before = snapshot(model)
    per_sample = vmap(grad(of), in_axes=(None, 0, 0))
    got = dict(tree_flatten(per_sample(parameters, x, y)))
    compiled = dict(tree_flatten(mx.compile(per_sample)(parameters, x, y)))
    assert snapshot(model) == before
    for i in range(len(x)):
        for name, want in tree_flatten(nn.value_and_grad(model, loss)(model, x[i], y[i])[1]):
            close(got[name][i], want, 1e-4)
            close(compiled[name][i], want, 1e-4)
    w = model.layers[0].weight
    tangent = jvp(lambda w: of({"layers.0.weight": w}, x, y), [w], [w])[1][0]
    want = (mx.grad(lambda w: of({"layers.0.weight": w}, x, y))(w) * w).sum()
    close(tangent, want, 1e-4)


@pytest.mark.parametrize(
    "parameters, words",
    [
        ({"wrong": mx.zeros(2)}, ["'wrong'", "weight, bias"]),
        ({"weight": mx.zeros(2)}, ["'weight'", "(3, 2)", "(2,)"]),
        ({"weight": 1.0}, ["'weight'", "1.0"]),
        ({"weight": {"a": mx.zeros(2)}}, ["'weight'"]),
    ],
)
def test_errors(parameters, words):
    with pytest.raises(ValueError) as raised:
        functional_call(nn.Linear(2, 3), parameters, mx.ones((1, 2)))
    for word in words:
        assert word in str(raised.value)


# Several models --------------------------------------------------------------------------------


def test_stack_and_map():
    models = [Mixed() for _ in range(3)]
    parameters, state = stack_module_state(models)
    assert set(dict(tree_flatten(state))) == {"last.weight"}
    names = [name for name, _ in tree_flatten(models[0].trainable_parameters())]
    assert [name for name, _ in tree_flatten(parameters)] == names
    x = mx.random.randint(0, 11, (3, 4))

    def call(p, s, x):
        return functional_call(models[0], (p, s), x)

    close(vmap(call)(parameters, state, x), mx.stack([m(row) for m, row in zip(models, x)]))
    close(vmap(call, in_axes=(0, 0, None))(parameters, state, x), mx.stack([m(x) for m in models]))


def test_what_all_share_is_not_stacked():
    base = LoRA()
    models = [LoRA() for _ in range(3)]
    for model in models:
        model.linear = base.linear
    parameters, state = stack_module_state(models)
    assert set(dict(tree_flatten(parameters))) == {"lora_a", "lora_b"}
    assert not tree_flatten(state)
    x = mx.random.normal((2, 64))
    got = vmap(lambda p: functional_call(models[0], p, x))(parameters)
    close(got, mx.stack([m(x) for m in models]), 1e-4)
    close(ensemble(models)(x), mx.stack([m(x) for m in models]), 1e-4)


def test_models_that_differ():
    frozen = nn.Linear(2, 3)
    frozen.freeze()
    for other, words in (
        (nn.Linear(2, 4), ["'weight'", "(3, 2)", "(4, 2)", "model 1"]),
        (nn.Linear(2, 3, bias=False), ["model 1", "other parameters"]),
        (nn.RMSNorm(3), ["RMSNorm", "Linear"]),
        (frozen, ["frozen"]),
    ):
        with pytest.raises(ValueError) as raised:
            stack_module_state([nn.Linear(2, 3), other])
        for word in words:
            assert word in str(raised.value), raised.value
    with pytest.raises(ValueError, match="at least one"):
        stack_module_state([])


def test_an_ensemble_is_a_module_that_learns():
    models = [nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1)) for _ in range(3)]
    before = [snapshot(m) for m in models]
    together = ensemble(models)
    x, y = mx.random.normal((16, 2)), mx.random.normal((16, 1))
    close(together(x), mx.stack([m(x) for m in models]))

    def loss(model, x, y):
        return (model(x) - y).square().mean(axis=(-1, -2)).sum()

    value, grads = nn.value_and_grad(together, loss)(together, x, y)
    flat = dict(tree_flatten(grads))
    for i, m in enumerate(models):
        for name, want in tree_flatten(module_value_and_grad(m, loss)(m, x, y)[1]):
            close(flat[f"members.{name}"][i], want, 1e-4)
    together.update(tree_map(lambda p, g: p - 0.05 * g, together.trainable_parameters(), grads))
    assert loss(together, x, y) < value
    assert [snapshot(m) for m in models] == before
    each = ensemble(models, in_axes=0)(mx.stack([x, 2 * x, 3 * x]))
    close(each, mx.stack([m((i + 1) * x) for i, m in enumerate(models)]), 1e-4)


def test_members_called_again_and_again():
    models = [nn.QuantizedLinear.from_linear(nn.Linear(32, 8), 32, 4) for _ in range(3)]
    together = ensemble(models)
    for size, axis in ((4, None), (4, None), (4, None), (4, None), (2, None), (3, 0), (4, None)):
        x = mx.random.normal((size, 32))
        together.in_axes = axis
        inputs = [x] * 3 if axis is None else list(x)
        close(together(x), mx.stack([m(a) for m, a in zip(models, inputs)]), 1e-4)


def test_an_ensemble_is_copied_and_pickled_after_a_call():
    together = ensemble([nn.Linear(2, 3) for _ in range(3)])
    x = mx.random.normal((4, 2))
    want = together(x)
    for copied in (copy.deepcopy(together), pickle.loads(pickle.dumps(together))):
        assert mx.array_equal(copied(x), want)


def test_dropout_of_members():
    models = [nn.Sequential(nn.Linear(4, 64), nn.Dropout(0.5)) for _ in range(2)]
    for m in models[1:]:
        m.update(models[0].parameters())
    together = ensemble(models)
    x = mx.ones((4,))
    a, b = together(x)
    assert not mx.array_equal(a, b)
    together.eval()
    a, b = together(x)
    assert mx.array_equal(a, b) and models[0].training


def test_modules_as_arguments_of_grad():
    model, loss, (x, y) = mixed_case(frozen=False)
    before = snapshot(model)
    value, grads = value_and_grad(loss)(model, x[0], y[0])
    assert snapshot(model) == before
    want_value, want = module_value_and_grad(model, loss)(model, x[0], y[0])
    assert snapshot(model) == before
    close(value, want_value)
    got = dict(tree_flatten(grads))
    for name, g in tree_flatten(want):
        close(got[name], g)


def test_nn_comes_when_it_is_asked_for():
    code = (
        "import sys, mlxshim; before = 'mlx.nn' in sys.modules; mlxshim.nn.ensemble; "
        "print(before, hasattr(mlxshim, 'no_such_name'))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
