"""SDMGrad: a stochastic common descent direction, held near a preferred one."""

from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mtl_optax._numerics import dot
from mtl_optax._options import (
    BELOW_ONE,
    check_count,
    check_num_tasks,
    check_option,
    check_preference,
    per_task,
)
from mtl_optax._typing import TaskOption
from mtl_optax.aggregators._modo import batches
from mtl_optax.aggregators._simplex_steps import relative_products, shared_out, simplex_step
from mtl_optax.links import link, presence
from mtl_optax.states import PerTask


class SdmgradState(NamedTuple):
    """State of `sdmgrad`."""

    weights: PerTask  # (K,) float32, of the rows in the last update
    shares: Annotated[PerTask, 1.0]  # (K,) float32, w up to a factor, where the next update starts


def sdmgrad(
    num_tasks: int,
    *,
    pull: float | jax.Array = 0.3,
    preference: TaskOption | None = None,
    learning_rate: float | jax.Array = 1.0,
    momentum: float | jax.Array = 0.5,
    num_steps: int = 20,
) -> optax.GradientTransformationExtraArgs:
    r"""Regularises the min-norm direction towards a preferred one, from independent batches.

    .. math:: \min_{w \in \Delta} \tfrac12 \|J^\top (w + \lambda \tilde w)\|^2, \quad
              w \leftarrow \Pi_\Delta\!\left(w - \eta\, v\right), \;
              v \leftarrow \mu v + J_1 J_2^\top (w + \lambda \tilde w), \quad
              d = \frac{J_3^\top (w + \lambda \tilde w)}{1 + \lambda}

    `update` takes a tuple of Jacobians, one a batch: two, of which the second gives the direction,
    or a third for it. One alone serves for all, with the bias. Absent tasks are as in `modo`.

    Args:
      num_tasks: number of tasks K; static, at least 1.
      pull: lambda >= 0, strength of the pull to the preferred direction.
      preference: w~ >= 0, a tree like the losses; even by default. It is normalised to sum to 1
        over those present.
      learning_rate: eta > 0, of w, relative to the sum of the squared norms of the rows; stable up
        to about 2.
      momentum: mu in [0, 1).
      num_steps: steps of w an update; static, at least 1.

    Returns:
      An aggregator: Jacobians in, gradient out. Update scale: mean-like (weights sum to 1).

    Raises:
      ValueError: if `num_tasks` < 1, an option is out of range, the losses are not K, or there are
        more than three batches.

    Examples:
      >>> import jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> task_losses = lambda w, x: {"a": jnp.mean(2 * w[0] * x), "b": jnp.mean(w[1] * x)}
      >>> w, batches = jnp.ones(2), (jnp.ones(3), 1.1 * jnp.ones(3))
      >>> jacs = tuple(mtl.value_and_jac(task_losses)(w, batch)[1] for batch in batches)
      >>> tx = mtl.sdmgrad(num_tasks=2, learning_rate=0.6, num_steps=100)
      >>> update, state = tx.update(jacs, tx.init(w), w)
      >>> [round(x, 4) for x in state.weights.tolist()]
      [0.2, 0.8]

    Differs from:
      The product of the batches is divided by the sum of :math:`\|g_k\| \|g'_k\|`. The authors'
      code divides by the squared mean root of its diagonal plus an epsilon, so that it stalls where
      gradients are small and jumps where the diagonal is negative; and with its rate of 10 the
      steps diverge from corner to corner of the simplex, so that rounding decides where they end.

    References:
      Xiao et al., `Direction-oriented Multi-objective Learning
      <https://arxiv.org/abs/2305.18409>`_, 2023, algorithm 1.
    """
    check_num_tasks(num_tasks)
    check_option("pull", pull, lambda x: x >= 0, "at least 0")
    check_option("learning_rate", learning_rate, lambda x: x > 0, "more than 0")
    check_option("momentum", momentum, *BELOW_ONE)
    check_count("num_steps", num_steps)
    check_preference(preference)

    def init_fn(params):
        del params
        ones = jnp.ones(num_tasks, jnp.float32)
        return SdmgradState(ones / num_tasks, ones)

    def update_fn(jacobians, state, **extra_args):
        del extra_args
        first, second, last = batches(jacobians)
        _, present = presence(jacobians)
        num_present = jnp.maximum(jnp.sum(present), 1)
        start, mass = shared_out(state.shares, present)
        products = relative_products(first, second, present).astype(jnp.float32) / num_present
        preferred = per_task("preference", preference, first, 1.0).astype(jnp.float32)
        preferred, _ = shared_out(preferred, present)

        def move(_, carry):
            w, velocity = carry
            towards = w + pull * preferred
            velocity = momentum * velocity + dot(products, towards)
            return simplex_step(w, velocity, learning_rate, present), velocity

        w, _ = jax.lax.fori_loop(0, num_steps, move, (start, jnp.zeros_like(start)))
        weights = (w + pull * preferred) / (1 + pull)
        return last.combine(weights), SdmgradState(weights, mass * w)

    return link(init_fn, update_fn, num_tasks, several=True)
