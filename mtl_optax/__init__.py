"""Optax for several losses at once: multi-task strategies as links of an `optax.chain`."""

import importlib as _importlib
from typing import TYPE_CHECKING as _TYPE_CHECKING

# `as` marks a name as public for type checkers; the folders' `__all__` does it for the stars.
from mtl_optax import (
    _flax as _flax,
    losses as losses,
    metrics as metrics,
    models as models,
    plots as plots,
    solvers as solvers,
)
from mtl_optax._observe import observe_losses as observe_losses
from mtl_optax.aggregators import *
from mtl_optax.balancers import *
from mtl_optax.catalog import (
    STRATEGIES as STRATEGIES,
    Strategy as Strategy,
    make as make,
    register as register,
)
from mtl_optax.conditioning import *
from mtl_optax.jacobian import (
    Jacobian as Jacobian,
    Sketch as Sketch,
    as_jacobian as as_jacobian,
    task_names as task_names,
    value_and_feature_jac as value_and_feature_jac,
    value_and_jac as value_and_jac,
)
from mtl_optax.links import link as link
from mtl_optax.states import (
    PerPair as PerPair,
    PerTask as PerTask,
    resize_state as resize_state,
)
from mtl_optax.summary import summarize as summarize

if _TYPE_CHECKING:
    from mtl_optax import compare as compare

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """Imports `mtl_optax.compare` when it is first asked for: who only trains does without."""
    if name == "compare":
        return _importlib.import_module("mtl_optax.compare")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), "compare"]
