"""Nash-MTL: the Nash bargaining solution of the tasks."""

import jax
import jax.numpy as jnp
import optax

from mtl_optax._numerics import dot, safe_sqrt
from mtl_optax._options import check_option
from mtl_optax.aggregators._base import Heads, Solved, solved_aggregator
from mtl_optax.solvers._power_equilibrium import power_equilibrium


def nash_mtl(
    num_tasks: int, *, max_norm: float | jax.Array | None = None, heads: Heads = "own"
) -> optax.GradientTransformationExtraArgs:
    r"""Combines the rows to the update on which the tasks, bargaining, would agree.

    .. math:: d = \sum_k \alpha_k g_k, \quad J J^\top \alpha = 1 / \alpha, \quad \alpha > 0

    It maximises :math:`\sum_k \log\langle d, g_k\rangle` over a ball: the sum of relative gains,
    whatever the scale of each loss. Every task improves: :math:`\langle d, g_k\rangle =
    1/\alpha_k`. Newton's method solves it on the cosines of the rows to rounding.

    The definition fixes :math:`\|d\| = \sqrt K` whatever the norms of the rows: the update does not
    shrink towards a minimum, so give the optimizer a decaying learning rate or set `max_norm`. Zero
    rows are left out (K counts the others). Where no direction improves every task
    (Pareto-stationary rows) there is no solution; d is then that of a Jacobian that differs by
    rounding, and shorter: 0 for antiparallel rows alone.

    Args:
      num_tasks: number of tasks K; static, at least 1.
      max_norm: shortens longer updates of the shared parameters to this norm, > 0; None does not.
      heads: `"own"`, each head follows its own loss, or `"weighted"`, its weighted one: see
        `mtl_optax.aggregators`.

    Returns:
      An aggregator: Jacobian in, gradient out. Update scale: of norm √K, or `max_norm` if that is
      less. Its state counts the updates that could not be solved, as with NaN rows: uniform weights
      1/K.

    Raises:
      ValueError: if `num_tasks` < 1, `max_norm` <= 0, `heads` is neither, or the losses are not K.

    Examples:
      >>> import jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> J = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
      >>> losses, jac = mtl.value_and_jac(lambda w: J @ w)(jnp.zeros(3))
      >>> tx = mtl.nash_mtl(num_tasks=2)
      >>> updates, state = tx.update(jac, tx.init(jnp.zeros(3)))
      >>> [round(x, 4) for x in updates.tolist()], [round(w, 4) for w in state.weights.tolist()]
      ([0.0766, 0.9985, 0.9985], [0.5915, 0.4071])

    Differs from:
      The published code approximates the solution by a few convex-concave steps, keeps the last
      weights where its solver fails, and has `max_norm=1` and `heads="weighted"`. It divides the
      Gramian by its norm first, so that its d is the root of that norm times as long before it is
      shortened: below `max_norm` where gradients are small.

    References:
      Navon et al., `Multi-Task Learning as a Bargaining Game <https://arxiv.org/abs/2202.01017>`_,
      2022, claim 3.1.
    """
    if max_norm is not None:
        check_option("max_norm", max_norm, lambda x: x > 0, "a norm above 0, or None")

    def solve(jacobian):
        products, scales = jacobian.scaled_gramian()
        solution = power_equilibrium(products, scales)
        weights = solution.x
        if max_norm is None:
            return weights, solution.converged
        coefficients = scales * weights
        square = dot(coefficients, dot(products, coefficients))
        norm = safe_sqrt(square)
        return Solved(weights, solution.converged, max_norm / jnp.maximum(norm, max_norm))

    return solved_aggregator(num_tasks, solve, heads=heads)
