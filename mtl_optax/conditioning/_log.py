"""Logarithms of the losses: tasks of any magnitude weigh the same."""

import jax.numpy as jnp
import optax

from mtl_optax.jacobian import unflatten_losses
from mtl_optax.links import link


def log_losses() -> optax.GradientTransformationExtraArgs:
    r"""Replaces each loss by its logarithm.

    .. math:: L_k \to \log L_k, \quad g_k \to g_k / L_k

    Followed by `sum_tasks()` this is the scale-invariant loss :math:`\sum_k \log L_k`. Losses must
    be positive: a loss of 0 or less contributes nothing, and its logarithm is that of the smallest
    normal number.

    Returns:
      A balancer: Jacobian in, Jacobian out. Update scale: free (1 / L of each task).

    Examples:
      >>> import jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> losses, jac = mtl.value_and_jac(lambda w: {"a": w @ w, "b": 100 * w @ w})(jnp.ones(2))
      >>> tx = mtl.log_losses()
      >>> jac, state = tx.update(jac, tx.init(jnp.ones(2)))
      >>> jac.rows().tolist()
      [[1.0, 1.0], [1.0, 1.0]]
    """

    def update_fn(jacobian, state, **extra_args):
        del extra_args
        loss = jacobian.loss_vector()
        positive = jnp.where(loss <= 0, jnp.finfo(loss.dtype).tiny, loss)  # NaN stays
        weights = jnp.where(loss <= 0, 0, 1 / positive)
        losses = unflatten_losses(jnp.log(positive), jacobian.losses)
        return jacobian.scale(weights, losses=losses), state

    return link(optax.init_empty_state, update_fn)
