"""Clipping a task at a time, so that no task drowns the others."""

import jax.numpy as jnp
import optax

from mtl_optax._numerics import divide
from mtl_optax._options import check_option, per_task
from mtl_optax._typing import TaskOption
from mtl_optax.links import link


def clip_tasks(max_norm: TaskOption) -> optax.GradientTransformationExtraArgs:
    r"""Scales each row down to at most a norm.

    .. math:: g_k \to g_k \min(1, c_k / \|g_k\|)

    Unlike `optax.clip_by_global_norm` after the aggregator, one task's exploding gradient leaves
    the others as they are. Norms are those of the Gramian; whole rows are scaled, heads and losses
    too.

    Args:
      max_norm: c > 0, in units of the gradients, one for all tasks or a tree like the losses.

    Returns:
      A balancer: Jacobian in, Jacobian out. Update scale: sum-like, at most K times `max_norm`.

    Raises:
      ValueError: if `max_norm` is not positive or does not fit the losses.

    Examples:
      >>> import jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> J = jnp.array([[3.0, 4.0], [0.0, 0.5]])
      >>> losses, jac = mtl.value_and_jac(lambda w: J @ w)(jnp.ones(2))
      >>> tx = mtl.clip_tasks(1.0)
      >>> jac, state = tx.update(jac, tx.init(jnp.ones(2)))
      >>> print(jac.rows())
      [[0.6 0.8]
       [0.  0.5]]
    """
    check_option("max_norm", max_norm, lambda c: c > 0, "more than 0", each=True)

    def update_fn(jacobian, state, **extra_args):
        del extra_args
        limits = per_task("max_norm", max_norm, jacobian, jnp.inf)
        norms = jacobian.norms()
        weights = jnp.where(norms > limits, divide(limits, norms), 1)
        return jacobian.scale(weights), state

    return link(optax.init_empty_state, update_fn)
