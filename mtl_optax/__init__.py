"""Optax for several losses at once: multi-task strategies as links of an `optax.chain`."""

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

__version__ = "0.1.0"

__all__ = [
    "STRATEGIES",
    "Jacobian",
    "PerPair",
    "PerTask",
    "Sketch",
    "Strategy",
    "as_jacobian",
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


def __dir__() -> list[str]:
    # Other modules can be imported and are not public: they change without a notice.
    return [*__all__, "__version__"]
