"""UW-SO: uncertainty weighting with its optimum in closed form, tempered by a softmax."""

from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mtl_optax._options import check_num_tasks, check_option
from mtl_optax._usable import positive_log, softmax_over
from mtl_optax.balancers._base import summed
from mtl_optax.links import link
from mtl_optax.states import PerTask


class UwsoState(NamedTuple):
    """State of `scale_by_uwso`."""

    weights: Annotated[PerTask, 1.0]  # (K,) float32, of the last update
    unusable: PerTask  # (K,) int32, updates in which its loss was not positive or not finite


def scale_by_uwso(
    num_tasks: int, *, temperature: float | jax.Array = 1.0
) -> optax.GradientTransformationExtraArgs:
    r"""Weights each task by the softmax of its inverse loss.

    .. math:: \lambda_k = K\,\mathrm{softmax}_k\!\left(\frac{1}{T\,L_k}\right)

    :math:`1/L` is where uncertainty weighting would settle if L stood still. Losses must be
    positive: a task whose loss is 0, negative or not finite gets weight 0 and `unusable` counts it,
    while the others share K. Where no loss is positive, all that are finite weigh the same.

    Args:
      num_tasks: number of tasks K; static, at least 1.
      temperature: T, in units of 1/loss, > 0; larger is more even. The paper tunes it.

    Returns:
      A balancer: Jacobian in, Jacobian out. Update scale: sum-like (weights sum to K).

    Raises:
      ValueError: if `num_tasks` < 1, `temperature` <= 0, or the losses are not K.

    Examples:
      >>> import jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> losses, jac = mtl.value_and_jac(lambda w: {"a": w @ w, "b": 2 * w @ w})(jnp.ones(2))
      >>> tx = mtl.scale_by_uwso(num_tasks=2)
      >>> jac, state = tx.update(jac, tx.init(jnp.ones(2)))
      >>> [round(w, 4) for w in state.weights.tolist()]
      [1.1244, 0.8756]

    Differs from:
      The paper's weights sum to 1; here to K, so that the learning rate keeps its meaning. Its
      softmax would give all of that to a loss of exactly 0.

    References:
      Kirchdorfer et al., `Analytical Uncertainty-Based Loss Weighting in Multi-Task Learning
      <https://arxiv.org/abs/2408.07985>`_, 2024, eq. 6.
    """
    check_num_tasks(num_tasks)
    check_option("temperature", temperature, lambda t: t > 0, "more than 0")

    def init_fn(params):
        del params
        return UwsoState(jnp.ones(num_tasks, jnp.float32), jnp.zeros(num_tasks, jnp.int32))

    def update_fn(jacobian, state, **extra_args):
        del extra_args
        loss, present = jacobian.loss_vector(), jacobian.present
        _, usable = positive_log(loss)
        share = softmax_over(usable, 1 / (temperature * loss), jnp.isfinite(loss) & present)
        weights = jacobian.num_present * share
        unusable = state.unusable + ~usable
        return jacobian.scale(weights), UwsoState(weights.astype(jnp.float32), unusable)

    return link(init_fn, update_fn, num_tasks)


uwso = summed(scale_by_uwso)
