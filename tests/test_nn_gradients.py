"""value_and_grad and per_sample_value_and_grad against MLX's own, sample by sample."""

from __future__ import annotations

import gc

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from nn_models import (
    CASES,
    Mixed,
    close,
    close_trees,
    cross_entropy,
    dense_case,
    loop,
    mixed_case,
    snapshot,
    squares,
)

import mlxshim
from mlxshim.nn import (
    clipped_grad,
    functional_call,
    per_sample_norms,
    per_sample_value_and_grad,
    value_and_grad,
)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("form", ["plain", "compiled", "chunked", "no model argument"])
def test_as_the_loop(name, form):
    model, loss, data = CASES[name]()
    before = snapshot(model)
    chunk_size = 2 if form == "chunked" else None
    if form == "no model argument":
        got = per_sample_value_and_grad(model, lambda x, y: loss(model, x, y))(*data)
    else:
        fun = per_sample_value_and_grad(model, loss, chunk_size=chunk_size)
        run = mx.compile(lambda *data: fun(model, *data)) if form == "compiled" else None
        got = run(*data) if run else fun(model, *data)
    assert snapshot(model) == before
    losses, grads = loop(model, loss, data)
    close(got[0], losses)
    close_trees(got[1], grads)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_precision(dtype):
    model, loss, data = mixed_case()
    model.set_dtype(dtype)
    got = per_sample_value_and_grad(model, loss)(model, *data)
    model.set_dtype(mx.float32)
    losses, grads = loop(model, loss, data)
    for name, g in tree_flatten(got[1]):
        assert g.dtype == dtype
        close(g.astype(mx.float32), grads[name], 0.06)
    close(got[0].astype(mx.float32), losses, 0.02)


def test_value_and_grad_as_mlx():
    model, loss, (x, y) = mixed_case()
    before = snapshot(model)
    value, grads = value_and_grad(model, loss)(model, x, y)
    assert snapshot(model) == before
    want, want_grads = nn.value_and_grad(model, loss)(model, x, y)
    close(value, want)
    close_trees(grads, dict(tree_flatten(want_grads)))
    with pytest.raises(RuntimeError):
        value_and_grad(model, lambda m: 1 / 0 if m.training is None else _raise())(model)
    assert all(isinstance(x, mx.array) for _, x in tree_flatten(model.parameters()))


def _raise():
    raise RuntimeError


def test_statistics_change_as_under_mlx():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm(4))
    value_and_grad(model, lambda m, x: m(x).sum())(model, mx.random.normal((8, 3)))
    assert float(mx.abs(model.layers[1].running_mean).max()) > 0


def test_a_loss_written_for_a_batch():
    model = nn.Sequential(nn.Conv1d(3, 4, 3), nn.ReLU())

    def loss(model, x, y):
        assert x.shape[0] == y.shape[0] == 1 and x.ndim == 3
        return ((model(x).mean(axis=(1, 2)) - y) ** 2).mean()

    x, y = mx.random.normal((4, 9, 3)), mx.random.normal((4,))
    got = per_sample_value_and_grad(model, loss, keepdims=True)(model, x, y)
    losses, grads = loop(model, loss, (x[:, None], y[:, None]))
    close(got[0], losses)
    close_trees(got[1], grads)


def test_axes_and_keywords():
    model, _, (x, y) = dense_case()
    scale = mx.array(3.0)

    def loss(model, x, scale, *, y, power):
        return ((model(x) - y) ** power).sum() * scale

    fun = per_sample_value_and_grad(model, loss, in_axes=(None, 1, None))
    got = fun(model, x.T, scale, y=y, power=2)
    losses, grads = loop(model, lambda m, x, y: loss(m, x, scale, y=y, power=2), (x, y))
    close(got[0], losses)
    close_trees(got[1], grads)
    # The axes of what follows a module need not be written one by one.
    again = per_sample_value_and_grad(model, squares, 0)(model, x, y)
    assert again[0].shape == (6,)


