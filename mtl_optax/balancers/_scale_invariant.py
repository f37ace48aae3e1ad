"""The sum of the log losses: tasks of any magnitude weigh the same."""

import optax

from mtl_optax._options import check_num_tasks
from mtl_optax.aggregators._sum import sum_tasks
from mtl_optax.conditioning import log_losses


def scale_invariant(num_tasks: int) -> optax.GradientTransformationExtraArgs:
    r"""Descends the sum of the log losses: `log_losses` followed by `sum_tasks()`.

    .. math:: d = \sum_k \nabla \log L_k = \sum_k g_k / L_k

    The update does not depend on the unit of any loss. Losses must be positive: a task whose loss
    is 0 or negative gets nothing, neither on the trunk nor on its own head, and `unusable` in the
    state counts it.

    Args:
      num_tasks: number of tasks K; static, at least 1.

    Returns:
      A whole strategy: Jacobian in, gradient out. Update scale: free (1 / L of each task).

    Raises:
      ValueError: if `num_tasks` < 1 or the losses are not K.

    Examples:
      >>> import jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> losses, jac = mtl.value_and_jac(lambda w: {"a": w @ w, "b": 100 * w @ w})(jnp.ones(2))
      >>> tx = mtl.scale_invariant(num_tasks=2)
      >>> update, state = tx.update(jac, tx.init(jnp.ones(2)))
      >>> update.tolist()
      [2.0, 2.0]
    """
    check_num_tasks(num_tasks)
    return optax.chain(log_losses(num_tasks), sum_tasks())
