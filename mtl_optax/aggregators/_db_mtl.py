"""DB-MTL: balance the losses by their logarithms and the gradients by their norms."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from mtl_optax._numerics import bounded, divide
from mtl_optax._options import BELOW_ONE, check_num_tasks, check_option
from mtl_optax.conditioning import ema_tasks, log_losses
from mtl_optax.links import link
from mtl_optax.states import PerTask


class DbMtlState(NamedTuple):
    """State of the last link of `db_mtl`."""

    weights: PerTask  # (K,) float32, of the averaged rows of the logarithms in the last update


def db_mtl(
    num_tasks: int, *, decay: float | jax.Array = 0.9, decay_sigma: float | jax.Array = 0.5
) -> optax.GradientTransformationExtraArgs:
    r"""Averages the gradients of the log losses and brings all to the norm of the largest.

    .. math:: m_k \leftarrow \beta_t m_k + (1 - \beta_t) \nabla\log L_k, \quad
              \beta_t = \beta / t^{\sigma}, \quad
              d = \max_j \|\hat m_j\| \sum_k \hat m_k / \|\hat m_k\|

    A chain of `log_losses(num_tasks)`, `ema_tasks(num_tasks, decay=...)` and the sum of rows
    normalised on the shared parameters; heads follow their own averaged log loss. The state holds K
    rows. Losses must be positive: one of 0 or less brings its average nothing new, so that the
    trunk goes on along the last direction and the head comes to rest; `unusable` counts it.

    Args:
      num_tasks: number of tasks K; static, at least 1.
      decay: beta in [0, 1), weight of the past at the first update; 0 keeps none.
      decay_sigma: sigma >= 0, how fast that weight falls.

    Returns:
      An aggregator: Jacobian in, gradient out. Update scale: free (K times the largest gradient of
      a log loss).

    Raises:
      ValueError: if `num_tasks` < 1, the options are out of range, or the losses are not K.

    Examples:
      >>> import jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> J = jnp.array([[3.0, 4.0], [0.0, 0.5]])
      >>> tx = mtl.db_mtl(num_tasks=2)
      >>> update, state = tx.update(J, tx.init(jnp.zeros(2)), losses=jnp.array([1.0, 10.0]))
      >>> [round(x, 4) for x in update.tolist()]
      [3.0, 9.0]

    Differs from:
      The authors' code, which does not undo the weight of the zeros that the average starts from,
      and averages the shared rows only.

    References:
      Lin et al., `Dual-Balancing for Multi-Task Learning <https://arxiv.org/abs/2308.12029>`_,
      2023, algorithm 1.
    """
    check_num_tasks(num_tasks)
    check_option("decay", decay, *BELOW_ONE)
    check_option("decay_sigma", decay_sigma, lambda s: s >= 0, "at least 0")
    return optax.chain(
        log_losses(num_tasks),
        ema_tasks(num_tasks, decay=lambda count: decay / (count + 1.0) ** decay_sigma),
        _sum_at_largest_norm(num_tasks),
    )


def _sum_at_largest_norm(num_tasks: int) -> optax.GradientTransformationExtraArgs:
    def init_fn(params):
        del params
        return DbMtlState(jnp.ones(num_tasks, jnp.float32))

    def update_fn(jacobian, state, **extra_args):
        del state, extra_args
        norms = jacobian.norms()
        weights = bounded(divide(jnp.max(norms), norms, 1))
        return jacobian.combine(weights), DbMtlState(bounded(weights, jnp.float32))

    return link(init_fn, update_fn, num_tasks)
