"""Random loss weighting: draw the weights anew at each update."""

import jax
import optax

from mtl_optax.aggregators._rgw import random_weights
from mtl_optax.balancers._base import summed
from mtl_optax.links import link


def scale_by_rlw(num_tasks: int, *, key: jax.Array) -> optax.GradientTransformationExtraArgs:
    r"""Weights each task at random: the baseline that any strategy should beat.

    .. math:: \lambda_k = K\,\mathrm{softmax}_k(\epsilon), \quad \epsilon_k \sim \mathcal N(0, 1)

    Each weight is 1 on average. K counts the tasks present.

    Args:
      num_tasks: number of tasks K; static, at least 1.
      key: a typed random key, split in state.

    Returns:
      A balancer: Jacobian in, Jacobian out. Update scale: sum-like (weights sum to K).

    Raises:
      TypeError: if `key` is not a typed random key.
      ValueError: if `num_tasks` < 1 or the losses are not K.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> losses, jac = mtl.value_and_jac(lambda w: {"a": w @ w, "b": jnp.sum(w)})(jnp.ones(2))
      >>> tx = mtl.scale_by_rlw(num_tasks=2, key=jax.random.key(0))
      >>> jac, state = tx.update(jac, tx.init(jnp.ones(2)))
      >>> round(float(jnp.sum(state.weights)), 4)
      2.0

    Differs from:
      The paper's weights sum to 1; here to K, so that the learning rate keeps its meaning.

    References:
      Lin et al., `Reasonable Effectiveness of Random Weighting
      <https://arxiv.org/abs/2111.10603>`_, 2022.
    """
    init_fn, draw = random_weights(num_tasks, key)

    def update_fn(jacobian, state, **extra_args):
        del extra_args
        state = draw(state, jacobian)
        return jacobian.scale(state.weights), state

    return link(init_fn, update_fn, num_tasks)


rlw = summed(scale_by_rlw)
