"""SoftAdapt: weight a task by how fast its loss rises."""

from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mtl_optax._numerics import divide
from mtl_optax._options import COUNT, FINITE, check_flag, check_num_tasks, check_option
from mtl_optax._usable import positive_log, softmax_when
from mtl_optax.balancers._base import summed
from mtl_optax.links import link
from mtl_optax.states import PerTask


class SoftadaptState(NamedTuple):
    """State of `scale_by_softadapt`."""

    weights: Annotated[PerTask, 1.0]  # (K,) float32, of the last update
    losses: Annotated[PerTask, jnp.inf]  # (K,) float32, means of the last window, inf before
    rates: PerTask  # (K,) float32, by how much they exceed those of the window before, 0 before
    loss_sum: PerTask  # (K,) float32, over the finite losses of the running window
    loss_count: PerTask  # (K,) int32, how many they are
    count: PerTask  # (K,) int32, updates so far
    unusable: PerTask  # (K,) int32, updates in which L(t) was not positive and left it no weight


def scale_by_softadapt(
    num_tasks: int,
    *,
    beta: float | jax.Array = 0.1,
    window: int | jax.Array = 1,
    normalize: bool = False,
    loss_weighted: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Weights each task by the softmax of its loss's recent rate of change.

    .. math:: \lambda_k = K \frac{f_k e^{\beta s_k}}{\sum_j f_j e^{\beta s_j}}, \quad
              s_k = L_k(t) - L_k(t-1)

    where L(t) is the mean loss of window t, the current step included, and f is 1, or L(t) for
    `loss_weighted`. The weights are 1 until the second window closes and then change once a window.
    A loss that is not finite is left out of its window. A task's windows count the updates in which
    it is present, and its weight is 1 until it has two.

    Args:
      num_tasks: number of tasks K; static, at least 1.
      beta: sharpness, in units of 1/loss (unitless with `normalize`); positive favours the task
        that does worst, negative the one that does best, larger is less even.
      window: steps averaged into one L(t); larger for noisier losses.
      normalize: whether to divide the rates by the sum of their magnitudes, so that neither the
        unit nor the learning rate matters.
      loss_weighted: whether large losses get more weight too; a task whose L(t) is not positive
        then gets none, and `unusable` counts it.

    Returns:
      A balancer: Jacobian in, Jacobian out. Update scale: sum-like (weights sum to K).

    Raises:
      TypeError: if `normalize` or `loss_weighted` is no bool.
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
      two windows, which noise moves less. With `normalize` the authors' package divides the rates
      by their sum, whose sign may turn all of them round: where the losses fall together it favours
      the task that does best. Here, as the paper has it, the divisor is the sum of the magnitudes.
      With `loss_weighted` its factor is the mean over all the losses that it is given; here over
      the newest window.

    References:
      Heydari et al., `SoftAdapt <https://arxiv.org/abs/1912.12355>`_, 2019, section 3.1.
    """
    check_num_tasks(num_tasks)
    check_flag("normalize", normalize)
    check_flag("loss_weighted", loss_weighted)
    check_option("beta", beta, *FINITE)
    check_option("window", window, *COUNT)

    def init_fn(params):
        del params
        ones = jnp.ones(num_tasks, jnp.float32)
        return SoftadaptState(
            weights=ones,
            losses=jnp.full_like(ones, jnp.inf),
            rates=jnp.zeros_like(ones),
            loss_sum=jnp.zeros_like(ones),
            loss_count=jnp.zeros(num_tasks, jnp.int32),
            count=jnp.zeros(num_tasks, jnp.int32),
            unusable=jnp.zeros(num_tasks, jnp.int32),
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
        change = mean - state.losses
        change = jnp.where(jnp.isfinite(change), change, 0)
        losses = jnp.where(closes, mean, state.losses)
        rates = jnp.where(closes, change, state.rates)

        ready = (count >= 2 * window) & jacobian.present
        rate, usable = rates, ready
        if normalize:
            rate = jnp.where(ready, rate, 0)
            rate = divide(rate, jnp.max(jnp.abs(rate)))
            rate = rate / jnp.maximum(jnp.sum(jnp.abs(rate)), 1)
        logits = beta * rate
        if loss_weighted:
            log, usable = positive_log(losses)
            logits = logits + log
        weights = softmax_when(ready, usable, logits)

        new_state = SoftadaptState(
            weights=weights.astype(jnp.float32),
            losses=losses,
            rates=rates,
            loss_sum=jnp.where(closes, 0, loss_sum),
            loss_count=jnp.where(closes, 0, loss_count),
            count=count,
            unusable=state.unusable + (ready & ~usable),
        )
        return jacobian.scale(weights), new_state

    return link(init_fn, update_fn, num_tasks)


softadapt = summed(scale_by_softadapt)
