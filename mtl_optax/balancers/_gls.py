"""Geometric loss strategy: descend the geometric mean of the losses."""

from typing import Annotated, NamedTuple

import jax.numpy as jnp
import optax

from mtl_optax._options import check_num_tasks
from mtl_optax._usable import bounded_exp, positive_log
from mtl_optax.balancers._base import summed
from mtl_optax.links import link
from mtl_optax.states import PerTask


class GlsState(NamedTuple):
    """State of `scale_by_gls`."""

    weights: Annotated[PerTask, 1.0]  # (K,) float32, of the last update
    unusable: PerTask  # (K,) int32, updates in which its loss was not positive or not finite


def scale_by_gls(num_tasks: int) -> optax.GradientTransformationExtraArgs:
    r"""Weights each task so that their sum descends the geometric mean of the losses.

    .. math:: M = \Big(\prod_k L_k\Big)^{1/K}, \quad
              \lambda_k = \frac{\partial M}{\partial L_k} = \frac{M}{K L_k}

    Computed from logarithms: no product under- or overflows. The direction does not depend on the
    unit of any loss. Losses must be positive; a task whose loss is 0 (solved), negative or not
    finite gets weight 0 and `unusable` counts it, and M is the mean of the others.

    Args:
      num_tasks: number of tasks K; static, at least 1.

    Returns:
      A balancer: Jacobian in, Jacobian out. Update scale: free (mean-like for equal losses; for
      others the weights sum to more than 1).

    Raises:
      ValueError: if `num_tasks` < 1 or the losses are not K.

    Examples:
      >>> import jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> losses, jac = mtl.value_and_jac(lambda w: {"a": w @ w, "b": 4 * w @ w})(jnp.ones(2))
      >>> tx = mtl.scale_by_gls(num_tasks=2)
      >>> jac, state = tx.update(jac, tx.init(jnp.ones(2)))
      >>> [round(w, 4) for w in state.weights.tolist()]
      [1.0, 0.25]

    Differs from:
      Where a loss is exactly 0, M and the weights of the other tasks would be 0 for good; here
      that task is left out.

    References:
      Chennupati et al., `MultiNet++ <https://arxiv.org/abs/1904.08492>`_, 2019, eq. 2.
    """
    check_num_tasks(num_tasks)

    def init_fn(params):
        del params
        return GlsState(jnp.ones(num_tasks, jnp.float32), jnp.zeros(num_tasks, jnp.int32))

    def update_fn(jacobian, state, **extra_args):
        del extra_args
        log, usable = positive_log(jacobian.loss_vector())
        count = jnp.maximum(jnp.sum(usable), 1).astype(log.dtype)
        weights = bounded_exp(jnp.sum(log) / count - log) / count
        weights = jnp.where(usable, weights, 0)
        unusable = state.unusable + ~usable
        return jacobian.scale(weights), GlsState(weights.astype(jnp.float32), unusable)

    return link(init_fn, update_fn, num_tasks)


gls = summed(scale_by_gls)
