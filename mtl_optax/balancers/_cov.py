"""CoV weighting: weight a task by how much its relative loss varies."""

from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mtl_optax._numerics import divide
from mtl_optax._options import check_num_tasks, check_option
from mtl_optax.balancers._base import summed
from mtl_optax.links import link
from mtl_optax.states import PerTask

# Of the variance of ratios about 1: below it all losses count as constant, and equal.
_SMALLEST_VARIANCE = 1e-8
# Keeps the square of a ratio finite.
_LARGEST_RATIO = 1e15


class CovState(NamedTuple):
    """State of `scale_by_cov`."""

    weights: Annotated[PerTask, 1.0]  # (K,) float32, of the last update
    loss_mean: PerTask  # (K,) float32, over the usable losses so far
    ratio_mean: Annotated[PerTask, 1.0]  # (K,) float32, of the ratios l
    ratio_variance: PerTask  # (K,) float32
    counts: PerTask  # (K,) int32, usable losses so far


def scale_by_cov(
    num_tasks: int, *, decay: float | jax.Array = 1.0
) -> optax.GradientTransformationExtraArgs:
    r"""Weights each task by the coefficient of variation of its loss ratio.

    .. math:: \lambda_k = K \frac{c_k}{\sum_j c_j}, \quad c_k = \frac{\sigma(l_k)}{\mu(l_k)}, \quad
              l_k(t) = \frac{L_k(t)}{\mu(L_k)(t-1)}

    with means and deviations over all steps so far: a loss that no longer varies is as good as
    learned. The weights start at 1 and do not depend on the units of the losses, which should be
    positive. A loss that is exactly 0 or not finite is skipped, as if that update had not been for
    its task.

    Args:
      num_tasks: number of tasks K; static, at least 1.
      decay: weight of the past in the running means, in (0, 1]; 1 averages all steps alike, as
        the paper does, 0.99 about the last hundred.

    Returns:
      A balancer: Jacobian in, Jacobian out. Update scale: sum-like (weights sum to K).

    Raises:
      ValueError: if `num_tasks` < 1, `decay` is not in (0, 1], or the losses are not K.

    Examples:
      >>> import jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> tx = mtl.scale_by_cov(num_tasks=2)
      >>> state = tx.init(None)
      >>> for losses in ([2.0, 2.0], [1.0, 1.5], [1.0, 1.5]):
      ...     jac, state = tx.update(jnp.ones((2, 3)), state, losses=jnp.array(losses))
      >>> [round(w, 4) for w in state.weights.tolist()]
      [1.419, 0.581]

    Differs from:
      The paper's weights sum to 1; here to K, so that the learning rate keeps its meaning. The
      authors' code weights a step by the statistics before it; here, as in the paper, they include
      it. With a decay below 1 it averages the losses and their ratios so, and still divides the sum
      of all squares so far by the number of steps; here the variance decays too, and the first
      steps are averaged alike until a decaying mean has seen enough.

    References:
      Groenendijk et al., `Multi-Loss Weighting with Coefficient of Variations
      <https://arxiv.org/abs/2009.01717>`_, 2021, eqs. 3-6.
    """
    check_num_tasks(num_tasks)
    check_option("decay", decay, lambda d: (d > 0) & (d <= 1), "in (0, 1]")

    def init_fn(params):
        del params
        return CovState(
            weights=jnp.ones(num_tasks, jnp.float32),
            loss_mean=jnp.zeros(num_tasks, jnp.float32),
            ratio_mean=jnp.ones(num_tasks, jnp.float32),
            ratio_variance=jnp.zeros(num_tasks, jnp.float32),
            counts=jnp.zeros(num_tasks, jnp.int32),
        )

    def update_fn(jacobian, state, **extra_args):
        del extra_args
        loss = jacobian.loss_vector().astype(jnp.float32)
        usable = jnp.isfinite(loss) & (loss != 0)
        counts = state.counts + usable
        # Welford's recurrences; 1/n until a decaying mean has seen enough to be unbiased.
        pace = jnp.maximum(1 / jnp.maximum(counts, 1), 1 - decay)
        pace = jnp.where(usable, pace, 0)

        comparable = usable & (state.loss_mean != 0)
        ratio = jnp.where(comparable, loss, 1) / jnp.where(comparable, state.loss_mean, 1)
        ratio = jnp.clip(ratio, -_LARGEST_RATIO, _LARGEST_RATIO)
        change = ratio - state.ratio_mean
        ratio_mean = state.ratio_mean + pace * change
        ratio_variance = (1 - pace) * (state.ratio_variance + pace * change**2)
        loss_change = pace * jnp.where(usable, loss, 0) - pace * state.loss_mean

        deviation = jnp.sqrt(ratio_variance + _SMALLEST_VARIANCE)
        variation = deviation / jnp.where(ratio_mean != 0, jnp.abs(ratio_mean), 1)
        total = jnp.sum(jnp.where(jacobian.present, variation, 0))
        weights = divide(jacobian.num_present * variation, total)
        new_state = CovState(
            weights=weights.astype(jnp.float32),
            loss_mean=(state.loss_mean + loss_change).astype(jnp.float32),
            ratio_mean=ratio_mean.astype(jnp.float32),
            ratio_variance=ratio_variance.astype(jnp.float32),
            counts=counts,
        )
        return jacobian.scale(weights), new_state

    return link(init_fn, update_fn, num_tasks)


cov = summed(scale_by_cov)
