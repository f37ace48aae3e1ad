"""CR-MOGM: smooth the weights of any aggregator over the updates."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mtl_optax._options import BELOW_ONE, check_num_tasks, check_option
from mtl_optax.aggregators._mgda import mgda
from mtl_optax.links import link
from mtl_optax.states import PerTask


class CrMogmState(NamedTuple):
    """State of `cr_mogm`."""

    weights: PerTask  # (K,) float32, smoothed, of the last update
    count: PerTask  # (K,) int32, updates of each task with finite weights so far
    inner_state: Any  # of the aggregator, with the weights that it found


def cr_mogm(
    num_tasks: int,
    *,
    aggregator: optax.GradientTransformation | None = None,
    decay: float | jax.Array = 0.9,
) -> optax.GradientTransformationExtraArgs:
    r"""Combines the rows with a moving average of an aggregator's weights.

    .. math:: \lambda_t = \alpha \lambda_{t-1} + (1 - \alpha) \hat\lambda_t, \quad
              d = \sum_k \lambda_{t,k}\, g_k

    where :math:`\hat\lambda_t` are the weights that the aggregator finds for this batch. They jump
    with the noise of the batch and are correlated with its gradients, which biases the direction;
    the average does so less. Each task's starts from the first weight that it is found.

    Args:
      num_tasks: number of tasks K; static, at least 1.
      aggregator: any that keeps the `weights` of the rows in its state; `mgda(num_tasks)` by
        default.
      decay: alpha in [0, 1), weight of the past.

    Returns:
      An aggregator: Jacobian in, gradient out. Update scale: that of the aggregator.

    Raises:
      TypeError: if the aggregator keeps no `weights`, or is a chain of links that keep several.
      ValueError: if `num_tasks` < 1, `decay` is not in [0, 1), or the losses are not K.

    Examples:
      >>> import jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> tx = mtl.cr_mogm(num_tasks=2, decay=0.5)
      >>> state = tx.init(jnp.zeros(2))
      >>> for J in ([[1.0, 0.0], [0.0, 1.0]], [[0.5, 0.0], [1.0, 1.0]]):
      ...     update, state = tx.update(jnp.array(J), state, losses=jnp.ones(2))
      >>> [round(w, 4) for w in state.weights.tolist()]
      [0.75, 0.25]

    References:
      Zhou et al., `On the Convergence of Stochastic Multi-Objective Gradient Manipulation and
      Beyond <https://openreview.net/forum?id=ScwfQ7hdwyP>`_, NeurIPS 2022, algorithm 1.
    """
    check_num_tasks(num_tasks)
    check_option("decay", decay, *BELOW_ONE)
    inner = optax.with_extra_args_support(aggregator or mgda(num_tasks))

    def init_fn(params):
        zeros = jnp.zeros(num_tasks, jnp.float32)
        return CrMogmState(zeros, jnp.zeros(num_tasks, jnp.int32), inner.init(params))

    def update_fn(jacobian, state, **extra_args):
        # The aggregator's own update is not used; under jit it is not computed either.
        _, inner_state = inner.update(jacobian, state.inner_state, **extra_args)
        found = _weights(inner_state, num_tasks)
        usable = jnp.all(jnp.isfinite(found) | ~jacobian.present)
        past = jnp.where(state.count > 0, decay, 0)
        smoothed = past * state.weights + (1 - past) * found
        smoothed = jnp.where(usable, smoothed, state.weights).astype(jnp.float32)
        count = state.count + usable.astype(jnp.int32)
        return jacobian.combine(smoothed), CrMogmState(smoothed, count, inner_state)

    return link(init_fn, update_fn, num_tasks)


def _weights(state: Any, num_tasks: int) -> jax.Array:
    found = [value for _, value in optax.tree.get_all_with_path(state, "weights")]
    if len(found) != 1 or found[0].shape != (num_tasks,):
        raise TypeError(
            f"the aggregator's state holds {len(found)} fields 'weights', expected one of shape "
            f"({num_tasks},): pass one aggregator that weighs rows, such as mtl.mgda({num_tasks}), "
            "and put balancers before cr_mogm in the optax.chain"
        )
    return found[0]
