"""COSMOS: a weighted sum that also turns the losses towards a preference ray."""

from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mtl_optax._numerics import bounded, divide
from mtl_optax._options import check_num_tasks, check_option, check_preference, per_task
from mtl_optax._typing import TaskOption
from mtl_optax._usable import unit_vector
from mtl_optax.balancers._base import summed
from mtl_optax.links import link
from mtl_optax.states import PerTask


class CosmosState(NamedTuple):
    """State of `scale_by_cosmos`."""

    weights: Annotated[PerTask, 1.0]  # (K,) float32, of the last update
    unusable: PerTask  # (K,) int32, updates in which its loss was not finite


def scale_by_cosmos(
    num_tasks: int, *, preference: TaskOption = 1.0, penalty: float | jax.Array = 1.0
) -> optax.GradientTransformationExtraArgs:
    r"""Weights each task so that their sum descends the COSMOS objective.

    .. math:: r^\top L - c \cos(r, L), \quad
              \lambda = r - \frac{c}{\|L\|} \big(\hat r - \cos(r, L)\,\hat L\big)

    with the preference r scaled to sum to 1 over the tasks present. A weight can be negative: a
    loss far below its share is let rise. To learn a whole Pareto front, give each update a
    preference drawn from a Dirichlet distribution as the extra argument `preference=`, and the
    model the same one as an input.

    Args:
      num_tasks: number of tasks K; static, at least 1.
      preference: r, >= 0, not all 0, one for all tasks or a tree like the losses. One that comes
        with an update as the extra argument `preference=` takes its place.
      penalty: c >= 0, in the unit of the losses; larger keeps closer to the ray. The paper uses
        0.01 to 8, chosen by data set.

    Returns:
      A balancer: Jacobian in, Jacobian out. Update scale: free (mean-like on the ray, where the
      weights are r).

    Raises:
      ValueError: if `num_tasks` < 1, a preference or `penalty` is negative, all preferences are 0,
        or the losses are not K.

    Examples:
      >>> import jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> losses, jac = mtl.value_and_jac(lambda w: {"a": 1.5 * w @ w, "b": 2 * w @ w})(jnp.ones(2))
      >>> tx = mtl.scale_by_cosmos(num_tasks=2, preference=[0.5, 0.5])
      >>> jac, state = tx.update(jac, tx.init(jnp.ones(2)))
      >>> [round(w, 4) for w in state.weights.tolist()]
      [0.4774, 0.517]

    Differs from:
      A task whose loss is not finite is left out of the objective; its weight is 0, and `unusable`
      counts it.

    References:
      Ruchte and Grabocka, `Scalable Pareto Front Approximation for Deep Multi-Objective Learning
      <https://arxiv.org/abs/2103.13392>`_, 2021, eq. 4.
    """
    check_num_tasks(num_tasks)
    check_preference(preference)
    check_option("penalty", penalty, lambda c: c >= 0, "at least 0")
    usual_preference = preference

    def init_fn(params):
        del params
        return CosmosState(jnp.ones(num_tasks, jnp.float32), jnp.zeros(num_tasks, jnp.int32))

    def update_fn(jacobian, state, *, preference=None, **extra_args):
        del extra_args
        loss = jacobian.loss_vector()
        finite = jnp.isfinite(loss)
        usual = per_task("preference", usual_preference, jacobian, 1.0)
        r = per_task("preference", preference, jacobian, usual)
        r = jnp.where(jacobian.present, r, 0)
        r = jnp.where(finite, divide(r, jnp.sum(r)), 0)
        ray, _ = unit_vector(r)
        direction, size = unit_vector(jnp.where(finite, loss, 0))
        turn = ray - jnp.sum(ray * direction) * direction
        # All losses 0 have no direction to turn.
        weights = r - penalty * divide(turn, size)
        # Near 0 losses the turn may overflow, and inf times a gradient of 0 would be NaN.
        weights = bounded(weights)
        unusable = state.unusable + ~finite
        return jacobian.scale(weights), CosmosState(weights.astype(jnp.float32), unusable)

    return link(init_fn, update_fn, num_tasks)


cosmos = summed(scale_by_cosmos)
