"""Dynamic task priority: weight the tasks that perform poorly."""

from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mtl_optax._numerics import focal
from mtl_optax._options import BELOW_ONE, check_num_tasks, check_option, per_task
from mtl_optax._typing import TaskOption
from mtl_optax.balancers._base import summed
from mtl_optax.links import link
from mtl_optax.states import PerTask


class DtpState(NamedTuple):
    """State of `scale_by_dtp`."""

    weights: Annotated[PerTask, 1.0]  # (K,) float32, of the last update
    kpis: Annotated[PerTask, jnp.inf]  # (K,) float32, moving averages, inf until a KPI is seen
    invalid: PerTask  # (K,) int32, KPIs seen that were NaN or outside [0, 1]


def scale_by_dtp(
    num_tasks: int, *, gamma: TaskOption = 1.0, decay: float | jax.Array = 0.9
) -> optax.GradientTransformationExtraArgs:
    r"""Weights each task by how far its performance is from perfect.

    .. math:: \lambda_k = -(1 - \bar\kappa_k)^{\gamma_k} \log\bar\kappa_k, \quad
              \bar\kappa_k \leftarrow (1 - \beta)\,\kappa_k + \beta\,\bar\kappa_k

    :math:`\kappa_k \in [0, 1]` is a key performance indicator such as the accuracy, or for a
    regression the share of predictions within a threshold. It comes with each update as the extra
    argument `kpis=`, a tree like the losses, and is not differentiated. Its average starts at the
    first one seen. In a JAX array a KPI outside [0, 1] is clamped and counted in the state; NaN is
    skipped and counted. `mtl.losses` has the accuracy and the share of errors within a tolerance;
    a KPI that is differentiable, and is to be improved for its own sake, goes into the loss by
    `mtl.losses.task_priority`. For the paper's priority among *examples* use the focal losses of
    `mtl.losses` and `optax.losses.sigmoid_focal_loss`.

    Args:
      num_tasks: number of tasks K; static, at least 1.
      gamma: focusing exponent, unitless, >= 0, one for all tasks or a tree like the losses; larger
        turns away faster from tasks that do well.
      decay: beta in [0, 1), weight of the past; 1 - beta is the paper's discount factor alpha.

    Returns:
      A balancer: Jacobian in, Jacobian out. Update scale: free (from 0 for a solved task to about
      14 for a hopeless one).

    Raises:
      TypeError: if `kpis=` is missing.
      ValueError: if `num_tasks` < 1, `gamma` < 0, `decay` is not in [0, 1), the losses or KPIs are
        not K, or a KPI that is a Python or NumPy number is outside [0, 1].

    Examples:
      >>> import jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> losses, jac = mtl.value_and_jac(lambda w: {"a": w @ w, "b": jnp.sum(w)})(jnp.ones(2))
      >>> tx = mtl.scale_by_dtp(num_tasks=2)
      >>> jac, state = tx.update(jac, tx.init(None), kpis={"a": 0.5, "b": 0.9})
      >>> [round(w, 4) for w in state.weights.tolist()]
      [0.3466, 0.0105]

    References:
      Guo et al., `Dynamic Task Prioritization for Multitask Learning
      <https://openaccess.thecvf.com/content_ECCV_2018/html/Michelle_Guo_Focus_on_the_ECCV_2018_paper.html>`_,
      ECCV 2018, eqs. 4-6.
    """
    check_num_tasks(num_tasks)
    check_option("gamma", gamma, lambda g: g >= 0, "at least 0", each=True)
    check_option("decay", decay, *BELOW_ONE)

    def init_fn(params):
        del params
        return DtpState(
            weights=jnp.ones(num_tasks, jnp.float32),
            kpis=jnp.full(num_tasks, jnp.inf, jnp.float32),
            invalid=jnp.zeros(num_tasks, jnp.int32),
        )

    def update_fn(jacobian, state, *, kpis=None, **extra_args):
        del extra_args
        if kpis is None:
            raise TypeError(
                "dtp got no kpis=, expected a key performance indicator in [0, 1] for each of the "
                f"tasks {jacobian.names}: call tx.update(jac, opt_state, params, kpis=accuracies)"
            )
        known = [leaf for leaf in jax.tree.leaves(kpis) if not isinstance(leaf, jax.Array)]
        inside = lambda k: ~((k < 0) | (k > 1))  # noqa: E731, NaN passes
        check_option("kpis", known, inside, "in [0, 1]: a share, not percent", each=True)
        seen = per_task("kpis", jax.lax.stop_gradient(kpis), jacobian).astype(jnp.float32)
        valid = (seen >= 0) & (seen <= 1)  # False for NaN
        clamped = jnp.clip(seen, 0, 1)
        average = decay * state.kpis + (1 - decay) * clamped
        average = jnp.where(jnp.isinf(state.kpis), clamped, average)
        average = jnp.where(jnp.isnan(seen), state.kpis, average)

        # Kept off 1, the weight of a solved task does not vanish for good.
        priority = focal(average, per_task("gamma", gamma, jacobian, 1.0))
        # A task without any KPI yet keeps the weight that it starts with.
        weights = jnp.where(jnp.isinf(average), 1, priority).astype(jnp.float32)
        return jacobian.scale(weights), DtpState(weights, average, state.invalid + ~valid)

    return link(init_fn, update_fn, num_tasks)


dtp = summed(scale_by_dtp)
