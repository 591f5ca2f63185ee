"""What mlxshim itself warns of and refuses with."""

from __future__ import annotations


class PerformanceWarning(UserWarning):
    """The answer is right, but was found sample by sample."""


class NoBatchingRule(NotImplementedError):
    """An operation that cannot be batched here. `vmap` answers it with a loop over samples."""


class ArgumentError(ValueError, TypeError):
    """A call that means nothing. MLX raises ValueError where JAX raises TypeError: this is both."""


class ConcretizationError(TypeError):
    """A value that must be read while it has none: the array is being traced."""