def test_called_again_and_again():
    """The later traces rest on what the earlier ones noted: of another case, other sizes, axes."""
    model, loss, data = CASES["lora"](6)

    def either(model, x, y):
        return loss(model, x, y) if bent["so"] else loss(model, mx.tanh(model(x)), 2 * y)

    fun, bent = per_sample_value_and_grad(model, either), {"so": True}
    before = snapshot(model)
    for size, so in ((6, True), (6, True), (6, True), (6, True), (6, False), (3, False), (6, True)):
        bent["so"] = so
        some = tuple(x[:size] for x in data)
        losses, grads = loop(model, either, some)
        got = fun(model, *some)
        close(got[0], losses)
        close_trees(got[1], grads)
        assert snapshot(model) == before


@pytest.mark.parametrize("what", ["value_and_grad", "per sample", "norms", "clipped"])
def test_nothing_waits_for_the_garbage_collector(what):
    """Gradients of samples are large: once nobody has them their memory is free."""
    model, loss, data = mixed_case()
    fun = {
        "value_and_grad": value_and_grad(model, loss),
        "per sample": per_sample_value_and_grad(model, loss),
        "norms": per_sample_norms(model, loss, per_layer=True),
        "clipped": clipped_grad(model, loss, 0.5, chunk_size=2),
    }[what]

    def run():
        mx.eval(fun(model, *data))
        mx.synchronize()

    for _ in range(4):  # what is kept for later calls
        run()
    gc.collect()
    gc.disable()
    try:
        before = mx.get_active_memory()
        run()
        assert mx.get_active_memory() == before
    finally:
        gc.enable()


def test_auxiliary_outputs_and_another_model():
    student, _, (x, _) = dense_case()
    teacher, _, _ = dense_case()

    def loss(models, x):
        a, b = models["student"](x), models["teacher"](x)
        return (a - b).square().sum(), {"a": a, "both": [a, b]}

    fun = per_sample_value_and_grad(student, loss)
    for chunk_size in (None, 4):
        fun = per_sample_value_and_grad(student, loss, chunk_size=chunk_size)
        (losses, aux), grads = fun({"student": student, "teacher": teacher}, x)
        want, want_grads = loop(student, lambda m, x: squares(m, x, teacher(x)), (x,))
        close(losses, want)
        close_trees(grads, want_grads)
        close(aux["a"], student(x))
        close(aux["both"][1], teacher(x))


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(3, 3)
        self.b = self.a
        self.c = nn.Linear(3, 3, bias=False)
        self.c.weight = self.a.weight

    def __call__(self, x):
        return self.c(mx.tanh(self.b(mx.tanh(self.a(x)))))


def test_shared_modules_and_arrays():
    model = Shared()
    data = (mx.random.normal((4, 3)), mx.random.normal((4, 3)))
    before = snapshot(model)
    got = per_sample_value_and_grad(model, squares)(model, *data)
    assert snapshot(model) == before
    losses, grads = loop(model, squares, data)
    close(got[0], losses)
    close_trees(got[1], grads)


class Direct(nn.Module):
    """Parameters used in ways that no layer knows, beside the known ones."""

    def __init__(self):
        super().__init__()
        self.embed, self.linear = nn.Embedding(7, 4), nn.Linear(4, 4)
        self.position = nn.Embedding(3, 4)
        self.bare = [mx.random.normal((4,)), {"scale": mx.array(0.5)}]
        self.unused = nn.Linear(2, 2)

    def __call__(self, ids):
        h = self.embed(ids) + self.position(mx.arange(3))
        h = self.linear(h) * self.bare[0] + h @ self.linear.weight + self.bare[1]["scale"]
        decay = sum(x.square().sum() for _, x in tree_flatten(self.trainable_parameters()))
        return h @ self.embed.weight.T + 0.1 * decay


def test_parameters_used_by_hand_too():
    model, ids = Direct(), mx.random.randint(0, 7, (4, 3))
    got = per_sample_value_and_grad(model, cross_entropy)(model, ids, ids)
    losses, grads = loop(model, cross_entropy, (ids, ids))
    close(got[0], losses)
    close_trees(got[1], grads)


class Normalised(nn.Linear):
    """A layer that changes its own weight before it calls the one it is made of."""

    def __call__(self, x):
        weight = self.weight
        self.weight = weight / mx.linalg.norm(weight, axis=1, keepdims=True)
        y = super().__call__(x)
        self.weight = weight
        return y


