"""IMTL: learned loss scales, then equal projections."""

import optax

from mtl_optax.aggregators._imtl_g import imtl_g
from mtl_optax.balancers._imtl_l import scale_by_imtl_l


def imtl(
    num_tasks: int, *, optimizer: optax.GradientTransformation | None = None
) -> optax.GradientTransformationExtraArgs:
    r"""Impartial learning of losses and gradients: `scale_by_imtl_l` followed by `imtl_g`.

    The losses are brought to a common scale, then the update has equal projections on the unit
    gradients of all tasks. On the shared parameters the first changes the length of the update, not
    its direction; the heads follow their scaled losses.

    Args:
      num_tasks: number of tasks K; static, at least 1.
      optimizer: as in `scale_by_imtl_l`.

    Returns:
      A whole strategy: Jacobian in, gradient out. Update scale: mean-like (the weights of
      the scaled rows sum to 1).

    Raises:
      ValueError: if `num_tasks` < 1 or the losses are not K.

    Examples:
      >>> import jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> losses, jac = mtl.value_and_jac(lambda w: {"a": w[0], "b": 3 * w[1]})(jnp.ones(2))
      >>> tx = mtl.imtl(num_tasks=2)
      >>> update, state = tx.update(jac, tx.init(jnp.ones(2)))
      >>> [round(x, 4) for x in update.tolist()]
      [0.75, 0.75]

    References:
      Liu et al., `Towards Impartial Multi-Task Learning
      <https://openreview.net/forum?id=IMPnRXEWpvr>`_, ICLR 2021, algorithm 1.
    """
    return optax.chain(scale_by_imtl_l(num_tasks, optimizer=optimizer), imtl_g(num_tasks))
