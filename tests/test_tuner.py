"""mlx-lm's LoRA trainer inside patched(): the losses and adapters it has without."""

from __future__ import annotations

import os

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten

import mlxshim

try:
    from mlx_lm.tuner import trainer
    from mlx_lm.tuner.callbacks import TrainingCallback
    from mlx_lm.tuner.utils import linear_to_lora_layers
except (ImportError, AttributeError) as e:  # a newer mlx-lm asks an old MLX for what it lacks
    pytest.skip(f"mlx-lm is not here, or not for this MLX: {e}", allow_module_level=True)
from architectures.configurations import build

LORA = {"rank": 2, "scale": 4.0, "dropout": 0.0}
STEPS = 3


class Losses(TrainingCallback):
    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_loss_report(self, train_info):
        self.losses.append(train_info["train_loss"])


@pytest.fixture(autouse=True)
def _interpreted():
    """The trainer compiles its step: on a CPU that is a call of a C++ compiler for each kernel."""
    mx.disable_compile()
    yield
    mx.enable_compile()


def tuned(bits: int | None):
    """Grouped-query attention of 4 heads over 2, adapters on the last layer, in 4 bits or not."""
    mx.random.seed(7)
    model = build("llama")
    if bits:
        nn.quantize(model, 32, bits)
    model.freeze()
    linear_to_lora_layers(model, 1, LORA)
    return model


def train(
    model, folder, checkpoint: bool, loss=None, optimizer=None
) -> tuple[list[float], dict[str, mx.array]]:
    rng = np.random.default_rng(0)
    rows = [(rng.integers(1, 64, 5 + n).tolist(), n % 3) for n in range(4)]
    seen = Losses()
    mx.random.seed(1)
    np.random.seed(1)
    args = trainer.TrainingArgs(
        batch_size=2,
        iters=STEPS,
        steps_per_report=1,
        max_seq_length=12,
        adapter_file=str(folder / "adapters.safetensors"),
        grad_checkpoint=checkpoint,
    )
    loss = loss or trainer.default_loss
    optimizer = optimizer or optim.Adam(1e-2)
    trainer.train(model, optimizer, rows, args=args, loss=loss, training_callback=seen)
    return seen.losses, dict(tree_flatten(model.trainable_parameters()))


@pytest.fixture
def unchecked(monkeypatch):
    """Checkpointing replaces the call of the class of the layers: put back in the end."""
    layer = type(build("llama").layers[0])
    monkeypatch.setattr(layer, "__call__", layer.__call__)
    return layer, layer.__call__


def equal(got, want):
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
    assert len(want[0]) == STEPS and want[0][0] != want[0][-1]
    assert got[1].keys() == want[1].keys()
    for name, x in want[1].items():
        np.testing.assert_allclose(got[1][name], x, rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("bits", [None, 4])
def test_lora_training(bits, checkpoint, unchecked, tmp_path, monkeypatch):
    want = train(tuned(bits), tmp_path, checkpoint)
    layer, call = unchecked
    monkeypatch.setattr(layer, "__call__", call)
    with mlxshim.patched():
        got = train(tuned(bits), tmp_path, checkpoint)
    equal(got, want)


@pytest.mark.skipif(
    mx.default_device() == mx.cpu and "MLXSHIM_SLOW" not in os.environ,
    reason="some forty kernels for a C++ compiler, a minute; MLXSHIM_SLOW=1 runs it",
)
def test_lora_training_compiled(unchecked, tmp_path):
    mx.enable_compile()
    want = train(tuned(4), tmp_path, False, optimizer=optim.SGD(0.5))
    with mlxshim.patched():
        got = train(tuned(4), tmp_path, False, optimizer=optim.SGD(0.5))
    equal(got, want)


def by_sample(over):
    """The trainer's loss of each row alone, the hardest weighed most."""

    def loss(model, batch, lengths):
        def one(row, length):
            return trainer.default_loss(model, row[None], length[None])

        losses, tokens = over(one)(batch, lengths)
        weights = mx.softmax(mx.stop_gradient(losses))
        return (weights * losses).sum(), tokens.sum()

    return loss


def looped(one):
    def each(*arrays):
        outputs = [one(*xs) for xs in zip(*arrays)]
        return [mx.stack(list(column)) for column in zip(*outputs)]

    return each


@pytest.mark.parametrize("checkpoint", [False, True])
def test_a_loss_of_every_sample(checkpoint, unchecked, tmp_path, monkeypatch):
    """A quantized model under vmap in the loss: MLX's own has no rule for it."""
    # (Adam's step of a gradient that is next to nothing has the size of its rounding.)
    want = train(tuned(4), tmp_path, checkpoint, by_sample(looped), optim.SGD(0.5, 0.9))
    layer, call = unchecked
    monkeypatch.setattr(layer, "__call__", call)
    with mlxshim.patched():
        mapped = by_sample(lambda one: mx.vmap(one))
        got = train(tuned(4), tmp_path, checkpoint, mapped, optim.SGD(0.5, 0.9))
    equal(got, want)


@pytest.mark.parametrize("checkpoint", [False, True])
def test_gradients_of_every_sample(checkpoint, unchecked):
    model = tuned(4)
    if checkpoint:
        trainer.grad_checkpoint(model.layers[0])
    batch = mx.random.randint(1, 64, (3, 8))
    lengths = mx.array([[0, 7], [2, 7], [0, 4]])
    parameters = model.trainable_parameters()

    def loss(parameters, row, length):
        model.update(parameters)
        return trainer.default_loss(model, row[None], length[None])[0]

    want = [mx.grad(loss)(parameters, *xs) for xs in zip(batch, lengths)]
    with mlxshim.patched():
        got = mx.vmap(mx.grad(loss), in_axes=(None, 0, 0))(parameters, batch, lengths)
    for i, one in enumerate(want):
        for (name, g), (_, w) in zip(tree_flatten(got), tree_flatten(one)):
            np.testing.assert_allclose(g[i], w, rtol=1e-4, atol=1e-5, err_msg=name)
    model.update(parameters)
