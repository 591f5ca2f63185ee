"""Norms and rope through the rules that a GPU has, on whatever device there is."""

from __future__ import annotations

import mlx.core as mx
import pytest

import mlxshim
from mlxshim.rules import norms, positions
from mlxshim.testing import check


@pytest.fixture(autouse=True)
def everywhere(monkeypatch):
    for rules in (norms, positions):
        monkeypatch.setattr(
            rules,
            "_fuses",
            lambda stack, stream: (
                "vmap" in stack and "jvp" not in stack and stack.count("grad") < 2
            ),
        )


X, W, B = mx.random.normal((2, 3, 6)), mx.random.normal((6,)), mx.random.normal((6,))
R = mx.random.normal((2, 3, 4, 6))
BOTH = {"dtypes": (mx.float32, mx.float16)}


def rope(**changes):
    static = {"dims": 6, "traditional": False, "base": 100.0, "scale": 1.0, "offset": 2, **changes}
    dims = static.pop("dims")
    return lambda x: mx.fast.rope(x, dims, **static)


CASES = {
    "rms": (lambda x, w: mx.fast.rms_norm(x, w, 1e-5), X, W),
    "rms, a row": (lambda x, w: mx.fast.rms_norm(x, w, 1e-5), W, B),
    "rms, no weight": (lambda x: mx.fast.rms_norm(x, None, 1e-5), X),
    "layer": (lambda x, w, b: mx.fast.layer_norm(x, w, b, 1e-5), X, W, B),
    "layer, no bias": (lambda x, w: mx.fast.layer_norm(x, w, None, 1e-5), X, W),
    "layer, no weight": (lambda x, b: mx.fast.layer_norm(x, None, b, 1e-5), X, B),
    "layer, plain": (lambda x: mx.fast.layer_norm(x, None, None, 1e-5), X),
    "rope": (rope(), R),
    "rope, three axes": (rope(), X),
    "rope, traditional": (rope(traditional=True, scale=0.5), R),
    "rope, half of it": (rope(dims=4), R),
    "rope, half of it, traditional": (rope(dims=4, traditional=True), R),
    "rope, frequencies": (
        lambda x, f: rope(base=None, freqs=f)(x),
        R,
        lambda: mx.random.uniform(1.0, 4.0, (3,)),
    ),
    "rope, offset": (lambda x, o: rope(offset=o)(x), R, lambda: mx.random.randint(0, 9, ())),
    "rope, offsets": (lambda x, o: rope(offset=o)(x), R, lambda: mx.random.randint(0, 9, (2,))),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_the_loop(name):
    fun, *arrays = CASES[name]
    check(fun, *arrays, **BOTH)


def count(monkeypatch, name):
    calls = []
    raw = getattr(mx.fast, name)

    def spy(x, *args, **kwargs):
        calls.append(x.shape)
        return raw(x, *args, **kwargs)

    monkeypatch.setattr(mx.fast, name, spy)
    return calls


def test_one_fused_call_for_all_samples(monkeypatch):
    xs = mx.random.normal((5, 2, 3, 6))
    calls = count(monkeypatch, "rms_norm")
    mlxshim.vmap(lambda x: mx.fast.rms_norm(x, W, 1e-5))(xs)
    mlxshim.vmap(lambda x: mx.fast.rms_norm(x, W, 1e-5), in_axes=1)(xs)
    mlxshim.vmap(lambda w: mx.fast.rms_norm(X, w, 1e-5))(mx.random.normal((5, 6)))
    assert calls == [(5, 2, 3, 6), (5, 2, 3, 6), (2, 3, 6)]
    calls = count(monkeypatch, "rope")
    mlxshim.vmap(rope())(xs)
    mlxshim.vmap(lambda x, o: rope(offset=o)(x))(xs, mx.arange(5))
    assert calls == [(5, 2, 3, 6), (10, 3, 6)]


def test_mixed_dtypes_promote_as_in_mlx():
    x, w = X.astype(mx.bfloat16), W
    want = mx.fast.rms_norm(x, w, 1e-5)
    got = mlxshim.vmap(lambda x: mx.fast.rms_norm(x, w, 1e-5))(x)
    assert got.dtype == want.dtype
    assert mx.allclose(got, want, atol=1e-5)


def test_bad_calls_are_refused_at_the_call():
    with pytest.raises(ValueError, match="weight"):
        mlxshim.vmap(lambda x: mx.fast.rms_norm(x, mx.ones(5), 1e-5))(X)
    with pytest.raises(ValueError, match="dims"):
        mlxshim.vmap(rope(dims=5))(R)
    with pytest.raises(ValueError, match="offset"):
        mlxshim.vmap(rope(offset=mx.arange(7)))(R)
