"""Dynamic Weight Average: weight a task by how slowly its loss falls."""

from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mtl_optax._options import COUNT, check_num_tasks, check_option
from mtl_optax._usable import softmax_when
from mtl_optax.balancers._base import summed
from mtl_optax.links import link
from mtl_optax.states import PerTask


class DwaState(NamedTuple):
    """State of `scale_by_dwa`."""

    weights: Annotated[PerTask, 1.0]  # (K,) float32, of the last update
    loss_history: Annotated[PerTask, 1.0]  # (K, 2) float32, window means, newest first
    loss_sum: PerTask  # (K,) float32, over the finite losses of the running window
    loss_count: PerTask  # (K,) int32, how many they are
    count: PerTask  # (K,) int32, updates so far


def scale_by_dwa(
    num_tasks: int, *, temperature: float | jax.Array = 2.0, window: int | jax.Array = 1
) -> optax.GradientTransformationExtraArgs:
    r"""Weights each task by its recent loss ratio.

    .. math:: \lambda_k = K\,\mathrm{softmax}_k(r_k / T), \quad r_k = L_k(t-1) / L_k(t-2)

    where L(t) is the mean loss of window t. The weights are 1 during the first two windows. A loss
    that is not finite is left out of its window; a ratio to 0 counts as 1. A task's windows count
    the updates in which it is present, and its weight is 1 in its own first two.

    Args:
      num_tasks: number of tasks K; static, at least 1.
      temperature: softmax temperature T, unitless, > 0; larger is more even.
      window: steps averaged into one L(t); set it to the steps of an epoch, as the paper does.

    Returns:
      A balancer: Jacobian in, Jacobian out. Update scale: sum-like (weights sum to K).

    Raises:
      ValueError: if `num_tasks` < 1, `temperature` <= 0, `window` < 1, or the losses are not K.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> tx = mtl.scale_by_dwa(num_tasks=2)
      >>> state = tx.init(None)
      >>> for scale in ([2.0, 2.0], [1.0, 2.0], [1.0, 1.0]):
      ...     losses = jnp.array(scale)
      ...     jac, state = tx.update(jnp.ones((2, 3)), state, losses=losses)
      >>> [round(w, 4) for w in state.weights.tolist()]
      [0.8756, 1.1244]

    References:
      Liu et al., `End-to-End Multi-Task Learning with Attention
      <https://arxiv.org/abs/1803.10704>`_, 2019, eq. 7.
    """
    check_num_tasks(num_tasks)
    check_option("temperature", temperature, lambda t: t > 0, "more than 0")
    check_option("window", window, *COUNT)

    def init_fn(params):
        del params
        ones = jnp.ones(num_tasks, jnp.float32)
        return DwaState(
            weights=ones,
            loss_history=jnp.ones((num_tasks, 2), jnp.float32),
            loss_sum=jnp.zeros_like(ones),
            loss_count=jnp.zeros(num_tasks, jnp.int32),
            count=jnp.zeros(num_tasks, jnp.int32),
        )

    def update_fn(jacobian, state, **extra_args):
        del extra_args
        loss = jacobian.loss_vector().astype(jnp.float32)

        newest, previous = state.loss_history.T
        mean = state.loss_sum / jnp.maximum(state.loss_count, 1)
        mean = jnp.where(state.loss_count > 0, mean, newest)
        closes = (state.count > 0) & (state.count % window == 0)
        newest, previous = jnp.where(closes, mean, newest), jnp.where(closes, newest, previous)
        loss_sum = jnp.where(closes, 0, state.loss_sum)
        loss_count = jnp.where(closes, 0, state.loss_count)

        ratio = newest / jnp.where(previous != 0, previous, 1)
        ratio = jnp.where((previous != 0) & jnp.isfinite(ratio), ratio, 1)
        warm = (state.count >= 2 * window) & jacobian.present
        weights = softmax_when(warm, warm, ratio / temperature)

        finite = jnp.isfinite(loss)
        new_state = DwaState(
            weights=weights,
            loss_history=jnp.stack([newest, previous], axis=1),
            loss_sum=loss_sum + jnp.where(finite, loss, 0),
            loss_count=loss_count + finite,
            count=jnp.asarray(optax.safe_increment(state.count)),
        )
        return jacobian.scale(weights), new_state

    return link(init_fn, update_fn, num_tasks)


dwa = summed(scale_by_dwa)
