"""UPGrad: every task gradient freed of conflict on its own, then averaged."""

import jax.numpy as jnp
import optax

from mtl_optax._numerics import divide, dot
from mtl_optax._options import check_preference
from mtl_optax._typing import TaskOption
from mtl_optax.aggregators._base import shares, solved_aggregator
from mtl_optax.solvers._nonnegative_qp import project_on_cosines


def upgrad(
    num_tasks: int, *, preference: TaskOption | None = None
) -> optax.GradientTransformationExtraArgs:
    r"""Projects each row onto the dual cone of all rows, then averages.

    .. math:: d = \sum_k p_k \, \pi(g_k), \quad
              \pi(v) = \arg\min_u \|u - v\|^2 \;\text{s.t.}\;
              \langle u, g_i\rangle \ge 0 \;\forall i

    The update conflicts with no task: :math:`\langle d, g_i\rangle \ge 0`. It is linear under
    scaling each row, and the mean where no rows conflict. Each projection is a non-negative QP on
    the cosines of the rows, so no precision is lost to unequal norms. A zero row neither conflicts
    nor contributes; where the rows leave no direction without conflict (antiparallel rows, alone)
    d = 0.

    What limits it is the rounding of the Gramian: where rows oppose each other so nearly that their
    weighted sum cancels all but a share of :math:`10^{-3}`, float32 leaves conflicts of cosine
    about :math:`-10^{-4}`. From 32 tasks on the programs are solved side by side, by conjugate
    gradients to the residual of the exact solver: a product of K x K matrices an iteration.

    Args:
      num_tasks: number of tasks K; static, at least 1.
      preference: p, a non-negative number or one a task; None is one over the number of tasks
        present.

    Returns:
      An aggregator: Jacobian in, gradient out. Update scale: mean-like. Its state counts the
      updates whose programs could not be solved, as with NaN rows: uniform weights 1/K.

    Raises:
      ValueError: if `num_tasks` < 1, a preference is negative or all 0, or the losses are not K.

    Examples:
      >>> import jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> J = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
      >>> losses, jac = mtl.value_and_jac(lambda w: J @ w)(jnp.zeros(3))
      >>> tx = mtl.upgrad(num_tasks=2)
      >>> updates, state = tx.update(jac, tx.init(jnp.zeros(3)))
      >>> [round(x, 4) for x in updates.tolist()]
      [0.2924, 1.9006, 1.9006]

    References:
      Quinton and Rey, `Jacobian Descent for Multi-Objective Optimization
      <https://arxiv.org/abs/2406.16232>`_, 2024, sec. 3.
    """
    check_preference(preference)

    def solve(jacobian):
        cosines, norms = jacobian.correlation()
        p = shares(preference, jacobian).astype(norms.dtype)
        solutions = project_on_cosines(cosines)
        lift = divide(dot(p * norms, solutions.x), norms)
        return p + lift, jnp.all(solutions.converged)

    return solved_aggregator(num_tasks, solve)
