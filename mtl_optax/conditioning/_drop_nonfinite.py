"""Dropping a task for the steps in which it is NaN or infinite."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from mtl_optax.jacobian import unflatten_losses
from mtl_optax.links import check_num_tasks, link


class DropNonfiniteTasksState(NamedTuple):
    """State of `drop_nonfinite_tasks`."""

    last_losses: jax.Array  # (K,) float32, the last kept ones, 1 until one is seen
    dropped: jax.Array  # (K,) int32, updates in which the task was dropped


def drop_nonfinite_tasks(num_tasks: int) -> optax.GradientTransformationExtraArgs:
    r"""Drops a task while its loss or its row is NaN or infinite.

    .. math:: g_k \to 0 \quad \text{where } L_k \text{ or an entry of } g_k \text{ is not finite}

    The row becomes exactly 0, which a weight of 0 does not do (0 * NaN = NaN), so nothing of it
    reaches the trunk, the other heads or the state of what follows; the task's own head stands
    still. Its loss becomes the last finite one (1 before any), a constant, whose gradient is 0
    indeed: ratios and logarithms that later links take of it stay harmless. Put it first in the
    chain.

    It needs to tell rows apart: give it the Jacobian of `value_and_jac` (`rows="isolated"` or not,
    each loss is then differentiated alone). A `jax.jacrev` tree may have let the NaN into all rows
    already; then all are dropped. Losses computed as one array share a backward pass, and with it
    their NaN.

    While all is finite it stays lazy and costs one backward pass; otherwise K.

    Args:
      num_tasks: number of tasks K; static, at least 1.

    Returns:
      A balancer: Jacobian in, Jacobian out. Update scale: as before.

    Raises:
      ValueError: if `num_tasks` < 1 or the losses are not K.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> import mtl_optax as mtl
      >>> task_losses = lambda w, y: {"a": jnp.sum(w**2), "b": jnp.sum((w - y) ** 2)}
      >>> losses, jac = mtl.value_and_jac(task_losses)(jnp.ones(2), jnp.nan)
      >>> tx = optax.chain(mtl.drop_nonfinite_tasks(num_tasks=2), mtl.sum_tasks())
      >>> updates, state = tx.update(jac, tx.init(jnp.ones(2)))
      >>> updates.tolist(), state[0].dropped.tolist()
      ([2.0, 2.0], [0, 1])
    """
    check_num_tasks(num_tasks)

    def init_fn(params):
        del params
        ones = jnp.ones(num_tasks, jnp.float32)
        return DropNonfiniteTasksState(ones, jnp.zeros(num_tasks, jnp.int32))

    def update_fn(jacobian, state, **extra_args):
        del extra_args
        finite = jacobian.finite_tasks()
        loss = jnp.where(finite, jacobian.loss_vector(), state.last_losses)
        kept = jacobian.keep(finite, losses=unflatten_losses(loss, jacobian.losses))
        dropped = state.dropped + (~finite).astype(jnp.int32)
        return kept, DropNonfiniteTasksState(loss.astype(jnp.float32), dropped)

    return link(init_fn, update_fn, num_tasks)
