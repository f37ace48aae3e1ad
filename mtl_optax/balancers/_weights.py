"""Weights that the user chooses, fixed or on a schedule."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from mtl_optax._options import FINITE, check_option, per_task
from mtl_optax._typing import TaskOption
from mtl_optax.balancers._base import summed
from mtl_optax.links import link
from mtl_optax.states import PerTask


class WeightsState(NamedTuple):
    """State of `scale_by_weights`."""

    weights: PerTask  # (K,) float32, of the last update
    count: jax.Array  # () int32, updates so far


def scale_by_weights(
    weights: TaskOption | Callable[[jax.Array], TaskOption],
) -> optax.GradientTransformationExtraArgs:
    r"""Weights each task by a given number.

    .. math:: \lambda_k = w_k(t)

    Args:
      weights: a tree like the losses, or K numbers in their order (the sorted one for a dict); or a
        schedule, a function from the number of updates so far to either.

    Returns:
      A balancer: Jacobian in, Jacobian out. Update scale: sum-like when the weights sum to K.

    Raises:
      ValueError: if a weight is not finite, or they do not fit the losses.

    Examples:
      >>> import jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> losses, jac = mtl.value_and_jac(lambda w: {"a": w @ w, "b": jnp.sum(w)})(jnp.ones(2))
      >>> tx = mtl.scale_by_weights({"a": 0.5, "b": 3.0})
      >>> jac, state = tx.update(jac, tx.init(jnp.ones(2)))
      >>> {name: float(loss) for name, loss in jac.losses.items()}
      {'a': 1.0, 'b': 6.0}
    """
    if not callable(weights):
        check_option("weights", weights, *FINITE, each=True)
        if not jax.tree.leaves(weights):
            raise ValueError(f"weights={weights!r}, expected one for each task")

    def at(count):
        return weights(count) if callable(weights) else weights

    def init_fn(params):
        del params
        count = jnp.zeros([], jnp.int32)
        leaves = [jnp.ravel(jnp.asarray(w, jnp.float32)) for w in jax.tree.leaves(at(count))]
        return WeightsState(jnp.concatenate(leaves), count)

    def update_fn(jacobian, state, **extra_args):
        del extra_args
        given = at(state.count)
        w = per_task("weights", given, jacobian)
        if w.shape != state.weights.shape:  # one number, or another schedule
            raise ValueError(
                f"weights={given!r} with a state of {state.weights.size} of them, expected one "
                f"for each of the {jacobian.num_tasks} tasks {jacobian.names}"
            )
        count = jnp.asarray(optax.safe_increment(state.count))
        return jacobian.scale(w), WeightsState(w.astype(jnp.float32), count)

    return link(init_fn, update_fn)


weights = summed(scale_by_weights)
