"""Learning-rate annealing for PINNs: bring each term's gradient to the size of the residual's."""

from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mtl_optax._numerics import divide
from mtl_optax._options import BELOW_ONE, check_flag, check_num_tasks, check_option, task_position
from mtl_optax.balancers._base import summed
from mtl_optax.jacobian._rows import magnitudes
from mtl_optax.links import link
from mtl_optax.states import PerTask


class LrAnnealingState(NamedTuple):
    """State of `scale_by_lr_annealing`."""

    weights: Annotated[PerTask, 1.0]  # (K,) float32, of the last update


def scale_by_lr_annealing(
    num_tasks: int,
    *,
    reference: int | str = 0,
    decay: float | jax.Array = 0.9,
    layerwise: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Weights each task by the largest entry of a reference gradient over its own mean entry.

    .. math:: \hat\lambda_k = \frac{\max_i |g_{r,i}|}{\mathrm{mean}_i |\lambda_k g_{k,i}|},
              \quad \lambda_k \leftarrow \beta \lambda_k + (1 - \beta) \hat\lambda_k, \quad
              \lambda_r = 1

    over the entries i of the parameters where the Gramian is measured: the shared ones. The
    reference r is the PDE residual, the others are boundary, initial and data terms. The mean is of
    the *weighted* gradient, as in the authors' code, so that under a constant gradient the weight
    settles at the root of the plain ratio: without it the weight of a term that is nearly solved
    runs away. A ratio that is 0, not finite or has the divisor 0 leaves a weight as it was; so all
    weights are held while the reference is absent or has no gradient.

    The authors' code measures at the weight matrices alone, takes the mean of their means, and
    refreshes the weights every tenth step::

        matrices = lambda params: jax.tree.map(lambda leaf: leaf.ndim == 2, params)
        losses, jac = mtl.value_and_jac(task_losses, gramian_at=matrices)(params)
        tx = mtl.every(10, mtl.lr_annealing(2, reference="pde", layerwise=True))

    Args:
      num_tasks: number of tasks K; static, at least 1.
      reference: the task r, by its name or its position in the order of the losses.
      decay: beta in [0, 1), weight of the past.
      layerwise: whether the mean is that of the means of each parameter array, which gives a small
        array as much say as a large one.

    Returns:
      A balancer: Jacobian in, Jacobian out. Update scale: free (weights are often 10 and more).

    Raises:
      TypeError: if `layerwise` is no bool.
      ValueError: if `num_tasks` < 1, `decay` is not in [0, 1), no task is the reference, or the
        losses are not K.

    Examples:
      >>> import jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> J = jnp.array([[8.0, 0.0], [1.0, 1.0]])
      >>> task_losses = lambda w: {"pde": J[0] @ w, "data": J[1] @ w}
      >>> losses, jac = mtl.value_and_jac(task_losses)(jnp.ones(2))
      >>> tx = mtl.scale_by_lr_annealing(num_tasks=2, reference="pde", decay=0.5)
      >>> jac, state = tx.update(jac, tx.init(jnp.ones(2)))
      >>> dict(zip(jac.names, state.weights.tolist()))
      {'data': 4.5, 'pde': 1.0}
      >>> _, state = tx.update(mtl.value_and_jac(task_losses)(jnp.ones(2))[1], state)
      >>> round(state.weights[0].item(), 4)  # half of 4.5 and of 8 / 4.5
      3.1389

    Differs from:
      The paper writes the average with alpha = 0.9 on the newest ratio, and the mean of the plain
      gradient; its code, which is followed here, has 0.9 on the past and the mean of the weighted
      one. Its code lets all boundary terms share one weight, and uses a new weight from the next
      step on; here each task has its own, and the step that measures it uses it.

    References:
      Wang et al., `Understanding and Mitigating Gradient Pathologies in Physics-Informed Neural
      Networks <https://arxiv.org/abs/2001.04536>`_, 2020, algorithm 1.
    """
    check_num_tasks(num_tasks)
    check_flag("layerwise", layerwise)
    check_option("decay", decay, *BELOW_ONE)

    def init_fn(params):
        del params
        return LrAnnealingState(jnp.ones(num_tasks, jnp.float32))

    def update_fn(jacobian, state, **extra_args):
        del extra_args
        position = task_position("reference", reference, jacobian.names)
        largest, mean = magnitudes(jacobian.measured_rows(), num_tasks, layerwise=layerwise)
        ratio = divide(largest[position], state.weights * mean, jnp.nan)
        weights = decay * state.weights + (1 - decay) * ratio
        weights = jnp.where((ratio > 0) & jnp.isfinite(ratio), weights, state.weights)
        weights = jnp.where(jnp.arange(num_tasks) == position, 1, weights).astype(jnp.float32)
        return jacobian.scale(weights), LrAnnealingState(weights)

    return link(init_fn, update_fn, num_tasks)


lr_annealing = summed(scale_by_lr_annealing)
