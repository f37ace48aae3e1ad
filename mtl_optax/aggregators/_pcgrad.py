"""PCGrad: project conflicting task gradients off one another."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from mtl_optax._numerics import bounded, divide, dot
from mtl_optax._options import check_key, check_num_tasks
from mtl_optax.aggregators._base import finite_correlation, random_orders
from mtl_optax.links import link
from mtl_optax.states import PerTask


class PcgradState(NamedTuple):
    """State of `pcgrad`."""

    weights: PerTask  # (K,) float32, of the rows in the last update
    key: jax.Array  # typed random key


def pcgrad(num_tasks: int, *, key: jax.Array) -> optax.GradientTransformationExtraArgs:
    r"""Projects each row off every row that it conflicts with, then sums.

    .. math:: v_i \leftarrow v_i - \frac{\langle v_i, g_j\rangle}{\|g_j\|^2} g_j
              \quad \text{for } j \ne i \text{ in random order, where } \langle v_i, g_j\rangle < 0,
              \qquad d = \sum_i v_i

    Starting from :math:`v_i = g_i` and against the original :math:`g_j`. It runs on the K
    coefficients of each :math:`v_i`, so it costs the Gramian and no more.

    Args:
      num_tasks: number of tasks K; static, at least 1.
      key: a typed random key, split in state: the order is drawn anew for each task and update.

    Returns:
      An aggregator: Jacobian in, gradient out. Update scale: sum-like (the sum where no rows
      conflict).

    Raises:
      TypeError: if `key` is not a typed random key.
      ValueError: if `num_tasks` < 1 or the losses are not K.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> J = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
      >>> losses, jac = mtl.value_and_jac(lambda w: J @ w)(jnp.zeros(3))
      >>> tx = mtl.pcgrad(num_tasks=2, key=jax.random.key(0))
      >>> updates, state = tx.update(jac, tx.init(jnp.zeros(3)))
      >>> [round(x, 4) for x in updates.tolist()]
      [0.5848, 3.8012, 3.8012]

    References:
      Yu et al., `Gradient Surgery for Multi-Task Learning <https://arxiv.org/abs/2001.06782>`_,
      2020, algorithm 1.
    """
    check_num_tasks(num_tasks)
    check_key(key)

    def init_fn(params):
        del params
        return PcgradState(jnp.ones(num_tasks, jnp.float32), key)

    def update_fn(jacobian, state, **extra_args):
        del extra_args
        next_key, order_key = jax.random.split(state.key)
        cosines, norms, good = finite_correlation(jacobian)
        orders = random_orders(order_key, jacobian.present)
        weights = jnp.where(good, _projected_weights(cosines, norms, orders), 1)
        update = jacobian.combine(weights)
        return update, PcgradState(bounded(weights, jnp.float32), next_key)

    return link(init_fn, update_fn, num_tasks)


def _projected_weights(cosines: jax.Array, norms: jax.Array, orders: jax.Array) -> jax.Array:
    num_tasks = norms.shape[0]
    tasks = jnp.arange(num_tasks)

    def project(task, order):
        def off(position, coefficients):
            other = order[position]
            product = dot(cosines[other], coefficients)
            conflict = (product < 0) & (other != task)
            return coefficients.at[other].add(jnp.where(conflict, -product, 0))

        # Coefficients of unit rows, where a projection subtracts the cosine itself.
        unit = (tasks == task).astype(norms.dtype)
        return jax.lax.fori_loop(0, num_tasks, off, unit)

    total = dot(norms, jax.vmap(project)(tasks, orders))
    return bounded(divide(total, norms))
