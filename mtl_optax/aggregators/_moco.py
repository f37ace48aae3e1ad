"""MoCo: track each task's gradient, and move the weights towards the min-norm point."""

from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mtl_optax._numerics import dot
from mtl_optax._options import BELOW_ONE, check_num_tasks, check_option
from mtl_optax.aggregators._simplex_steps import relative_products, shared_out, simplex_step
from mtl_optax.conditioning import ema_tasks
from mtl_optax.links import link
from mtl_optax.states import PerTask


class MocoState(NamedTuple):
    """State of the last link of `moco`."""

    weights: PerTask  # (K,) float32, of the averaged rows in the last update
    shares: Annotated[PerTask, 1.0]  # (K,) float32, up to a factor where the next update starts
    count: jax.Array  # () int32, updates so far


def moco(
    num_tasks: int,
    *,
    decay: float | jax.Array = 0.5,
    decay_sigma: float | jax.Array = 0.5,
    gamma: float | jax.Array = 0.1,
    gamma_sigma: float | jax.Array = 0.5,
    rho: float | jax.Array = 0.0,
) -> optax.GradientTransformationExtraArgs:
    r"""Corrects the bias of stochastic MGDA by tracking the rows.

    .. math:: y_k \leftarrow y_k - \beta_t (y_k - g_k), \quad
              \lambda \leftarrow \Pi_\Delta\!\left(\lambda - \gamma_t (Y Y^\top + \rho I)
              \lambda\right), \quad d = Y^\top \lambda

    with :math:`\beta_t = \beta / t^{\sigma_\beta}` and :math:`\gamma_t` alike, and
    :math:`\Pi_\Delta` the projection onto the simplex of the tasks present; absent ones keep their
    share of the weights. A chain of `ema_tasks` and the sum with these weights. The state holds K
    rows.

    Args:
      num_tasks: number of tasks K; static, at least 1.
      decay: 1 - beta in [0, 1), weight of the past at the first update.
      decay_sigma: sigma_beta >= 0, how fast beta, the weight of the newest row, falls.
      gamma: > 0, step size of the weights, relative to the mean squared norm of the tracks.
      gamma_sigma: >= 0, how fast it falls.
      rho: >= 0, pull towards even weights, in the same units.

    Returns:
      An aggregator: Jacobian in, gradient out. Update scale: mean-like (weights sum to 1).

    Raises:
      ValueError: if `num_tasks` < 1, an option is out of range, or the losses are not K.

    Examples:
      >>> import jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> J = jnp.array([[2.0, 0.0], [0.0, 1.0]])
      >>> tx = mtl.moco(num_tasks=2)
      >>> update, state = tx.update(J, tx.init(jnp.zeros(2)), losses=jnp.ones(2))
      >>> [round(x, 4) for x in update.tolist()]
      [0.94, 0.53]

    Differs from:
      The paper's step size is absolute, so it depends on the units of the losses: here
      :math:`Y Y^\top` is divided by the mean of its diagonal. The tracks are debiased, so the first
      is the first row. Well-known implementations replace the projection by a softmax of the
      weights, which can't reach the simplex's boundary.

    References:
      Fernando et al., `Mitigating Gradient Bias in Multi-objective Learning
      <https://openreview.net/forum?id=dLAYGdKTi2>`_, ICLR 2023, algorithm 1.
    """
    check_num_tasks(num_tasks)
    check_option("decay", decay, *BELOW_ONE)
    check_option("gamma", gamma, lambda g: g > 0, "more than 0")
    for name, value in (("decay_sigma", decay_sigma), ("gamma_sigma", gamma_sigma), ("rho", rho)):
        check_option(name, value, lambda x: x >= 0, "at least 0")
    return optax.chain(
        ema_tasks(num_tasks, decay=lambda count: 1 - (1 - decay) / (count + 1.0) ** decay_sigma),
        _sum_with_moved_weights(num_tasks, gamma, gamma_sigma, rho),
    )


def _sum_with_moved_weights(num_tasks, gamma, gamma_sigma, rho):
    def init_fn(params):
        del params
        ones = jnp.ones(num_tasks, jnp.float32)
        return MocoState(ones / num_tasks, ones, jnp.zeros([], jnp.int32))

    def update_fn(jacobian, state, **extra_args):
        del extra_args
        present = jacobian.present
        w, mass = shared_out(state.shares, present)
        products = relative_products(jacobian, jacobian, present).astype(jnp.float32)
        step_size = gamma / (state.count + 1.0) ** gamma_sigma
        weights = simplex_step(w, dot(products, w) + rho * w, step_size, present)
        count = jnp.asarray(optax.safe_increment(state.count))
        return jacobian.combine(weights), MocoState(weights, mass * weights, count)

    return link(init_fn, update_fn, num_tasks)
