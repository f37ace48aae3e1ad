"""Moving averages of the rows: less noise before the tasks are weighed against each other."""

from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mtl_optax._numerics import divide
from mtl_optax._options import BELOW_ONE, check_flag, check_num_tasks, check_option
from mtl_optax.jacobian._rows import finite_rows, per_row, scale_rows
from mtl_optax.links import link, task_zeros
from mtl_optax.states import PerTask


class EmaTasksState(NamedTuple):
    """State of `ema_tasks`."""

    rows: PerTask  # like the parameters, leaves (K, *param.shape), at least float32, not debiased
    decay_products: Annotated[PerTask, 1.0]  # (K,) float32, of all decays, the weight of the 0s
    count: jax.Array  # () int32, updates so far


def ema_tasks(
    num_tasks: int, *, decay: float | Callable[[jax.Array], Any] = 0.9, debias: bool = True
) -> optax.GradientTransformationExtraArgs:
    r"""Replaces each row by its moving average over the updates.

    .. math:: m_k \leftarrow \beta_t m_k + (1 - \beta_t) g_k, \quad
              g_k \to m_k / (1 - \textstyle\prod_{s \le t} \beta_s)

    As `optax.ema` does to one gradient, so that followed by `sum_tasks()` it is `sum_tasks()`
    followed by `optax.ema`. The losses stay those of the moment. A row that is not finite leaves
    its average as it was, and so does an absent task, whose row is then 0. The state holds K rows,
    heads included: K times the parameters.

    Args:
      num_tasks: number of tasks K; static, at least 1.
      decay: beta in [0, 1), weight of the past, or a schedule: a function from the number of
        updates so far to it.
      debias: whether to undo the weight of the zeros that the average starts from.

    Returns:
      A balancer: Jacobian in, Jacobian out. Update scale: as before.

    Raises:
      TypeError: if `debias` is no bool.
      ValueError: if `num_tasks` < 1, `decay` is not in [0, 1), the losses are not K, or `init` gets
        no parameters.

    Examples:
      >>> import jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> tx = mtl.ema_tasks(num_tasks=2, decay=0.5)
      >>> state = tx.init(jnp.zeros(1))
      >>> for scale in (1.0, 4.0):
      ...     rows = jnp.full((2, 1), scale)
      ...     jac, state = tx.update(rows, state, losses=jnp.ones(2))
      >>> jac.rows().tolist()
      [[3.0], [3.0]]
    """
    check_num_tasks(num_tasks)
    check_flag("debias", debias)
    if not callable(decay):
        check_option("decay", decay, *BELOW_ONE)

    def init_fn(params):
        return EmaTasksState(
            rows=task_zeros(num_tasks, params),
            decay_products=jnp.ones(num_tasks, jnp.float32),
            count=jnp.zeros([], jnp.int32),
        )

    def update_fn(jacobian, state, **extra_args):
        del extra_args
        beta = jnp.asarray(decay(state.count) if callable(decay) else decay, jnp.float32)
        rows = jax.tree.leaves(jacobian.rows())
        averages, treedef = jax.tree.flatten(state.rows)
        good = finite_rows(rows)
        averages = [
            jnp.where(per_row(good, m), beta * m + (1 - beta) * row, m).astype(m.dtype)
            for m, row in zip(averages, rows, strict=True)
        ]
        products = jnp.where(good, state.decay_products * beta, state.decay_products)
        weight = divide(1, 1 - products) if debias else jnp.ones_like(products)
        shown = [
            scale_rows(m, weight).astype(row.dtype) for m, row in zip(averages, rows, strict=True)
        ]
        count = jnp.asarray(optax.safe_increment(state.count))
        new_state = EmaTasksState(treedef.unflatten(averages), products, count)
        return jacobian.replace_rows(shown), new_state

    return link(init_fn, update_fn, num_tasks)
