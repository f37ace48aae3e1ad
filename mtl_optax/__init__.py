"""Optax for several losses at once: multi-task strategies as links of an `optax.chain`."""

import importlib as _importlib
from typing import TYPE_CHECKING as _TYPE_CHECKING

from mtl_optax import (
    _flax as _flax,
    aggregators,
    balancers,
    conditioning,
    fronts,
    losses,
    metrics,
    models,
    plots,
    solvers,
)
from mtl_optax._observe import observe_losses
from mtl_optax.aggregators import *
from mtl_optax.balancers import *
from mtl_optax.catalog import (
    STRATEGIES,
    Strategy,
    make,
    register,
)
from mtl_optax.conditioning import *
from mtl_optax.jacobian import (
    Jacobian,
    Sketch,
    as_jacobian,
    task_names,
    value_and_feature_jac,
    value_and_jac,
)
from mtl_optax.links import link
from mtl_optax.states import (
    PerPair,
    PerTask,
    resize_state,
)
from mtl_optax.summary import summarize

if _TYPE_CHECKING:
    from mtl_optax import compare as compare

__version__ = "0.1.0"

__all__ = [
    "STRATEGIES",
    "Jacobian",
    "PerPair",
    "PerTask",
    "Sketch",
    "Strategy",
    "as_jacobian",
    "compare",
    "fronts",
    "link",
    "losses",
    "make",
    "metrics",
    "models",
    "observe_losses",
    "plots",
    "register",
    "resize_state",
    "solvers",
    "summarize",
    "task_names",
    "value_and_feature_jac",
    "value_and_jac",
]
__all__ += aggregators.__all__
__all__ += balancers.__all__
__all__ += conditioning.__all__


def __getattr__(name: str) -> object:
    """Imports `mtl_optax.compare` when it is first asked for: who only trains does without."""
    if name == "compare":
        return _importlib.import_module("mtl_optax.compare")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    # Other modules can be imported and are not public: they change without a notice.
    return [*__all__, "__version__"]
