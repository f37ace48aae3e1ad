"""GO4Align: one weight a group of tasks, so that their risks come down together."""

from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mtl_optax._numerics import bounded, divide
from mtl_optax._options import check_count, check_num_tasks, check_option
from mtl_optax._usable import positive_log
from mtl_optax.aggregators._simplex_steps import exchange
from mtl_optax.balancers._base import summed
from mtl_optax.links import link
from mtl_optax.states import PerTask


class Go4alignState(NamedTuple):
    """State of `scale_by_go4align`."""

    weights: Annotated[PerTask, 1.0]  # (K,) float32, of the last update
    log_shares: PerTask  # (K,) float32, of which q is the softmax over the tasks at hand
    unusable: PerTask  # (K,) int32, updates in which its loss was not positive or not finite


def scale_by_go4align(
    num_tasks: int, *, num_groups: int = 2, step_size: float | jax.Array = 1e-4
) -> optax.GradientTransformationExtraArgs:
    r"""Makes the losses equal by their inverse, and gives like tasks the mean of their weights.

    .. math:: q_k \leftarrow \frac{q_k e^{-\eta L_k}}{\sum_j q_j e^{-\eta L_j}}, \quad
              w_k = \frac{\sum_j L_j}{L_k}\, q_k, \quad
              \lambda_k = \mathrm{mean}_{j \in c(k)}\, w_j

    where c(k) is the group of task k: the weights w, numbers on a line, are cut into `num_groups`
    so that the squared distances to their group's mean are least. Groups are found anew at each
    update. It is meant for tens of tasks, and costs one backward pass.

    Losses must be positive: a task whose loss is 0, negative or not finite stays out and keeps its
    weight, as an absent one does, and `unusable` counts it.

    Args:
      num_tasks: number of tasks K; static, at least 1.
      num_groups: static, at least 1; 1 gives all tasks one weight, K or more one to each.
      step_size: eta >= 0, in units of 1/loss.

    Returns:
      A balancer: Jacobian in, Jacobian out. Update scale: free (weights near 1 where losses are
      equal; their sum before the groups is at least K while q is even).

    Raises:
      ValueError: if `num_tasks` or `num_groups` < 1, `step_size` < 0, or the losses are not K.

    Examples:
      >>> import jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> task_losses = lambda w: [w @ w, 1.5 * w @ w, 9 * w @ w]
      >>> losses, jac = mtl.value_and_jac(task_losses)(jnp.ones(2))
      >>> tx = mtl.scale_by_go4align(num_tasks=3)
      >>> jac, state = tx.update(jac, tx.init(jnp.ones(2)))
      >>> [round(w, 2) for w in state.weights.tolist()]
      [3.2, 3.2, 0.43]

    Differs from:
      The authors' k-means starts from random centres and may end in other groups at each update;
      here the best groups are found exactly. Their script has one group by default, so that all
      tasks weigh the same.

    References:
      Shen et al., `GO4Align: Group Optimization for Multi-Task Alignment
      <https://arxiv.org/abs/2404.06486>`_, NeurIPS 2024, and the authors' code.
    """
    check_num_tasks(num_tasks)
    check_count("num_groups", num_groups)
    check_option("step_size", step_size, lambda x: x >= 0, "at least 0")

    def init_fn(params):
        del params
        ones = jnp.ones(num_tasks, jnp.float32)
        return Go4alignState(ones, jnp.zeros_like(ones), jnp.zeros(num_tasks, jnp.int32))

    def update_fn(jacobian, state, **extra_args):
        del extra_args
        loss = jacobian.loss_vector().astype(jnp.float32)
        _, positive = positive_log(loss)
        usable = positive & jacobian.present
        log_shares = exchange(state.log_shares, -step_size * loss, usable)
        q = jax.nn.softmax(log_shares, where=usable)
        # Ratios before their sum, which may leave the range.
        relative = divide(loss, jnp.max(jnp.where(usable, loss, 0)))
        found = q * divide(jnp.sum(jnp.where(usable, relative, 0)), relative)
        found = jnp.where(usable, bounded(found), 0)
        weights = jnp.where(usable, group_means(found, usable, num_groups), state.weights)
        return jacobian.scale(weights), Go4alignState(
            weights, log_shares, state.unusable + ~positive
        )

    return link(init_fn, update_fn, num_tasks)


def group_means(x: jax.Array, usable: jax.Array, num_groups: int) -> jax.Array:
    """For each of K numbers the mean of its group, of the groups with the least squared distances.

    On a line groups are intervals, so the best ones are found by dynamic programming.

    Args:
      x: `(K,)`, at least 0.
      usable: `(K,)` bool; the others are in no group.
      num_groups: the most groups, static.
    """
    K, largest = x.size, jnp.max(x)
    order = jnp.argsort(jnp.where(usable, x, jnp.inf))
    counted = usable[order].astype(x.dtype)
    line = divide(x, largest)[order]
    # The cost of x[s:e] is the sum of squared differences of its pairs over its number, with no
    # difference of large sums.
    squares = jnp.triu((line[:, None] - line[None, :]) ** 2) * (counted[:, None] * counted[None, :])
    of_pairs = jnp.cumsum(jnp.cumsum(squares[::-1], axis=0)[::-1], axis=1)
    ends = jnp.arange(K + 1)
    before = jnp.concatenate([jnp.zeros(1), jnp.cumsum(counted)])
    numbers = before[None, :] - before[:, None]
    cost = divide(jnp.pad(of_pairs, ((0, 1), (1, 0))), numbers)
    cost = jnp.where(ends[:, None] <= ends[None, :], cost, jnp.inf)

    best, starts = jnp.where(ends == 0, 0, jnp.inf).astype(x.dtype), []
    for _ in range(min(num_groups, K)):
        totals = best[:, None] + cost
        starts.append(jnp.argmin(totals, axis=0))
        best = jnp.min(totals, axis=0)
    means, end = jnp.zeros(K, x.dtype), jnp.int32(K)
    for start in reversed(starts):
        inside = (ends[:-1] >= start[end]) & (ends[:-1] < end)
        mean = divide(jnp.sum(jnp.where(inside, line, 0)), jnp.sum(jnp.where(inside, counted, 0)))
        means, end = jnp.where(inside, mean, means), start[end]
    return jnp.zeros_like(means).at[order].set(means) * largest


go4align = summed(scale_by_go4align)
