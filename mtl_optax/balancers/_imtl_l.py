"""IMTL-L: learn a scale for each loss that brings all of them to the same size."""

from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mtl_optax._options import check_num_tasks
from mtl_optax._usable import step_each
from mtl_optax.balancers._base import summed
from mtl_optax.links import link
from mtl_optax.states import PerTask

# exp(88) is close to the largest float32, and 1 / exp(88) is subnormal.
_LARGEST_LOG_SCALE = 87.0


class ImtlLState(NamedTuple):
    """State of `scale_by_imtl_l`."""

    weights: Annotated[PerTask, 1.0]  # (K,) float32, of the last update
    log_scales: PerTask  # (K,) float32, s, for the next update
    opt_state: PerTask  # of the optimizer of each s
    unusable: PerTask  # (K,) int32, updates in which its loss was not positive or not finite


def scale_by_imtl_l(
    num_tasks: int, *, optimizer: optax.GradientTransformation | None = None
) -> optax.GradientTransformationExtraArgs:
    r"""Weights each task by a learned scale that brings its loss to 1.

    .. math:: \mathcal L = \sum_k e^{s_k} L_k - s_k, \quad \lambda_k = e^{s_k}

    Each s starts at 0 and takes a step of its own optimizer along the closed-form gradient
    :math:`e^s L - 1` after its weight is used. For a fixed L it settles where
    :math:`\lambda L = 1`, so the weighted losses become equal. Losses must be positive: another
    one leaves its s where it is, and `unusable` counts it. Chained with `imtl_g` this is the
    paper's IMTL.

    Args:
      num_tasks: number of tasks K; static, at least 1.
      optimizer: updates each s; `optax.adam(1e-2)` by default.

    Returns:
      A balancer: Jacobian in, Jacobian out. Update scale: sum-like at first, then free (about
      that of the sum of the log losses).

    Raises:
      ValueError: if `num_tasks` < 1 or the losses are not K.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> import mtl_optax as mtl
      >>> losses, jac = mtl.value_and_jac(lambda w: {"a": w @ w, "b": 0.25 * w @ w})(jnp.ones(2))
      >>> tx = mtl.scale_by_imtl_l(num_tasks=2, optimizer=optax.sgd(0.1))
      >>> _, state = tx.update(jac, tx.init(jnp.ones(2)))
      >>> [round(s, 4) for s in state.log_scales.tolist()]
      [-0.1, 0.05]

    Differs from:
      The paper trains s with the model's optimizer; here its step is free of the model's learning
      rate and weight decay.

    References:
      Liu et al., `Towards Impartial Multi-Task Learning
      <https://openreview.net/forum?id=IMPnRXEWpvr>`_, ICLR 2021, section 3.2.
    """
    check_num_tasks(num_tasks)
    optimizer = optimizer or optax.adam(1e-2)

    def init_fn(params):
        del params
        s = jnp.zeros(num_tasks, jnp.float32)
        return ImtlLState(
            weights=jnp.ones(num_tasks, jnp.float32),
            log_scales=s,
            opt_state=jax.vmap(optimizer.init)(s),
            unusable=jnp.zeros(num_tasks, jnp.int32),
        )

    def update_fn(jacobian, state, **extra_args):
        del extra_args
        loss = jacobian.loss_vector().astype(jnp.float32)
        usable = (loss > 0) & jnp.isfinite(loss)
        s = state.log_scales
        weights = jnp.exp(s)
        gradient = weights * loss - 1
        next_s, opt_state = step_each(optimizer, state.opt_state, s, gradient, usable)
        next_s = jnp.clip(next_s, -_LARGEST_LOG_SCALE, _LARGEST_LOG_SCALE)
        new_state = ImtlLState(weights, next_s, opt_state, state.unusable + ~usable)
        return jacobian.scale(weights), new_state

    return link(init_fn, update_fn, num_tasks)


imtl_l = summed(scale_by_imtl_l)
