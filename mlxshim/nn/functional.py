"""Modules as functions of their arrays: `functional_call`, `stack_module_state`, `ensemble`.

Names and meaning after `torch.func`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from ..transforms.vmap import Randomness, vmap
from . import _state

Tree = Any


def functional_call(model: nn.Module, parameters: Tree, *args: Any, **kwargs: Any) -> Any:
    """`model(*args, **kwargs)` with these arrays in the place of its own.

    Args:
        model: A module. It is left as it was, whatever the call does to it or raises. No other
            thread may use it meanwhile.
        parameters: A tree such as `model.parameters()`, or a part of one; or a dict by dotted
            names (`"layers.0.weight"`); or a tuple of several of those. What it leaves out is the
            model's own. An array that the model has in several places (tied weights) is replaced in
            all of them, unless `parameters` names those too.
        *args: The model's own arguments.
        **kwargs: Likewise.

    Returns:
        What the model returns.

    Raises:
        ValueError: the model has no such array, or one of another shape.

    Example:
        >>> import mlx.core as mx
        >>> import mlx.nn as nn
        >>> from mlxshim.nn import functional_call
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> functional_call(layer, {"weight": mx.array([[1.0, 2.0]])}, mx.array([3.0, 4.0]))
        array([11], dtype=float32)

    Source: `torch.func.functional_call`.
    """
    places, values = _assignments(model, parameters)
    with _state.untouched(model), _state.substituted(places, values):
        return model(*args, **kwargs)


def _assignments(
    model: nn.Module, parameters: Tree
) -> tuple[list[_state.Location], list[mx.array]]:
    wanted: dict[tuple[int, Any], tuple[_state.Location, mx.array]] = {}
    parts = parameters if isinstance(parameters, tuple) else (parameters,)
    for part in parts:
        _assign(model, _nested(part), "", wanted)
    # Tied: the same array in places that nobody named.
    replaced = {id(at.get()): value for at, value in wanted.values()}
    for at in _state.Locations(model, _arrays_of(model)).all:
        if (id(at.owner), at.key) not in wanted and id(at.get()) in replaced:
            wanted[id(at.owner), at.key] = at, replaced[id(at.get())]
    return [at for at, _ in wanted.values()], [value for _, value in wanted.values()]


def _nested(part: Tree) -> Tree:
    """A dict by dotted names as a tree; a tree as it is."""
    if isinstance(part, dict) and any("." in key for key in part if isinstance(key, str)):
        return tree_unflatten(list(part.items()))
    return part


def _arrays_of(node: Any) -> Tree:
    """Every array of a module, those with private names too, as a tree of dicts and lists."""
    pairs = node.items() if isinstance(node, dict) else enumerate(node)
    return {
        key: child if isinstance(child, mx.array) else _arrays_of(child)
        for key, child in pairs
        if isinstance(child, (mx.array, dict, list))
    }


def _assign(owner: Any, tree: Tree, name: str, wanted: dict[Any, Any]) -> None:
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, child in pairs:
        path = f"{name}.{key}" if name else str(key)
        try:
            current = owner[key]
        except (KeyError, IndexError):
            raise ValueError(
                f"[functional_call] The model has no parameter {path!r}; {name or 'it'} has "
                f"{', '.join(map(str, _keys(owner))) or 'none'}."
            ) from None
        if not isinstance(current, mx.array):
            if not isinstance(child, (dict, list, tuple)):
                raise ValueError(
                    f"[functional_call] {path!r} is a {type(current).__name__} in the model, but "
                    f"{type(child).__name__} was given for it."
                )
            _assign(current, child, path, wanted)
            continue
        if not isinstance(child, mx.array) or child.shape != current.shape:
            shape = tuple(child.shape) if isinstance(child, mx.array) else repr(child)
            raise ValueError(
                f"[functional_call] The model's {path!r} has shape {tuple(current.shape)}, the "
                f"one given {shape}. Under vmap, map it: in_axes=0."
            )
        wanted[id(owner), key] = _state.Location(owner, key, path), child


def _keys(owner: Any) -> list[Any]:
    return list(owner) if isinstance(owner, dict) else list(range(len(owner)))


# Several models at once ------------------------------------------------------------------------


def stack_module_state(models: Sequence[nn.Module]) -> tuple[Tree, Tree]:
    """The arrays of models of one architecture, stacked, to be mapped over.

    Args:
        models: Modules with the same structure, shapes and frozen parameters.

    Returns:
        (parameters, state), trees such as `model.parameters()` with a leading axis of models:
        the trainable parameters, and whatever else differs between the models (frozen parameters,
        statistics). What is one and the same array in all models, as the quantized base that
        adapters share, is in neither: `functional_call` takes the model's own.

    Raises:
        ValueError: no models, or models that differ, saying where.

    Example:
        >>> import mlx.core as mx
        >>> import mlx.nn as nn
        >>> from mlxshim import vmap
        >>> from mlxshim.nn import functional_call, stack_module_state
        >>> models = [nn.Linear(2, 3) for _ in range(4)]
        >>> parameters, state = stack_module_state(models)
        >>> def predict(parameters, state, x):
        ...     return functional_call(models[0], (parameters, state), x)
        >>> vmap(predict, in_axes=(0, 0, None))(parameters, state, mx.ones((2,))).shape
        (4, 3)

    Source: `torch.func.stack_module_state`.
    """
    models = list(models)
    if not models:
        raise ValueError("[stack_module_state] There must be at least one model.")
    trainables = [model.trainable_parameters() for model in models]
    everything = [model.parameters() for model in models]
    _check_alike(trainables, models)
    _check_alike(everything, models)
    parameters = _stack(trainables, lambda arrays: True)
    shared_or_trained = {id(x) for tree in trainables for x in _leaves(tree)}
    state = _stack(
        everything,
        lambda arrays: (
            id(arrays[0]) not in shared_or_trained and any(x is not arrays[0] for x in arrays)
        ),
    )
    return parameters, state


def _leaves(tree: Tree) -> list[mx.array]:
    if isinstance(tree, mx.array):
        return [tree]
    children = tree.values() if isinstance(tree, dict) else tree
    return [leaf for child in children for leaf in _leaves(child)]


def _stack(trees: list[Tree], wanted: Callable[[list[mx.array]], bool]) -> Tree:
    first = trees[0]
    keys = list(first) if isinstance(first, dict) else range(len(first))
    found = {}
    for key in keys:
        children = [tree[key] for tree in trees]
        if not isinstance(children[0], mx.array):
            below = _stack(children, wanted)
            if below or not isinstance(first, dict):
                found[key] = below
        elif wanted(children):
            found[key] = mx.stack(children)
        elif not isinstance(first, dict):
            found[key] = {}
    return found if isinstance(first, dict) else list(found.values())


def _check_alike(trees: list[Tree], models: Sequence[nn.Module]) -> None:
    for n, tree in enumerate(trees[1:], 1):
        if type(models[n]) is not type(models[0]):
            raise ValueError(
                f"[stack_module_state] Model {n} is a {type(models[n]).__name__}, model 0 a "
                f"{type(models[0]).__name__}: all must be of one architecture."
            )
        _compare(trees[0], tree, n, "")


def _compare(first: Tree, other: Tree, n: int, name: str) -> None:
    where = f"{name!r}" if name else "the model"
    if isinstance(first, mx.array) and isinstance(other, mx.array):
        if first.shape != other.shape or first.dtype != other.dtype:
            raise ValueError(
                f"[stack_module_state] {where} is {first.dtype} of shape {tuple(first.shape)} in "
                f"model 0 and {other.dtype} of shape {tuple(other.shape)} in model {n}."
            )
        return
    containers = isinstance(first, (dict, list)) and isinstance(other, (dict, list))
    if not containers or _keys(first) != _keys(other):
        raise ValueError(
            f"[stack_module_state] {where} of model {n} has other parameters than model 0's, or "
            "others of them are frozen."
        )
    for key in _keys(first):
        _compare(first[key], other[key], n, f"{name}.{key}" if name else str(key))


class Ensemble(nn.Module):
    """Models of one architecture as one module; made by `ensemble`."""

    def __init__(self, models: Sequence[nn.Module], in_axes: Any, randomness: Randomness) -> None:
        super().__init__()
        parameters, state = stack_module_state(models)
        self.members = parameters
        if state:
            self.state_of_members = state
            self.freeze(keys=["state_of_members"], recurse=False)
        self._no_grad.discard("members")
        # No item of the module: its arrays are the first model's, of which the shared ones count.
        vars(self).update(_skeleton=models[0], _randomness=randomness, _mapped=_Kept())
        self.size: int = len(models)
        self.in_axes: Any = in_axes

    def _extra_repr(self) -> str:
        return f"{self.size} of {type(vars(self)['_skeleton']).__name__}"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model: nn.Module = vars(self)["_skeleton"]
        several = isinstance(self.in_axes, (tuple, list))
        axes = tuple(self.in_axes) if several else (self.in_axes,) * len(args)
        if len(axes) != len(args):
            raise ValueError(
                f"[ensemble] in_axes has {len(axes)} entries for {len(args)} positional arguments."
            )

        # Kept: a vmap learns from its traces.
        kept = vars(self)["_mapped"]
        key = repr(axes), self.size, vars(self)["_randomness"]
        if key not in kept:
            kept[key] = vmap(
                _member, in_axes=(None, 0, 0, *axes), axis_size=key[1], randomness=key[2]
            )
        call = _Call(model, self.training, kwargs)
        return kept[key](call, self["members"], self.get("state_of_members", {}), *args)


class _Kept(dict[Any, Any]):
    """What is not copied or pickled with the module that holds it."""

    def __reduce__(self) -> Any:
        return _Kept, ()


class _Call:
    """What the members of an ensemble share in one call; nothing in it is mapped."""

    def __init__(self, model: nn.Module, training: bool, kwargs: dict[str, Any]) -> None:
        self.model, self.training, self.kwargs = model, training, kwargs


def _member(call: _Call, parameters: Tree, state: Tree, *inputs: Any) -> Any:
    with _state.untouched(call.model):
        call.model.train(call.training)
        return functional_call(call.model, (parameters, state), *inputs, **call.kwargs)


def ensemble(
    models: Sequence[nn.Module], *, in_axes: Any = None, randomness: Randomness = "different"
) -> Ensemble:
    """Models of one architecture as one module, which runs them all in one batch.

    Args:
        models: Modules with the same structure, shapes and frozen parameters. They are left as
            they are: the ensemble has copies of their trainable parameters.
        in_axes: Which axis of each positional argument belongs to the members: an int, None where
            all get the same, or one entry for each argument. Keyword arguments all get.
        randomness: As `mlxshim.vmap`'s: whether members draw something "different" (dropout).

    Returns:
        An `nn.Module` called as each of the models, whose outputs have a leading axis of members.
        Its trainable parameters are theirs, stacked, so that it is trained as any module is. Arrays
        that all models share are shared by the members.

    Raises:
        ValueError: models that differ, saying where.

    Example:
        >>> import mlx.core as mx
        >>> import mlx.nn as nn
        >>> from mlxshim.nn import ensemble
        >>> together = ensemble([nn.Linear(2, 3) for _ in range(4)])
        >>> together(mx.ones((5, 2))).shape
        (4, 5, 3)
    """
    return Ensemble(models, in_axes, randomness)
