"""What mlxshim itself warns of and refuses with."""

from __future__ import annotations


class PerformanceWarning(UserWarning):
    """The answer is right, but was found sample by sample.

    Example:
        >>> import warnings
        >>> import mlx.core as mx
        >>> from mlxshim import PerformanceWarning, vmap
        >>> def f(x):
        ...     return x * 2 if x.item() > 1 else x  # reads a value
        >>> with warnings.catch_warnings(record=True) as seen:
        ...     warnings.simplefilter("always")
        ...     print(vmap(f)(mx.array([1.0, 2.0])))
        array([1, 4], dtype=float32)
        >>> seen[0].category is PerformanceWarning
        True
    """


class NoBatchingRule(NotImplementedError):
    """An operation that cannot be batched here. `vmap` answers it with a loop over samples.

    Example:
        >>> import mlx.core as mx
        >>> from mlxshim import NoBatchingRule, vmap
        >>> try:
        ...     vmap(lambda x: x * x.item(), fallback="error")(mx.array([1.0, 2.0]))
        ... except NoBatchingRule as e:
        ...     print(e)
        [vmap] the function reads the value of an array that is mapped
    """


def no_rule(said: str) -> str:
    """That a rule is missing, where MLX has `said` which primitive it cannot map, and a way out."""
    reason = f"an operation has no batching rule: {said}"
    if "::vmap]" not in said:
        return reason
    if "Depends" in said:
        hint = "Make an mx.checkpoint inside the vmap, or take mlxshim.checkpoint."
    elif "Custom" in said:
        hint = "Give a kernel of your own one with mlxshim.primitive."
    else:
        hint = "If it was imported by value, call it as an attribute of its module."
    return f"{reason.rstrip('.')}. {hint}"


class ArgumentError(ValueError, TypeError):
    """A call that means nothing. MLX raises ValueError where JAX raises TypeError: this is both.

    Example:
        >>> import mlx.core as mx
        >>> from mlxshim import ArgumentError, vmap
        >>> try:
        ...     vmap(lambda x: x, in_axes=2)(mx.ones((4, 3)))
        ... except ArgumentError as e:
        ...     print(e)
        [vmap] in_axes maps axis 2 of argument x, which has shape (4, 3): its axes are -2 to 1.
    """


class ConcretizationError(TypeError):
    """A value that must be read while it has none: the array is being traced.

    Example:
        >>> import mlx.core as mx
        >>> from mlxshim import ConcretizationError, while_loop
        >>> def doubled(x):
        ...     return while_loop(lambda x: x < 10, lambda x: 2 * x, x)
        >>> try:
        ...     mx.compile(doubled)(mx.array(1))
        ... except ConcretizationError:
        ...     print("how often it runs is not known while it is compiled")
        how often it runs is not known while it is compiled
    """
