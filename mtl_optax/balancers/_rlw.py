"""Random loss weighting: draw the weights anew at each update."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from mtl_optax._links import check_key, check_num_tasks, link
from mtl_optax.balancers._base import summed


class RlwState(NamedTuple):
    """State of `scale_by_rlw`."""

    weights: jax.Array  # (K,) float32, of the last update
    key: jax.Array  # typed random key


def scale_by_rlw(num_tasks: int, *, key: jax.Array) -> optax.GradientTransformationExtraArgs:
    r"""Weights each task at random: the baseline that any strategy should beat.

    .. math:: \lambda_k = K\,\mathrm{softmax}_k(\epsilon), \quad \epsilon_k \sim \mathcal N(0, 1)

    Each weight is 1 on average.

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
      <https://arxiv.org/abs/2111.10603>`_, 2022, algorithm 2.
    """
    check_num_tasks(num_tasks)
    check_key(key)

    def init_fn(params):
        del params
        return RlwState(jnp.ones(num_tasks, jnp.float32), key)

    def update_fn(jacobian, state, **extra_args):
        del extra_args
        next_key, draw_key = jax.random.split(state.key)
        noise = jax.random.normal(draw_key, (num_tasks,), jnp.float32)
        weights = num_tasks * jax.nn.softmax(noise)
        return jacobian.scale(weights), RlwState(weights, next_key)

    return link(init_fn, update_fn, num_tasks)


rlw = summed(scale_by_rlw)
