"""PBI: down along a preference ray, with a penalty for leaving it."""

from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mtl_optax._options import FINITE, check_num_tasks, check_option, check_preference, per_task
from mtl_optax._typing import TaskOption
from mtl_optax._usable import unit_vector
from mtl_optax.balancers._base import summed
from mtl_optax.links import link
from mtl_optax.states import PerTask

# Off the ray by less than this many machine epsilons is on it: the rest is rounding.
_ON_RAY = 8


class PbiState(NamedTuple):
    """State of `scale_by_pbi`."""

    weights: Annotated[PerTask, 1.0]  # (K,) float32, of the last update
    unusable: PerTask  # (K,) int32, updates in which its loss was not finite


def scale_by_pbi(
    num_tasks: int,
    *,
    preference: TaskOption = 1.0,
    penalty: float | jax.Array = 5.0,
    reference: TaskOption = 0.0,
) -> optax.GradientTransformationExtraArgs:
    r"""Weights each task so that their sum descends a penalty-based boundary intersection.

    .. math:: d_1 + \theta d_2, \quad d_1 = \hat r^\top (L - z), \quad
              d_2 = \|L - z - d_1 \hat r\|, \quad
              \lambda = \hat r + \theta\,\frac{L - z - d_1 \hat r}{d_2}

    :math:`d_1` is how far the losses are from the ideal point z along the ray of the preference,
    and :math:`d_2` how far from that ray. On the ray the penalty's subgradient 0 is taken. A weight
    can be negative: a loss far below its share is let rise. The weights do not depend on a common
    unit of the losses.

    Args:
      num_tasks: number of tasks K; static, at least 1.
      preference: r, >= 0, not all 0, one for all tasks or a tree like the losses: the ratio in
        which the losses should stand. One that comes with an update as the extra argument
        `preference=` takes its place.
      penalty: theta >= 0, unitless; larger keeps closer to the ray. The paper uses 5.
      reference: z, in the unit of the losses, in the same forms.

    Returns:
      A balancer: Jacobian in, Jacobian out. Update scale: free (the weights have a norm of 1 on
      the ray and of the root of 1 + theta² elsewhere).

    Raises:
      ValueError: if `num_tasks` < 1, a preference or `penalty` is negative, all preferences are 0,
        or the losses are not K.

    Examples:
      >>> import jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> losses, jac = mtl.value_and_jac(lambda w: {"a": w @ w, "b": 2 * w @ w})(jnp.ones(2))
      >>> tx = mtl.scale_by_pbi(num_tasks=2, penalty=0.5)
      >>> jac, state = tx.update(jac, tx.init(jnp.ones(2)))
      >>> [round(w, 4) for w in state.weights.tolist()]
      [0.3536, 1.0607]

    Differs from:
      A task whose loss is not finite is left out of the objective; its weight is 0, and `unusable`
      counts it.

    References:
      Zhang and Li, `MOEA/D <https://doi.org/10.1109/TEVC.2007.892759>`_, 2007, eq. 5.
    """
    check_num_tasks(num_tasks)
    check_preference(preference)
    check_option("penalty", penalty, lambda theta: theta >= 0, "at least 0")
    check_option("reference", reference, *FINITE, each=True)
    usual_preference = preference

    def init_fn(params):
        del params
        return PbiState(jnp.ones(num_tasks, jnp.float32), jnp.zeros(num_tasks, jnp.int32))

    def update_fn(jacobian, state, *, preference=None, **extra_args):
        del extra_args
        gap = jacobian.loss_vector() - per_task("reference", reference, jacobian, 0.0)
        finite = jnp.isfinite(gap)
        used = finite & jacobian.present
        usual = per_task("preference", usual_preference, jacobian, 1.0)
        r = per_task("preference", preference, jacobian, usual)
        ray, _ = unit_vector(jnp.where(used, r, 0))
        direction, _ = unit_vector(jnp.where(used, gap, 0))
        across, sine = unit_vector(direction - jnp.sum(ray * direction) * ray)
        off_ray = sine > _ON_RAY * jnp.finfo(gap.dtype).eps
        weights = ray + penalty * jnp.where(off_ray, across, 0)
        unusable = state.unusable + ~finite
        return jacobian.scale(weights), PbiState(weights.astype(jnp.float32), unusable)

    return link(init_fn, update_fn, num_tasks)


pbi = summed(scale_by_pbi)
