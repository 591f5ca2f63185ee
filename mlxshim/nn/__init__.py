"""Modules as values, gradients of every sample, and what is made of them, for `mlx.nn` models."""

from .attribution import gradient_features as gradient_features
from .attribution import random_projection as random_projection
from .attribution import trak as trak
from .clipping import clipped_grad as clipped_grad
from .clipping import per_sample_norms as per_sample_norms
from .distributed import RankFailed as RankFailed
from .distributed import across_ranks as across_ranks
from .fisher import Laplace as Laplace
from .fisher import fisher_diagonal as fisher_diagonal
from .fisher import laplace as laplace
from .functional import ensemble as ensemble
from .functional import functional_call as functional_call
from .functional import stack_module_state as stack_module_state
from .gradients import per_sample_value_and_grad as per_sample_value_and_grad
from .gradients import value_and_grad as value_and_grad
from .lora import LoRA as LoRA
from .lora import add_lora as add_lora
from .lora import per_row as per_row
from .lora import stack_adapters as stack_adapters
from .ntk import empirical_ntk as empirical_ntk
from .prompt import prompt_attention as prompt_attention

__all__ = [
    "Laplace",
    "LoRA",
    "RankFailed",
    "across_ranks",
    "add_lora",
    "clipped_grad",
    "empirical_ntk",
    "ensemble",
    "fisher_diagonal",
    "functional_call",
    "gradient_features",
    "laplace",
    "per_row",
    "per_sample_norms",
    "per_sample_value_and_grad",
    "prompt_attention",
    "random_projection",
    "stack_adapters",
    "stack_module_state",
    "trak",
    "value_and_grad",
]
