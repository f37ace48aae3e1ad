"""Random gradient weighting: draw the weights of the rows anew at each update."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from mtl_optax._options import check_key, check_num_tasks
from mtl_optax.jacobian import Jacobian
from mtl_optax.links import dealt, link
from mtl_optax.states import PerTask


class RgwState(NamedTuple):
    """State of `rgw`, and of `scale_by_rlw`."""

    weights: PerTask  # (K,) float32, of the last update
    key: jax.Array  # typed random key


def rgw(num_tasks: int, *, key: jax.Array) -> optax.GradientTransformationExtraArgs:
    r"""Combines the rows with random weights; `rlw` where each head follows its own loss.

    .. math:: d = \sum_k w_k g_k, \quad w_k = K\,\mathrm{softmax}_k(\epsilon), \quad
              \epsilon_k \sim \mathcal N(0, 1)

    Each weight is 1 on average. K counts the tasks present.

    Args:
      num_tasks: number of tasks K; static, at least 1.
      key: a typed random key, split in state.

    Returns:
      An aggregator: Jacobian in, gradient out. Update scale: sum-like (weights sum to K).

    Raises:
      TypeError: if `key` is not a typed random key.
      ValueError: if `num_tasks` < 1 or the losses are not K.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> losses, jac = mtl.value_and_jac(lambda w: {"a": w[0], "b": w[1]})(jnp.ones(2))
      >>> tx = mtl.rgw(num_tasks=2, key=jax.random.key(0))
      >>> updates, state = tx.update(jac, tx.init(jnp.ones(2)))
      >>> round(float(jnp.sum(updates)), 4)
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
        return jacobian.combine(state.weights), state

    return link(init_fn, update_fn, num_tasks)


def random_weights(num_tasks: int, key: jax.Array):
    """`init_fn(params)` of weights of 1, and the function of a state and a Jacobian that draws."""
    check_num_tasks(num_tasks)
    check_key(key)

    def init_fn(params):
        del params
        return RgwState(jnp.ones(num_tasks, jnp.float32), key)

    def draw(state: RgwState, jacobian: Jacobian) -> RgwState:
        next_key, draw_key = jax.random.split(state.key)
        noise = dealt(jax.random.normal(draw_key, (num_tasks,), jnp.float32), jacobian.present)
        weights = jacobian.num_present * jax.nn.softmax(noise, where=jacobian.present)
        return RgwState(weights.astype(jnp.float32), next_key)

    return init_fn, draw
