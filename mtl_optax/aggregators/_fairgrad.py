"""FairGrad: an α-fair split of the improvement between the tasks."""

import jax
import jax.numpy as jnp
import optax

from mtl_optax._options import check_option
from mtl_optax.aggregators._base import Heads, solved_aggregator
from mtl_optax.solvers._power_equilibrium import power_equilibrium


def fairgrad(
    num_tasks: int, *, alpha: float | jax.Array = 1.0, heads: Heads = "own"
) -> optax.GradientTransformationExtraArgs:
    r"""Combines the rows to the update that splits the improvement fairly.

    .. math:: d = \sum_k w_k g_k, \quad J J^\top w = w^{-1/\alpha}, \quad w > 0

    It maximises :math:`\sum_k \langle d, g_k\rangle^{1-\alpha} / (1 - \alpha)` over a ball: 1 is
    proportional fairness and the same as `nash_mtl`, 2 the least potential delay, and
    :math:`\alpha \to \infty` raises the worst task as MGDA does. Every task improves,
    :math:`\langle d, g_k\rangle = w_k^{-1/\alpha}`. Zero and Pareto-stationary rows are as in
    `nash_mtl`.

    Args:
      num_tasks: number of tasks K; static, at least 1.
      alpha: fairness, unitless, > 0; larger favours the task that improves least.
      heads: `"own"`, each head follows its own loss, or `"weighted"`, its weighted one: see
        `mtl_optax.aggregators`.

    Returns:
      An aggregator: Jacobian in, gradient out. Update scale: free; rows s times as long give an
      update :math:`s^{(1-\alpha)/(1+\alpha)}` times as long, in the same direction (norm √K at
      alpha = 1). Its state counts the updates that could not be solved, as with NaN rows: uniform
      weights 1/K.

    Raises:
      ValueError: if `num_tasks` < 1, `alpha` <= 0, `heads` is neither, or the losses are not K.

    Examples:
      >>> import jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> J = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
      >>> losses, jac = mtl.value_and_jac(lambda w: J @ w)(jnp.zeros(3))
      >>> tx = mtl.fairgrad(num_tasks=2)
      >>> updates, state = tx.update(jac, tx.init(jnp.zeros(3)))
      >>> [round(x, 4) for x in updates.tolist()], [round(w, 4) for w in state.weights.tolist()]
      ([0.0766, 0.9985, 0.9985], [0.5915, 0.4071])

    Differs from:
      The authors' code solves by least squares within its tolerances, whose answer is not exact
      where the rows are badly scaled. The heads follow their own losses there too, in LibMTL the
      weighted ones.

    References:
      Ban and Ji, `Fair Resource Allocation in Multi-Task Learning
      <https://arxiv.org/abs/2402.15638>`_, 2024, eq. 6 (solved there by least squares).
    """
    check_option("alpha", alpha, lambda x: x > 0, "a fairness above 0")

    def solve(jacobian):
        products, scales = jacobian.scaled_gramian()
        power = 1 / jnp.asarray(alpha, scales.dtype)
        solution = power_equilibrium(products, scales, power=power)
        return solution.x, solution.converged

    return solved_aggregator(num_tasks, solve, heads=heads)
