"""Dropping a task for the steps in which it is NaN or infinite."""

from typing import NamedTuple

import jax.numpy as jnp
import optax

from mtl_optax._options import check_num_tasks
from mtl_optax.links import link
from mtl_optax.states import PerTask


class DropNonfiniteTasksState(NamedTuple):
    """State of `drop_nonfinite_tasks`."""

    dropped: PerTask  # (K,) int32, updates in which the task was dropped


def drop_nonfinite_tasks(num_tasks: int) -> optax.GradientTransformationExtraArgs:
    r"""Drops a task while its loss or its row is NaN or infinite.

    .. math:: g_k \to 0 \quad \text{where } L_k \text{ or an entry of } g_k \text{ is not finite}

    It finds such tasks and marks them absent, as `present=` would: every link behind it does what
    it would do for the other tasks alone, and holds what it knows of this one; the task's own head
    stands still. A weight of 0 does not do that (0 * NaN = NaN). Put it first in the chain.

    It needs to tell rows apart: give it the Jacobian of `value_and_jac` (`rows="isolated"` or not,
    each loss is then differentiated alone). A `jax.jacrev` tree may have let the NaN into all rows
    already; then all are dropped. Losses computed as one array share a backward pass, and with it
    their NaN.

    It costs one backward pass while all is finite; otherwise K.

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
        return DropNonfiniteTasksState(jnp.zeros(num_tasks, jnp.int32))

    def update_fn(jacobian, state, **extra_args):
        del extra_args
        finite = jacobian.finite_tasks()
        return jacobian.keep(finite), DropNonfiniteTasksState(state.dropped + ~finite)

    return link(init_fn, update_fn, num_tasks)
