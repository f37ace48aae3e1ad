"""Optax for several losses at once: multi-task strategies as links of an `optax.chain`."""

from mtl_optax import _flax as _flax
from mtl_optax import losses, metrics, models, solvers
from mtl_optax._observe import observe_losses
from mtl_optax.aggregators import *
from mtl_optax.balancers import *
from mtl_optax.catalog import STRATEGIES, make
from mtl_optax.conditioning import *
from mtl_optax.jacobian import (
    Jacobian,
    Sketch,
    as_jacobian,
    task_names,
    value_and_feature_jac,
    value_and_jac,
)
from mtl_optax.summary import summarize

__version__ = "0.1.0"