def test_parameters_used_by_hand_now_and_then():
    model, x = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)), mx.random.normal((4, 3))
    by_hand = []

    def loss(model, x):
        return model(x).square().sum() + sum(model.layers[i].weight.square().sum() for i in by_hand)

    fun = per_sample_value_and_grad(model, loss)
    for by_hand[:] in [], [], [1], [], [0], [0, 1], []:
        losses, grads = fun(model, x)
        want, want_grads = loop(model, loss, (x,))
        close(losses, want)
        close_trees(grads, want_grads)


def test_a_weight_that_is_exchanged_on_the_way():
    model = nn.Sequential(Normalised(3, 4), nn.Tanh(), Normalised(4, 2))
    data = (mx.random.normal((5, 3)), mx.random.normal((5, 2)))
    got = per_sample_value_and_grad(model, squares)(model, *data)
    losses, grads = loop(model, squares, data)
    close(got[0], losses)
    close_trees(got[1], grads)


def test_checkpointed_layers():
    model, loss, data = mixed_case()

    class Checkpointed(nn.Linear):
        def __call__(self, x):
            def inner(parameters, x):
                self.update(parameters)
                return nn.Linear.__call__(self, x)

            return mx.checkpoint(inner)(self.trainable_parameters(), x)

    model.layers[1] = Checkpointed(8, 8)
    got = per_sample_value_and_grad(model, loss)(model, *data)
    losses, grads = loop(model, loss, data)
    close(got[0], losses)
    close_trees(got[1], grads)


def test_a_derivative_inside_the_loss():
    """A gradient penalty, and a vmap of its own around the layers."""
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))

    def loss(model, x):
        slope = mlxshim.grad(lambda x: model(x).sum())(x)
        push = mlxshim.jvp(lambda x: model(x), [x], [mx.ones_like(x)])[1][0]
        rows = mlxshim.vmap(model)(mx.stack([x, 2 * x]))
        return slope.square().sum() + push.square().sum() + rows.square().sum() + model(x).sum()

    x = mx.random.normal((4, 3))
    got = per_sample_value_and_grad(model, loss)(model, x)
    losses, grads = loop(model, loss, (x,))
    close(got[0], losses)
    close_trees(got[1], grads, 1e-4)


def test_inside_other_transforms():
    model, loss, (x, y) = dense_case()
    weight = model.layers[0].weight

    def norms(weight, x, y):
        def call(x, y):
            return loss(model, x, y)

        model.layers[0].weight = weight
        grads = per_sample_value_and_grad(model, call)(x, y)[1]
        return sum(g.square().sum() for _, g in tree_flatten(grads))

    def by_loop(weight, x, y):
        def one(p, x, y):
            return ((functional_call(model, p, x) - y) ** 2).sum()

        p = {**model.trainable_parameters()}
        p["layers"] = [{**p["layers"][0], "weight": weight}, *p["layers"][1:]]
        found = [tree_flatten(mx.grad(one)(p, a, b)) for a, b in zip(x, y)]
        return sum(g.square().sum() for grads in found for _, g in grads)

    got = mlxshim.value_and_grad(norms)(weight, x, y)
    model.layers[0].weight = weight
    want = mx.value_and_grad(by_loop)(weight, x, y)
    close(got[0], want[0], 1e-4)
    close(got[1], want[1], 1e-4)
    weights = mx.stack([weight, 2 * weight])
    mapped = mlxshim.vmap(norms, in_axes=(0, None, None))(weights, x, y)
    model.layers[0].weight = weight
    close(mapped, mx.stack([by_loop(w, x, y) for w in weights]), 1e-4)


def test_dropout_is_each_samples_own():
    model = nn.Sequential(nn.Linear(4, 64), nn.Dropout(0.5))
    x = mx.broadcast_to(mx.ones((4,)), (3, 4))
    _, grads = per_sample_value_and_grad(model, lambda m, x: m(x).sum())(model, x)
    bias = grads["layers"][0]["bias"]
    assert not mx.array_equal(bias[0], bias[1])


