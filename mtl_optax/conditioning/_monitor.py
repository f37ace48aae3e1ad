"""Watching how the tasks agree, without changing anything."""

from typing import NamedTuple

import jax.numpy as jnp
import optax

from mtl_optax._options import UP_TO_ONE, check_num_tasks, check_option
from mtl_optax.links import link
from mtl_optax.states import PerPair, PerTask


class MonitorTasksState(NamedTuple):
    """State of `monitor_tasks`."""

    cosine: PerPair  # (K, K) float32, between the rows of the last update
    norm: PerTask  # (K,) float32, of the rows of the last update
    conflict_rate: PerPair  # (K, K) float32, running share of the updates with cosine < 0
    count: PerPair  # (K, K) int32, updates with both tasks so far
    overflows: PerTask  # (K,) int32, updates in which the weights before it left float32's range


def monitor_tasks(num_tasks: int, *, decay: float = 0.99) -> optax.GradientTransformationExtraArgs:
    r"""Records cosines, norms and conflicts of the rows, and hands the Jacobian on as it is.

    .. math:: C_{ij} = \frac{\langle g_i, g_j\rangle}{\|g_i\| \|g_j\|}, \quad
              R_{ij} \leftarrow \beta_t R_{ij} + (1 - \beta_t) [C_{ij} < 0]

    where :math:`\beta_t = \min(\beta, 1 - 1/t)`: the plain share at first, then over about
    :math:`1/(1-\beta)` updates. `mtl.summarize(opt_state, names)` makes of the state
    `"cosine/a-b"`, `"norm/a"` and `"conflict_rate/a-b"`. It needs the Gramian, K backward passes,
    which an aggregator behind it that needs it too then has for free. A zero row has cosines of 0.
    Of an absent task nothing is recorded; t counts the updates in which both took part. Weights of
    several balancers whose product would leave the range of float32 are held at its end;
    `overflows` counts it.

    Args:
      num_tasks: number of tasks K; static, at least 1.
      decay: beta in [0, 1], weight of the past; larger looks back further, 1 over all updates.

    Returns:
      A balancer: Jacobian in, the same Jacobian out. Update scale: as before.

    Raises:
      ValueError: if `num_tasks` < 1, `decay` is not in [0, 1], or the losses are not K.

    Examples:
      >>> import jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> J = jnp.array([[3.0, 4.0], [-3.0, 4.0]])
      >>> losses, jac = mtl.value_and_jac(lambda w: {"a": J[0] @ w, "b": J[1] @ w})(jnp.zeros(2))
      >>> tx = mtl.monitor_tasks(num_tasks=2)
      >>> jac, state = tx.update(jac, tx.init(jnp.zeros(2)))
      >>> {k: round(float(v), 2) for k, v in mtl.summarize(state, jac).items()}
      {'cosine/a-b': 0.28, 'norm/a': 5.0, 'norm/b': 5.0, 'conflict_rate/a-b': 0.0, 'count/a-b': 1.0,
       'overflows/a': 0.0, 'overflows/b': 0.0}
    """
    check_num_tasks(num_tasks)
    check_option("decay", decay, *UP_TO_ONE)

    def init_fn(params):
        del params
        square = jnp.zeros((num_tasks, num_tasks), jnp.float32)
        norm = jnp.zeros(num_tasks, jnp.float32)
        counts = jnp.zeros_like(square, jnp.int32)
        return MonitorTasksState(square, norm, square, counts, jnp.zeros_like(norm, jnp.int32))

    def update_fn(jacobian, state, **extra_args):
        del extra_args
        cosine, norm = (x.astype(jnp.float32) for x in jacobian.correlation())
        count = jnp.asarray(optax.safe_increment(state.count))
        beta = jnp.minimum(decay, 1 - 1 / count)
        rate = beta * state.conflict_rate + (1 - beta) * (cosine < 0)
        overflows = state.overflows + jacobian.at_the_limit
        new_state = MonitorTasksState(cosine, norm, rate.astype(jnp.float32), count, overflows)
        return jacobian, new_state

    return link(init_fn, update_fn, num_tasks)
