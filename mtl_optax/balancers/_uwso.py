"""UW-SO: uncertainty weighting with its optimum in closed form, tempered by a softmax."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from mtl_optax.balancers._base import summed
from mtl_optax.links import check_num_tasks, check_option, link


class UwsoState(NamedTuple):
    """State of `scale_by_uwso`."""

    weights: jax.Array  # (K,) float32, of the last update


def scale_by_uwso(
    num_tasks: int, *, temperature: float = 1.0
) -> optax.GradientTransformationExtraArgs:
    r"""Weights each task by the softmax of its inverse loss.

    .. math:: \lambda_k = K\,\mathrm{softmax}_k\!\left(\frac{1}{T\,L_k}\right)

    :math:`1/L` is where uncertainty weighting would settle if L stood still. Losses must be
    positive; one that is not finite gets weight 0, and the others share K.

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
      The paper's weights sum to 1; here to K, so that the learning rate keeps its meaning.

    References:
      Kirchdorfer et al., `Analytical Uncertainty-Based Loss Weighting in Multi-Task Learning
      <https://arxiv.org/abs/2408.07985>`_, 2024, eq. 6.
    """
    check_num_tasks(num_tasks)
    check_option("temperature", temperature, lambda t: t > 0, "more than 0")

    def init_fn(params):
        del params
        return UwsoState(jnp.ones(num_tasks, jnp.float32))

    def update_fn(jacobian, state, **extra_args):
        del state, extra_args
        loss = jacobian.loss_vector()
        # A loss of 0 would make inf - inf in the softmax; the largest float does what inf means.
        logits = jnp.minimum(1 / (temperature * loss), jnp.finfo(loss.dtype).max)
        logits = jnp.where(jnp.isfinite(loss), logits, -jnp.inf)
        # All -inf when no loss is finite.
        weights = jnp.nan_to_num(num_tasks * jax.nn.softmax(logits))
        return jacobian.scale(weights), UwsoState(weights.astype(jnp.float32))

    return link(init_fn, update_fn, num_tasks)


uwso = summed(scale_by_uwso)
