"""The arguments of a per-sample call, and one run of the loss over some of the samples."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..core.errors import NoBatchingRule, PerformanceWarning
from ..transforms import _chunks
from ..transforms._mapping import Inputs
from ..transforms.autodiff import value_and_grad
from ..transforms.vmap import vmap
from . import _layers, _nodes, _parts, _state, _tape

Loss = Callable[..., Any]


class _Held:
    """A module among the arguments: nothing to map, and not to be copied."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module


class Traces:
    """What the calls of one per-sample function share: a vmap, which learns from its traces, and
    what the model is made of."""

    def __init__(self) -> None:
        self._mapped: dict[tuple[int, ...], Callable[..., Any]] = {}
        self._layout: tuple[_state.Layout, _layers.Known] | None = None

    def layout(self, model: nn.Module) -> tuple[_state.Layout, _layers.Known]:
        """What the model is made of, and the layers in it whose calls are known."""
        found = self._layout
        if found is None or not found[0].fits():
            layout = _state.Layout(model)
            found = self._layout = layout, _layers.known(layout.nodes)
        return found

    def of(self, axes: list[int]) -> Callable[..., Any]:
        found = self._mapped.get(tuple(axes))
        if found is None:
            in_axes = (0, list(axes))
            found = self._mapped[tuple(axes)] = vmap(_one, in_axes=in_axes, fallback="error")
        return found


def _one(parameters: list[mx.array], arrays: list[mx.array]) -> Any:
    """The loss of one sample, as the tape that runs has it."""
    tape = _nodes.running()
    assert tape is not None
    return tape.sample(parameters, arrays)


class Samples:
    """One call's arguments, the mapped ones taken apart."""

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Loss,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        in_axes: Any,
        keepdims: bool,
        traces: Traces,
    ) -> None:
        self.model, self.loss_fn, self.keepdims = model, loss_fn, keepdims
        self.traces = traces
        self.inputs = Inputs(
            loss_fn,
            tuple(_hold(arg) for arg in args),
            {key: _hold(arg) for key, arg in kwargs.items()},
            in_axes,
        )
        self.size = self.inputs.size
        self.layout, self._known = traces.layout(model)
        self.places = self.layout.places
        if not self.places.unique:
            raise ValueError(
                "The model has no trainable parameters: all are frozen, or there are none."
            )

    def call(self, arrays: tuple[mx.array, ...]) -> Any:
        """The loss of one sample, whose mapped arrays are these."""
        if self.keepdims:
            arrays = tuple(mx.expand_dims(x, a) for x, a in zip(arrays, self.inputs.axes))
        args, kwargs = self.inputs.fill(arrays)
        return self.loss_fn(
            *(_give(arg) for arg in args), **{key: _give(arg) for key, arg in kwargs.items()}
        )

    def run(self, start: int = 0, stop: int | None = None) -> _parts.Run:
        """Losses and what the gradients are made of, for samples start to stop."""
        stop = self.size if stop is None else stop
        everything = start == 0 and stop == self.size
        arrays = self.inputs.arrays if everything else self.inputs.part(start, stop)
        if self.size == 0:
            # Shapes and dtypes come from one sample of zeros.
            shapes = [
                (*x.shape[:a], 1, *x.shape[a + 1 :]) for x, a in zip(arrays, self.inputs.axes)
            ]
            run = self._batched([mx.zeros(s, x.dtype) for s, x in zip(shapes, arrays)], 1)
            return _parts.Run(_none_of(run.results), run.parameters, 0)
        try:
            return self._batched(arrays, stop - start)
        except NoBatchingRule as e:
            warnings.warn(
                f"The loss runs sample by sample, for {str(e).removeprefix('[vmap] ')}",
                PerformanceWarning,
                stacklevel=4,
            )
        return self._looped(arrays, stop - start)

    def _batched(self, arrays: list[mx.array], size: int) -> _parts.Run:
        run, tape = self._recorded(arrays, size, self.layout.by_copies)
        if tape.surprised:
            run, tape = self._recorded(arrays, size, None)
        self.layout.by_copies = (self.layout.by_copies or set()) | tape.by_copies()
        return run

    def _recorded(
        self, arrays: list[mx.array], size: int, by_copies: set[int] | None
    ) -> tuple[_parts.Run, _tape.Tape]:
        tape = _tape.Tape(self.places.unique, size, _nodes.depth(), by_copies)
        mapped = self.traces.of(self.inputs.axes)
        results: list[Any] = []

        # A checkpointed layer is called again in the backward pass.
        with _state.untouched(self.layout) as before:
            # No argument of what is mapped: MLX takes those as they are, if they are all arrays.
            tape.sample = functools.partial(self._one, tape, before)

            def body(parameters: list[mx.array]) -> mx.array:
                results.append(mapped(parameters, arrays))
                return _loss_of(results[-1]).astype(mx.float32)

            tape.run(body)
        return _parts.Run(results[-1], tape.parameters, size), tape

    def _one(
        self,
        tape: _tape.Tape,
        before: _state.Snapshot,
        parameters: list[mx.array],
        arrays: list[mx.array],
    ) -> Any:
        """The loss of one sample, its copies of the parameters in the model."""
        try:
            with _layers.watched(self._known):
                for place, x in zip(self.places.unique, parameters):
                    place.owner[place.key] = x
                tape.hold(parameters)
                try:
                    result = self.call(tuple(arrays))
                finally:
                    tape.release()
        finally:
            before.restore()
        _check_loss(result)
        return result

    def _looped(self, arrays: list[mx.array], size: int) -> _parts.Run:
        _chunks.wait()  # the loss reads values
        places = self.places.unique
        values = [place.get() for place in places]
        results, gradients = [], []
        for i in range(size):
            samples = tuple(mx.take(x, i, axis=a) for x, a in zip(arrays, self.inputs.axes))

            def one(parameters: list[mx.array], samples: Any = samples) -> Any:
                with _state.untouched(self.model), _state.substituted(places, parameters):
                    result = self.call(samples)
                _check_loss(result)
                return result

            with _state.untouched(self.model):
                result, grads = value_and_grad(one)(values)
            results.append(result)
            gradients.append(grads)
        tape = _tape.Tape(places, size, 0)
        for parameter, found in zip(tape.parameters, zip(*gradients)):
            parameter.direct = mx.stack(list(found))
        return _parts.Run(_stacked(results), tape.parameters, size)

    def chunks(self, chunk_size: int | None) -> Iterator[tuple[int, int]]:
        step = chunk_size or max(self.size, 1)
        for start in range(0, max(self.size, 1), step):
            yield start, min(start + step, self.size)


