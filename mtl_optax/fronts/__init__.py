"""Whole Pareto fronts: n models at once, or one that holds them all.

`simplex_grid` spreads preferences, with which `jax.vmap` trains n models in one program. The
strategies of a set, `hypervolume_gradient` and `moo_svgd`, see all its models: their `update` takes
the Jacobians of a stack of them, ``jax.vmap(mtl.value_and_jac(loss_fn))(params)``. One model of all
trade-offs reads the preference next to its input (`with_preference`), or interpolates its
parameters by it (`interpolate`).
"""

from mtl_optax.fronts._grid import simplex_grid
from mtl_optax.fronts._hypervolume import hypervolume_gradient
from mtl_optax.fronts._moo_svgd import moo_svgd
from mtl_optax.fronts._one_model import interpolate, ordering_penalty, with_preference

__all__ = [
    "hypervolume_gradient",
    "interpolate",
    "moo_svgd",
    "ordering_penalty",
    "simplex_grid",
    "with_preference",
]
