"""Modules as values, and gradients of every sample, for `mlx.nn` models."""

from .clipping import clipped_grad as clipped_grad
from .clipping import per_sample_norms as per_sample_norms
from .functional import ensemble as ensemble
from .functional import functional_call as functional_call
from .functional import stack_module_state as stack_module_state
from .gradients import per_sample_value_and_grad as per_sample_value_and_grad
from .gradients import value_and_grad as value_and_grad

__all__ = [
    "clipped_grad",
    "ensemble",
    "functional_call",
    "per_sample_norms",
    "per_sample_value_and_grad",
    "stack_module_state",
    "value_and_grad",
]
