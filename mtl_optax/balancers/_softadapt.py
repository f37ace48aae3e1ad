"""SoftAdapt: weight a task by how fast its loss rises."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from mtl_optax._numerics import divide
from mtl_optax.balancers._base import summed
from mtl_optax.balancers._usable import positive_log, softmax_over
from mtl_optax.links import check_num_tasks, check_option, link


class SoftadaptState(NamedTuple):
    """State of `scale_by_softadapt`."""

    weights: jax.Array  # (K,) float32, of the last update
    losses: jax.Array  # (K,) float32, means of the last window, NaN until a finite loss is seen
    loss_sum: jax.Array  # (K,) float32, over the finite losses of the running window
    loss_count: jax.Array  # (K,) int32, how many they are
    count: jax.Array  # () int32, updates so far


def scale_by_softadapt(
    num_tasks: int,
    *,
    beta: float = 0.1,
    window: int = 1,
    normalize: bool = False,
    loss_weighted: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Weights each task by the softmax of its loss's recent rate of change.

    .. math:: \lambda_k = K \frac{f_k e^{\beta s_k}}{\sum_j f_j e^{\beta s_j}}, \quad
              s_k = L_k(t) - L_k(t-1)

    where L(t) is the mean loss of window t, the current step included, and f is 1, or L(t) for
    `loss_weighted`. The weights are 1 during the first window and then change once a window.

    Args:
      num_tasks: number of tasks K; static, at least 1.
      beta: sharpness, in units of 1/loss (unitless with `normalize`); positive favours the task
        that does worst, negative the one that does best, larger is less even.
      window: steps averaged into one L(t); larger for noisier losses.
      normalize: whether to divide the rates by the sum of their magnitudes, so that neither the
        unit nor the learning rate matters.
      loss_weighted: whether large losses get more weight too; a task whose loss is not positive
        then gets none.

    Returns:
      A balancer: Jacobian in, Jacobian out. Update scale: sum-like (weights sum to K).

    Raises:
      ValueError: if `num_tasks` < 1, `window` < 1, `beta` is not finite, or the losses are not K.

    Examples:
      >>> import jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> tx = mtl.scale_by_softadapt(num_tasks=2, beta=1.0)
      >>> state = tx.init(None)
      >>> for losses in ([2.0, 2.0], [1.0, 2.0]):
      ...     jac, state = tx.update(jnp.ones((2, 3)), state, losses=jnp.array(losses))
      >>> [round(w, 4) for w in state.weights.tolist()]
      [0.5379, 1.4621]

    Differs from:
      The paper's weights sum to 1; here to K, so that the learning rate keeps its meaning. Its
      rates are finite differences of chosen order over the last losses; here those of the means of
      two windows, which noise moves less.

    References:
      Heydari et al., `SoftAdapt <https://arxiv.org/abs/1912.12355>`_, 2019, section 3.1.
    """
    check_num_tasks(num_tasks)
    check_option("beta", beta, lambda b: abs(b) < float("inf"), "a finite number")
    check_option("window", window, lambda w: w >= 1, "at least 1 step")

    def init_fn(params):
        del params
        ones = jnp.ones(num_tasks, jnp.float32)
        return SoftadaptState(
            weights=ones,
            losses=jnp.full_like(ones, jnp.nan),
            loss_sum=jnp.zeros_like(ones),
            loss_count=jnp.zeros(num_tasks, jnp.int32),
            count=jnp.zeros([], jnp.int32),
        )

    def update_fn(jacobian, state, **extra_args):
        del extra_args
        loss = jacobian.loss_vector().astype(jnp.float32)
        finite = jnp.isfinite(loss)
        loss_sum = state.loss_sum + jnp.where(finite, loss, 0)
        loss_count = state.loss_count + finite
        count = jnp.asarray(optax.safe_increment(state.count))
        closes = count % window == 0

        mean = loss_sum / jnp.maximum(loss_count, 1)
        # Large losses may sum to inf.
        mean = jnp.where((loss_count > 0) & jnp.isfinite(mean), mean, state.losses)
        rate = mean - state.losses
        rate = jnp.where(jnp.isfinite(rate), rate, 0)
        if normalize:
            rate = divide(rate, jnp.max(jnp.abs(rate)))
            rate = rate / jnp.maximum(jnp.sum(jnp.abs(rate)), 1)
        logits, usable = beta * rate, jnp.ones(num_tasks, bool)
        if loss_weighted:
            log, usable = positive_log(mean)
            logits = logits + log
        adapts = closes & (count >= 2 * window)
        weights = jnp.where(adapts, num_tasks * softmax_over(usable, logits), state.weights)

        new_state = SoftadaptState(
            weights=weights.astype(jnp.float32),
            losses=jnp.where(closes, mean, state.losses),
            loss_sum=jnp.where(closes, 0, loss_sum),
            loss_count=jnp.where(closes, 0, loss_count),
            count=count,
        )
        return jacobian.scale(weights), new_state

    return link(init_fn, update_fn, num_tasks)


softadapt = summed(scale_by_softadapt)
