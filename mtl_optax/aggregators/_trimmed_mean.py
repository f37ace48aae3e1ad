"""Trimmed mean: average what is left of each entry without its extremes."""

import functools

import jax
import jax.numpy as jnp
import optax

from mtl_optax._options import check_count, check_num_tasks, check_option
from mtl_optax.jacobian._rows import per_row
from mtl_optax.links import link


def trimmed_mean(
    num_tasks: int, *, trim: int | None = None
) -> optax.GradientTransformationExtraArgs:
    r"""Averages each entry over the tasks but for the b largest and the b smallest.

    .. math:: d = \frac{1}{K - 2b} \sum_{k=b+1}^{K-b} g_{(k)}

    where :math:`g_{(k)}` is the k-th smallest of the entry. Up to b rows may be anything; a NaN
    counts as largest, and is left out with them. :math:`b = \lfloor (K-1)/2 \rfloor` is the median.
    K counts the tasks present: of fewer than 2b + 1 it is their median.

    Args:
      num_tasks: number of tasks K; static, at least 1.
      trim: b, static, less than K / 2; 1 by default, 0 for fewer than three tasks.

    Returns:
      An aggregator: Jacobian in, gradient out. Update scale: mean-like.

    Raises:
      ValueError: if `num_tasks` < 1, `trim` is out of range, or the losses are not K.

    Examples:
      >>> import jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> J = jnp.array([[1.0, -9.0], [2.0, 4.0], [50.0, 3.0]])
      >>> losses, jac = mtl.value_and_jac(lambda w: J @ w)(jnp.zeros(2))
      >>> tx = mtl.trimmed_mean(num_tasks=3)
      >>> tx.update(jac, tx.init(jnp.zeros(2)))[0].tolist()
      [2.0, 3.0]

    References:
      Yin et al., `Byzantine-Robust Distributed Learning <https://arxiv.org/abs/1803.01498>`_, 2018,
      definition 2.
    """
    check_num_tasks(num_tasks)
    b = min(1, (num_tasks - 1) // 2) if trim is None else trim
    check_count("trim", b, least=0)
    less = f"less than half of num_tasks={num_tasks}: some row must be left"
    check_option("trim", b, lambda b: 2 * b < num_tasks, less)

    def update_fn(jacobian, state, **extra_args):
        del extra_args
        middle = functools.partial(_middle, present=jacobian.present, trim=b)
        return jacobian.reduce(lambda leaves: [middle(rows) for rows in leaves]), state

    return link(optax.init_empty_state, update_fn, num_tasks)


def _middle(rows: jax.Array, present: jax.Array, trim: int) -> jax.Array:
    num_present = jnp.sum(present)
    b = jnp.minimum(trim, (num_present - 1) // 2)
    # Absent ones last, among the NaN.
    ordered = jnp.sort(jnp.where(per_row(present, rows), rows, jnp.nan), axis=0)
    rank = per_row(jnp.arange(len(rows)), rows)
    return jnp.mean(ordered, axis=0, where=(rank >= b) & (rank < num_present - b))
