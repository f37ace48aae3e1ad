"""Gradient-norm weights: every term of a physics-informed loss pulls with one norm."""

from typing import Annotated, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mtl_optax._numerics import divide
from mtl_optax._options import BELOW_ONE, check_choice, check_num_tasks, check_option
from mtl_optax.balancers._base import summed
from mtl_optax.links import link
from mtl_optax.states import PerTask

TARGETS = ("mean", "sum")


class GradNormWeightsState(NamedTuple):
    """State of `scale_by_grad_norm_weights`."""

    weights: Annotated[PerTask, 1.0]  # (K,) float32, of the last update


def scale_by_grad_norm_weights(
    num_tasks: int, *, to: Literal["mean", "sum"] = "mean", decay: float | jax.Array = 0.9
) -> optax.GradientTransformationExtraArgs:
    r"""Weights each task by the inverse of its gradient norm, averaged over the updates.

    .. math:: \hat\lambda_k = \frac{\mathrm{mean}_j \|g_j\|}{\|g_k\|}, \quad
              \lambda_k \leftarrow \beta \lambda_k + (1 - \beta) \hat\lambda_k

    What the codes of physics-informed networks call their "grad norm" weights, which are not those
    of GradNorm, `gradnorm`: no rate of training has a say, and none is learned. The mean is over
    the tasks present. A gradient that is 0 or not finite leaves its weight as it was.

    The weights move slowly, so those codes refresh them every thousand steps, which costs about
    what a plain step does: `mtl.every(1000, mtl.grad_norm_weights(K))`.

    Args:
      num_tasks: number of tasks K; static, at least 1.
      to: `"mean"` as in jaxpi, the authors' code; `"sum"` as in their paper, K times as large in
        the end: the sum of the norms stands in place of their mean.
      decay: beta in [0, 1), weight of the past.

    Returns:
      A balancer: Jacobian in, Jacobian out. Update scale: sum-like (K rows of the mean norm, in the
      end), or K times that with `to="sum"`.

    Raises:
      ValueError: if `num_tasks` < 1, an option is out of range, or the losses are not K.

    Examples:
      >>> import jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> J = jnp.array([[3.0, 4.0], [0.0, 1.0]])
      >>> losses, jac = mtl.value_and_jac(lambda w: {"bc": J[1] @ w, "pde": J[0] @ w})(jnp.ones(2))
      >>> tx = mtl.scale_by_grad_norm_weights(num_tasks=2, decay=0.5)
      >>> jac, state = tx.update(jac, tx.init(jnp.ones(2)))
      >>> {name: round(float(w), 4) for name, w in zip(jac.names, state.weights)}
      {'bc': 2.0, 'pde': 0.8}

    References:
      Wang et al., `An Expert's Guide to Training Physics-informed Neural Networks
      <https://arxiv.org/abs/2308.08468>`_, 2023, algorithm 1.
    """
    check_num_tasks(num_tasks)
    check_choice("to", to, TARGETS)
    check_option("decay", decay, *BELOW_ONE)

    def init_fn(params):
        del params
        return GradNormWeightsState(jnp.ones(num_tasks, jnp.float32))

    def update_fn(jacobian, state, **extra_args):
        del extra_args
        norms = jacobian.norms()
        finite = jnp.isfinite(norms)
        largest = jnp.max(jnp.where(finite, norms, 0))
        relative = jnp.where(finite, divide(norms, largest), 0)  # a sum of norms may overflow
        total = jnp.sum(relative)
        if to == "mean":
            total = total / jnp.maximum(jnp.sum(finite & jacobian.present), 1)
        ratio = divide(total, relative, jnp.nan)
        mixed = (decay * state.weights + (1 - decay) * ratio).astype(jnp.float32)
        weights = jnp.where(jnp.isfinite(mixed), mixed, state.weights)
        return jacobian.scale(weights), GradNormWeightsState(weights)

    return link(init_fn, update_fn, num_tasks)


grad_norm_weights = summed(scale_by_grad_norm_weights)
