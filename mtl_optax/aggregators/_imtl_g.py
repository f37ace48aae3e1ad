"""IMTL-G: an update with the same projection on every task's direction."""

import jax.numpy as jnp
import optax

from mtl_optax._numerics import divide
from mtl_optax.aggregators._base import pseudo_solve, relative_norms, solved_aggregator


def imtl_g(num_tasks: int) -> optax.GradientTransformationExtraArgs:
    r"""Combines the rows to the update that projects equally onto all of them.

    .. math:: d = \sum_k \alpha_k g_k, \quad \sum_k \alpha_k = 1, \quad
              \langle d, g_i / \|g_i\|\rangle = \langle d, g_j / \|g_j\|\rangle \;\forall i, j

    With u the unit rows and C their cosines, :math:`\alpha_k \propto (C^+ 1)_k / \|g_k\|`. Weights
    may be negative. Zero rows have no direction and are left out. Of dependent rows it takes the
    least-squares projections: more tasks than parameters admit no equal ones, and opposite rows
    none but 0, for which a third task would have to stand still.

    Args:
      num_tasks: number of tasks K; static, at least 1.

    Returns:
      An aggregator: Jacobian in, gradient out. Update scale: mean-like (weights sum to 1), but
      longer than any row where the sum of the unnormalised weights is near 0. Its state counts the
      updates where that sum is lost in rounding (antiparallel rows, alone) or rows are NaN: uniform
      weights 1/K.

    Raises:
      ValueError: if `num_tasks` < 1 or the losses are not K.

    Examples:
      >>> import jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> J = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
      >>> losses, jac = mtl.value_and_jac(lambda w: J @ w)(jnp.zeros(3))
      >>> tx = mtl.imtl_g(num_tasks=2)
      >>> updates, state = tx.update(jac, tx.init(jnp.zeros(3)))
      >>> [round(x, 4) for x in updates.tolist()]
      [0.0767, 1.0, 1.0]

    Differs from:
      The paper inverts a matrix of differences, which fails on zero or dependent rows; on
      independent rows the two agree.

    References:
      Liu et al., `Towards Impartial Multi-task Learning
      <https://openreview.net/forum?id=IMPnRXEWpvr>`_, 2021, eq. 5.
    """

    def solve(jacobian):
        cosines, norms = jacobian.correlation()
        relative = relative_norms(norms)
        seen = norms > 0
        coefficients, noise = pseudo_solve(cosines, seen.astype(norms.dtype))
        # The smallest row sets the scale; without it a sum of 1 / norm could overflow.
        smallest = jnp.min(jnp.where(seen, relative, 1))
        weights = smallest * divide(coefficients, relative)
        total = jnp.sum(weights)
        noise = jnp.sum(smallest * divide(noise, relative))
        solved = (jnp.abs(total) > noise) & jnp.all(jnp.isfinite(norms))
        # Without a gradient there is nothing to weigh: that is no failure.
        nothing = ~jnp.any(seen)
        weights = weights / jnp.where(total == 0, 1, total)
        weights = jnp.where(nothing, 1 / jacobian.num_present, weights)
        return weights, solved | (nothing & jnp.all(jnp.isfinite(norms)))

    return solved_aggregator(num_tasks, solve)
