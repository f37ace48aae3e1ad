"""Logarithms of the losses: tasks of any magnitude weigh the same."""

from typing import NamedTuple

import jax.numpy as jnp
import optax

from mtl_optax._options import check_num_tasks
from mtl_optax.jacobian import unflatten_losses
from mtl_optax.links import link
from mtl_optax.states import PerTask


class LogLossesState(NamedTuple):
    """State of `log_losses` for a given number of tasks."""

    unusable: PerTask  # (K,) int32, updates in which its loss was not positive or not finite


def log_losses(num_tasks: int | None = None) -> optax.GradientTransformationExtraArgs:
    r"""Replaces each loss by its logarithm.

    .. math:: L_k \to \log L_k, \quad g_k \to g_k / L_k

    Followed by `sum_tasks()` this is the scale-invariant loss :math:`\sum_k \log L_k`. Losses must
    be positive: a loss of 0 or less contributes nothing, neither to the trunk nor to its own head,
    and its logarithm is that of the smallest normal number.

    Args:
      num_tasks: number of tasks K, static, at least 1, and the state counts for each task how often
        its loss was `unusable`: not positive or not finite. None takes any number and counts
        nothing.

    Returns:
      A balancer: Jacobian in, Jacobian out. Update scale: free (1 / L of each task).

    Raises:
      ValueError: if `num_tasks` is given and less than 1, or the losses are not K.

    Examples:
      >>> import jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> losses, jac = mtl.value_and_jac(lambda w: {"a": w @ w, "b": 100 * w @ w})(jnp.ones(2))
      >>> tx = mtl.log_losses()
      >>> jac, state = tx.update(jac, tx.init(jnp.ones(2)))
      >>> jac.rows().tolist()
      [[1.0, 1.0], [1.0, 1.0]]
    """
    if num_tasks is not None:
        check_num_tasks(num_tasks)

    def init_fn(params):
        del params
        return LogLossesState(jnp.zeros(num_tasks or 0, jnp.int32))

    def update_fn(jacobian, state, **extra_args):
        del extra_args
        loss = jacobian.loss_vector()
        positive = jnp.where(loss <= 0, jnp.finfo(loss.dtype).tiny, loss)  # NaN stays
        weights = jnp.where(loss <= 0, 0, 1 / positive)
        log = jnp.where(jacobian.present, jnp.log(positive), 0)
        if num_tasks is not None:
            usable = (loss > 0) & jnp.isfinite(loss)
            state = LogLossesState(state.unusable + ~usable)
        return jacobian.scale(weights, losses=unflatten_losses(log, jacobian.losses)), state

    return link(optax.init_empty_state if num_tasks is None else init_fn, update_fn, num_tasks)