def _hold(arg: Any) -> Any:
    if isinstance(arg, nn.Module):
        return _Held(arg)
    if type(arg) in (list, tuple):
        return type(arg)(_hold(child) for child in arg)
    if type(arg) is dict:
        return {key: _hold(child) for key, child in arg.items()}
    return arg


def _give(arg: Any) -> Any:
    if isinstance(arg, _Held):
        return arg.module
    if type(arg) in (list, tuple):
        return type(arg)(_give(child) for child in arg)
    if type(arg) is dict:
        return {key: _give(child) for key, child in arg.items()}
    return arg


def _loss_of(result: Any) -> mx.array:
    return result[0] if isinstance(result, (tuple, list)) else result


def _check_loss(result: Any) -> None:
    loss = result
    if isinstance(result, (tuple, list)) and len(result):
        loss = result[0]
    if not isinstance(loss, mx.array) or loss.ndim:
        what = (
            f"an array of shape {tuple(loss.shape)}"
            if isinstance(loss, mx.array)
            else f"a {type(loss).__name__}"
        )
        raise ValueError(
            "The loss of one sample must be a scalar array, or a tuple that begins with one; "
            f"found {what}."
        )


def _none_of(results: Any) -> Any:
    if isinstance(results, mx.array):
        return results[:0]
    if isinstance(results, dict):
        return {key: _none_of(r) for key, r in results.items()}
    return type(results)(_none_of(r) for r in results) if results is not None else None


def _stacked(results: list[Any]) -> Any:
    first = results[0]
    if isinstance(first, mx.array):
        return mx.stack(results)
    if isinstance(first, dict):
        return {key: _stacked([r[key] for r in results]) for key in first}
    if isinstance(first, (list, tuple)):
        columns = [_stacked(list(column)) for column in zip(*results)]
        return type(first)(columns)
    return first
