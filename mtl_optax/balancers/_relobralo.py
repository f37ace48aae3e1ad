"""ReLoBRaLo: weight a task by its relative loss, with a random look back at the start."""

from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mtl_optax._numerics import divide
from mtl_optax._options import UP_TO_ONE, check_key, check_num_tasks, check_option
from mtl_optax._usable import softmax_over
from mtl_optax.balancers._base import summed
from mtl_optax.links import link
from mtl_optax.states import PerTask


class RelobraloState(NamedTuple):
    """State of `scale_by_relobralo`."""

    weights: Annotated[PerTask, 1.0]  # (K,) float32, of the last update
    initial_losses: PerTask  # (K,) float32, L(0), the second that could be used, 0 before
    last_losses: PerTask  # (K,) float32, the last one, the same
    key: jax.Array  # typed random key


def scale_by_relobralo(
    num_tasks: int,
    *,
    key: jax.Array,
    decay: float | jax.Array = 0.999,
    temperature: float | jax.Array = 0.1,
    rho: float | jax.Array = 0.999,
) -> optax.GradientTransformationExtraArgs:
    r"""Weights each task by the running average of its loss relative to before.

    .. math:: \lambda(t) = \alpha \big(b\,\lambda(t-1) + (1-b)\,\hat\lambda(t, 0)\big)
              + (1-\alpha)\,\hat\lambda(t, t-1), \quad
              \hat\lambda_k(t, t') = K\,\mathrm{softmax}_k \frac{L_k(t)}{T\,L_k(t')}

    with :math:`b \sim \mathrm{Bernoulli}(\rho)`, one draw for all tasks, so now and then the
    progress since the start is what counts. The schedule is that of the authors' code: the weights
    are 1 in the first step; in the second :math:`\alpha = 0`, so that they jump to
    :math:`\hat\lambda(t, t-1)`, and its losses are L(0) from then on; :math:`\alpha` is `decay`
    from the third on. They do not depend on the units of the losses, which should not change sign.
    Each task counts its own steps: those with a loss that is finite and not 0. One that is absent,
    or has no two such losses to compare, keeps its weight; the others share the rest of K.

    Args:
      num_tasks: number of tasks K; static, at least 1.
      key: a typed random key, split in state.
      decay: alpha in [0, 1] from the third step on, weight of the past; larger is smoother.
      temperature: softmax temperature T, unitless, > 0; larger is more even.
      rho: mean of b in [0, 1]; smaller looks back more often.

    Returns:
      A balancer: Jacobian in, Jacobian out. Update scale: sum-like (weights sum to K).

    Raises:
      TypeError: if `key` is not a typed random key.
      ValueError: if `num_tasks` < 1, `temperature` <= 0, `decay` or `rho` is not in [0, 1], or the
        losses are not K.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> tx = mtl.scale_by_relobralo(2, key=jax.random.key(0), decay=0.5, temperature=1.0, rho=1.0)
      >>> state = tx.init(None)
      >>> for losses in ([2.0, 2.0], [1.0, 2.0]):
      ...     jac, state = tx.update(jnp.ones((2, 3)), state, losses=jnp.array(losses))
      >>> [round(w, 4) for w in state.weights.tolist()]
      [0.7551, 1.2449]

    Differs from:
      The authors' code compares the losses of a first step that looks back, by a chance of
      1 - rho, with losses of 1; here the weights of the first step are 1.

    References:
      Bischof and Kraus, `Multi-Objective Loss Balancing for Physics-Informed Deep Learning
      <https://arxiv.org/abs/2110.09813>`_, 2021, section III.
    """
    check_num_tasks(num_tasks)
    check_key(key)
    check_option("decay", decay, *UP_TO_ONE)
    check_option("temperature", temperature, lambda t: t > 0, "more than 0")
    check_option("rho", rho, *UP_TO_ONE)

    def init_fn(params):
        del params
        return RelobraloState(
            weights=jnp.ones(num_tasks, jnp.float32),
            initial_losses=jnp.zeros(num_tasks, jnp.float32),
            last_losses=jnp.zeros(num_tasks, jnp.float32),
            key=key,
        )

    def update_fn(jacobian, state, **extra_args):
        del extra_args
        loss = jacobian.loss_vector().astype(jnp.float32)
        usable = jnp.isfinite(loss) & (loss != 0) & jacobian.present
        initial, last = state.initial_losses, state.last_losses
        next_key, draw_key = jax.random.split(state.key)

        def balanced(earlier):
            comparable = usable & (earlier != 0)
            ratio = loss / jnp.where(comparable, earlier, 1)
            room = num_tasks - jnp.sum(jnp.where(comparable, 0, state.weights))
            share = jnp.maximum(room, 0) * softmax_over(comparable, ratio / temperature, comparable)
            return jnp.where(comparable, share, state.weights)

        stays = jax.random.bernoulli(draw_key, jnp.asarray(rho, jnp.float32))
        past = jnp.where(stays, state.weights, balanced(initial))
        compared, is_second = usable & (last != 0), initial == 0
        alpha = jnp.where(compared & is_second, 0, decay)
        weights = alpha * past + (1 - alpha) * balanced(last)
        # Where not all tasks are in their second step together, what they are given is not K.
        room = jnp.sum(jnp.where(compared, state.weights, 0))
        total = jnp.sum(jnp.where(compared, weights, 0))
        weights = jnp.where(compared, divide(room * weights, total), weights)
        new_state = RelobraloState(
            weights=weights.astype(jnp.float32),
            initial_losses=jnp.where(compared & is_second, loss, initial),
            last_losses=jnp.where(usable, loss, last),
            key=next_key,
        )
        return jacobian.scale(weights), new_state

    return link(init_fn, update_fn, num_tasks)


relobralo = summed(scale_by_relobralo)
