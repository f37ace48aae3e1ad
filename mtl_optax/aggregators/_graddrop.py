"""GradDrop: keep one sign an entry, drawn by how much of the gradient has it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from mtl_optax._numerics import divide
from mtl_optax._options import UP_TO_ONE, check_key, check_num_tasks, check_option, per_task
from mtl_optax._typing import TaskOption
from mtl_optax.jacobian._rows import per_row
from mtl_optax.links import link


class GraddropState(NamedTuple):
    """State of `graddrop`."""

    key: jax.Array  # typed random key


def graddrop(
    num_tasks: int, *, key: jax.Array, leak: TaskOption = 0.0
) -> optax.GradientTransformationExtraArgs:
    r"""Sums, in every entry, the tasks of one randomly drawn sign.

    .. math:: P = \frac12\left(1 + \frac{\sum_k g_k}{\sum_k |g_k|}\right), \quad
              M_k = [g_k > 0][P > U] + [g_k < 0][P \le U], \quad
              d = \sum_k (\ell_k + (1 - \ell_k) M_k)\, g_k

    element-wise, with one uniform U an entry for all tasks. The share P of the positive sign is a
    number of each entry alone, so the scale of the gradients has no say.

    Args:
      num_tasks: number of tasks K; static, at least 1.
      key: a typed random key, split in state.
      leak: share of a task's gradient that passes whatever its sign, in [0, 1], one for all tasks
        or a tree like the losses; 1 for all is the sum.

    Returns:
      An aggregator: Jacobian in, gradient out. Update scale: sum-like (the sum where all signs
      agree).

    Raises:
      TypeError: if `key` is not a typed random key.
      ValueError: if `num_tasks` < 1, `leak` is not in [0, 1], or the losses are not K.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> J = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
      >>> losses, jac = mtl.value_and_jac(lambda w: J @ w)(jnp.zeros(3))
      >>> tx = mtl.graddrop(num_tasks=2, key=jax.random.key(0))
      >>> updates, state = tx.update(jac, tx.init(jnp.zeros(3)))
      >>> float(updates[0]) in (-4.0, 6.0), updates[1:].tolist()
      (True, [2.0, 2.0])

    Differs from:
      The paper, which drops at a layer of activations, example by example: here at the parameters,
      as the libraries do, since that is what every model has.

    References:
      Chen et al., `Just Pick a Sign <https://arxiv.org/abs/2010.06808>`_, 2020, algorithm 1.
    """
    check_num_tasks(num_tasks)
    check_key(key)
    check_option("leak", leak, *UP_TO_ONE, each=True)

    def init_fn(params):
        del params
        return GraddropState(key)

    def update_fn(jacobian, state, **extra_args):
        del extra_args
        next_key, draw_key = jax.random.split(state.key)
        leaks = per_task("leak", leak, jacobian, 0.0)

        def drop(leaves):
            keys = jax.random.split(draw_key, max(len(leaves), 1))
            return [_drop(rows, leaks, k) for rows, k in zip(leaves, keys, strict=False)]

        return jacobian.reduce(drop), GraddropState(next_key)

    return link(init_fn, update_fn, num_tasks)


def _drop(rows: jax.Array, leaks: jax.Array, key: jax.Array) -> jax.Array:
    size = jnp.sum(jnp.abs(rows), axis=0)
    positive = 0.5 * (1 + divide(jnp.sum(rows, axis=0), size))
    picks_positive = positive > jax.random.uniform(key, rows.shape[1:], rows.dtype)
    kept = jnp.where(picks_positive[None], rows > 0, rows < 0)
    leaked = rows * per_row(leaks, rows).astype(rows.dtype)
    return jnp.sum(jnp.where(kept, rows, leaked), axis=0)
