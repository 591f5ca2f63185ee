"""mlxshim: `vmap` and `grad` over MLX that mean what they say.

from mlxshim import vmap, grad

per_sample = vmap(grad(loss), in_axes=(None, 0, 0))
"""

from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

from . import rules as _rules  # noqa: F401  (registers the interceptions)
from .core.errors import ArgumentError as ArgumentError
from .core.errors import ConcretizationError as ConcretizationError
from .core.errors import NoBatchingRule as NoBatchingRule
from .core.errors import PerformanceWarning as PerformanceWarning
from .core.interception import names_in_place as intercepted
from .extend import primitive as primitive
from .rules.attention_long import attention_budget as attention_budget
from .transforms.autodiff import grad as grad
from .transforms.autodiff import grad_and_value as grad_and_value
from .transforms.autodiff import value_and_grad as value_and_grad
from .transforms.collectives import all_gather as all_gather
from .transforms.collectives import axis_index as axis_index
from .transforms.collectives import axis_size as axis_size
from .transforms.collectives import pmax as pmax
from .transforms.collectives import pmean as pmean
from .transforms.collectives import pmin as pmin
from .transforms.collectives import psum as psum
from .transforms.collectives import psum_scatter as psum_scatter
from .transforms.custom_jvp import custom_jvp as custom_jvp
from .transforms.custom_vjp import custom_vjp as custom_vjp
from .transforms.custom_vmap import custom_vmap as custom_vmap
from .transforms.exchanges import all_to_all as all_to_all
from .transforms.exchanges import ppermute as ppermute
from .transforms.exchanges import pshuffle as pshuffle
from .transforms.exchanges import pswapaxes as pswapaxes
from .transforms.flow import cond as cond
from .transforms.flow import fori_loop as fori_loop
from .transforms.flow import switch as switch
from .transforms.flow import while_loop as while_loop
from .transforms.jacobians import hessian as hessian
from .transforms.jacobians import hvp as hvp
from .transforms.jacobians import jacfwd as jacfwd
from .transforms.jacobians import jacobian as jacobian
from .transforms.jacobians import jacrev as jacrev
from .transforms.jacobians import vhp as vhp
from .transforms.linear import jvp as jvp
from .transforms.linear import linear_transpose as linear_transpose
from .transforms.linear import linearize as linearize
from .transforms.linear import vjp as vjp
from .transforms.patching import patched as patched
from .transforms.remat import checkpoint as checkpoint
from .transforms.remat import checkpoint_policies as checkpoint_policies
from .transforms.remat import remat as remat
from .transforms.scans import associative_scan as associative_scan
from .transforms.scans import map as map
from .transforms.scans import scan as scan
from .transforms.shapes import ShapeDtypeStruct as ShapeDtypeStruct
from .transforms.shapes import eval_shape as eval_shape
from .transforms.shapes import stop_gradient as stop_gradient
from .transforms.vmap import vmap as vmap
from .tree import ravel_pytree as ravel_pytree
from .tree import tree_flatten as tree_flatten
from .tree import tree_leaves as tree_leaves
from .tree import tree_map as tree_map
from .tree import tree_structure as tree_structure
from .tree import tree_unflatten as tree_unflatten

__version__ = "0.1.0"
__all__ = [
    "ArgumentError",
    "ConcretizationError",
    "NoBatchingRule",
    "PerformanceWarning",
    "ShapeDtypeStruct",
    "all_gather",
    "all_to_all",
    "associative_scan",
    "attention_budget",
    "axis_index",
    "axis_size",
    "checkpoint",
    "checkpoint_policies",
    "cond",
    "custom_jvp",
    "custom_vjp",
    "custom_vmap",
    "eval_shape",
    "fori_loop",
    "grad",
    "grad_and_value",
    "hessian",
    "hvp",
    "intercepted",
    "jacfwd",
    "jacobian",
    "jacrev",
    "jvp",
    "linear_transpose",
    "linearize",
    "map",
    "patched",
    "pmax",
    "pmean",
    "pmin",
    "ppermute",
    "primitive",
    "pshuffle",
    "psum",
    "psum_scatter",
    "pswapaxes",
    "ravel_pytree",
    "remat",
    "scan",
    "stop_gradient",
    "switch",
    "tree_flatten",
    "tree_leaves",
    "tree_map",
    "tree_structure",
    "tree_unflatten",
    "value_and_grad",
    "vhp",
    "vjp",
    "vmap",
    "while_loop",
]

if _TYPE_CHECKING:
    from . import nn as nn
    from . import testing as testing


def __getattr__(name: str) -> _Any:
    """`mlxshim.nn` and `mlxshim.testing` are imported when they are asked for."""
    if name in ("nn", "testing"):
        import importlib

        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
