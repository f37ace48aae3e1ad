"""What the wrappers of a whole strategy share."""

from typing import Any

import optax

from mtl_optax.jacobian import Jacobian
from mtl_optax.links import conform


def run(
    tx: optax.GradientTransformationExtraArgs,
    jacobian: Any,
    state: Any,
    params: Any,
    extra_args: dict[str, Any],
) -> tuple[Any, Any]:
    """The update of a wrapped strategy, checked to be one gradient, and its new state."""
    update, state = tx.update(jacobian, state, params, **extra_args)
    if isinstance(update, Jacobian):
        raise TypeError(
            "the wrapped transformation returned a Jacobian, expected one gradient: end it with an "
            "aggregator such as mtl.sum_tasks(), or wrap the whole optax.chain"
        )
    return conform(update, params), state
