"""mlxshim: `vmap` and `grad` over MLX that mean what they say.

from mlxshim import vmap, grad

per_sample = vmap(grad(loss), in_axes=(None, 0, 0))
"""

from . import rules as _rules  # noqa: F401  (registers the interceptions)
from .core.errors import NoBatchingRule as NoBatchingRule
from .core.errors import PerformanceWarning as PerformanceWarning
from .transforms.autodiff import grad as grad
from .transforms.autodiff import jvp as jvp
from .transforms.autodiff import value_and_grad as value_and_grad
from .transforms.autodiff import vjp as vjp
from .transforms.vmap import vmap as vmap

__version__ = "0.1.0"
__all__ = [
    "NoBatchingRule",
    "PerformanceWarning",
    "grad",
    "jvp",
    "value_and_grad",
    "vjp",
    "vmap",
]