def test_what_has_no_rule_runs_as_a_loop():
    model, _, (x, y) = dense_case()

    def loss(model, x, y):
        return squares(model, x, y) if x.sum().item() > -1e9 else squares(model, x, 2 * y)

    with pytest.warns(mlxshim.PerformanceWarning, match="sample by sample"):
        got = per_sample_value_and_grad(model, loss)(model, x, y)
    losses, grads = loop(model, squares, (x, y))
    close(got[0], losses)
    close_trees(got[1], grads)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_untouched_whatever_happens(error):
    model, _, data = mixed_case()
    before = snapshot(model)

    def loss(model, x, y):
        model(x)
        model.extra, model.layers[0].weight = x, y
        raise error

    with pytest.raises(error):
        per_sample_value_and_grad(model, loss)(model, *data)
    assert snapshot(model) == before and "extra" not in model


def test_errors():
    model, loss, (x, y) = dense_case()
    fun = per_sample_value_and_grad(model, loss)
    with pytest.raises(ValueError, match=r"x: shape \(6, 5\).*\n.*y: shape \(5, 2\)"):
        fun(model, x, y[:5])
    with pytest.raises(ValueError, match=r"scalar.*\(2,\)"):
        per_sample_value_and_grad(model, lambda m, x, y: m(x) - y)(model, x, y)
    with pytest.raises(ValueError, match="Nothing is mapped"):
        fun(model, 1.0, 2.0)
    model.freeze()
    with pytest.raises(ValueError, match="no trainable parameters"):
        fun(model, x, y)


def test_no_samples_and_one():
    model, loss, (x, y) = mixed_case()
    losses, grads = per_sample_value_and_grad(model, loss)(model, x[:1], y[:1])
    want, want_grads = loop(model, loss, (x[:1], y[:1]))
    close(losses, want)
    close_trees(grads, want_grads)
    losses, grads = per_sample_value_and_grad(model, loss)(model, x[:0], y[:0])
    assert losses.shape == (0,)
    assert all(g.shape[0] == 0 for _, g in tree_flatten(grads))


def test_ensembles_of_models_have_samples_too():
    models = [Mixed() for _ in range(2)]
    from mlxshim.nn import ensemble

    together = ensemble(models)
    ids = mx.random.randint(0, 11, (3, 5))

    def loss(model, x):
        return nn.losses.cross_entropy(model(x), mx.stack([x, x]), reduction="mean")

    got = per_sample_value_and_grad(together, loss)(together, ids)
    losses, grads = loop(together, loss, (ids,))
    close(got[0], losses)
    close_trees(got[1], grads, 1e-4)


def test_a_gradient_inside_the_loss_of_layers_with_biases():
    """Their rules inside a vmap, a gradient and a tangent that are within the loss."""
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 1))
    data = mx.random.normal((5, 3, 4)), mx.random.normal((5, 3, 4))

    def loss(model, x, v):
        slope = lambda x: mlxshim.grad(lambda x: model(x).sum())(x).square().sum()  # noqa: E731
        along = mlxshim.jvp(lambda x: model(x).sum(), (x[0],), (v[0],))[1]
        return mlxshim.vmap(slope)(x).sum() + along.square()

    got = per_sample_value_and_grad(model, loss)(model, *data)
    want = loop(model, loss, data)
    close(got[0], want[0])
    close_trees(got[1], want[1], 1e-4)


class Written(nn.LayerNorm):
    """The same from plain operations."""

    def __call__(self, x):
        x = x - x.mean(axis=-1, keepdims=True)
        x = x * mx.rsqrt(x.square().mean(axis=-1, keepdims=True) + self.eps)
        return x * self.weight + self.bias


@pytest.mark.parametrize("width", [6, 7, 8])
@pytest.mark.parametrize("inner", [False, True])
def test_widths_whose_norm_mlx_differentiates_wrongly(width, inner):
    """On CUDA, where the rows are no multiple of 16 bytes."""

    def loss(model, x):
        if inner:
            return mlxshim.grad(lambda x: model(x).square().sum())(x).square().sum()
        return model(x).square().sum()

    known = nn.Sequential(nn.Linear(4, width), nn.LayerNorm(width), nn.Linear(width, 3))
    plain = nn.Sequential(nn.Linear(4, width), Written(width), nn.Linear(width, 3))
    known.layers[1].update({"weight": mx.random.normal((width,))})
    plain.update(known.parameters())
    x = mx.random.normal((5, 2, 4))
    losses, grads = per_sample_value_and_grad(known, loss)(known, x)
    want = loop(plain, loss, (x,))
    close(losses, want[0], 1e-4)
    close_trees(grads, want[1], 1e-4)
