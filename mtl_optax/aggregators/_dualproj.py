"""DualProj: the mean gradient, freed of conflict."""

import optax

from mtl_optax._numerics import divide, dot
from mtl_optax._options import check_preference
from mtl_optax._typing import TaskOption
from mtl_optax.aggregators._base import relative_norms, shares, solved_aggregator
from mtl_optax.solvers._nonnegative_qp import nonnegative_qp_of_cosines


def dualproj(
    num_tasks: int, *, preference: TaskOption | None = None
) -> optax.GradientTransformationExtraArgs:
    r"""Projects the mean row onto the dual cone of all rows.

    .. math:: d = \arg\min_u \|u - \textstyle\sum_k p_k g_k\|^2
              \;\text{s.t.}\; \langle u, g_i\rangle \ge 0 \;\forall i

    The nearest update to the mean that conflicts with no task; the mean itself where it does not.
    Of episodic memory (GEM) it is the projection without a margin. Unlike in `upgrad`, rows of
    large norm decide the direction. Degenerate rows and the limit of float32 are as in `upgrad`.

    Args:
      num_tasks: number of tasks K; static, at least 1.
      preference: p, a non-negative number or one a task; None is one over the number of tasks
        present.

    Returns:
      An aggregator: Jacobian in, gradient out. Update scale: mean-like, no longer than the mean.
      Its state counts the updates whose program could not be solved, as with NaN rows: uniform
      weights 1/K.

    Raises:
      ValueError: if `num_tasks` < 1, a preference is negative or all 0, or the losses are not K.

    Examples:
      >>> import jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> J = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
      >>> losses, jac = mtl.value_and_jac(lambda w: J @ w)(jnp.zeros(3))
      >>> tx = mtl.dualproj(num_tasks=2)
      >>> updates, state = tx.update(jac, tx.init(jnp.zeros(3)))
      >>> [round(x, 4) for x in updates.tolist()]
      [0.5556, 1.1111, 1.1111]

    References:
      Lopez-Paz and Ranzato, `Gradient Episodic Memory for Continual Learning
      <https://arxiv.org/abs/1706.08840>`_, 2017, eq. 8-11.
    """
    check_preference(preference)

    def solve(jacobian):
        cosines, norms = jacobian.correlation()
        p = shares(preference, jacobian).astype(norms.dtype)
        relative = relative_norms(norms)
        solution = nonnegative_qp_of_cosines(cosines, dot(cosines, p * relative))
        return p + divide(solution.x, relative), solution.converged

    return solved_aggregator(num_tasks, solve)
