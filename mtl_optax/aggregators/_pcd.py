"""PCD: follow one primary task, with a guaranteed share of progress for every other."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from mtl_optax._numerics import bounded, divide, dot, safe_sqrt
from mtl_optax._options import (
    BELOW_ONE,
    UP_TO_ONE,
    check_num_tasks,
    check_option,
    per_task,
    task_position,
)
from mtl_optax._typing import TaskOption
from mtl_optax.links import link, running_mean
from mtl_optax.solvers._nonnegative_qp import nonnegative_qp
from mtl_optax.states import PerTask


class PcdState(NamedTuple):
    """State of `pcd`."""

    weights: PerTask  # (K,) float32, of the last update
    mean_norms: PerTask  # (K,) float32, roots of the averages of squared norms
    masses: PerTask  # (K,) float32, how much of that average has been seen, up to 1
    fallbacks: jax.Array  # () int32, updates whose constraints could not be met: the primary's row


def pcd(
    num_tasks: int,
    *,
    primary: int | str = 0,
    tau: TaskOption = 0.02,
    decay: float | jax.Array = 0.999,
) -> optax.GradientTransformationExtraArgs:
    r"""Bends the primary task's gradient no more than the others' progress requires.

    .. math:: \tilde d = \arg\min_d \tfrac12 \|d - \tilde g_1\|^2 \quad \text{s.t.} \quad
              \langle\tilde g_k, d\rangle \ge \tau_k \|\tilde g_k\|^2, \quad
              d = \|g_1\|\, \tilde d / \|\tilde d\|, \quad
              \tilde g_k = g_k / \sqrt{\langle\|g_k\|^2\rangle_\beta}

    Each secondary task makes at least the share tau of the progress that a step along its own
    gradient would make, in units of its average norm. The tasks are not alike: the order and the
    choice of `primary` matter, the scales of the losses do not. Where the constraints contradict
    each other (antiparallel secondaries) the update is the primary's gradient, and `fallbacks`
    counts it. A primary gradient of 0 gives an update of 0. While the primary task is absent, the
    first one present takes its place.

    Args:
      num_tasks: number of tasks K; static, at least 1.
      primary: the first among the tasks, by its name or its position in the order of the losses.
      tau: in [0, 1], one for all tasks or a tree like the losses (the primary's is not used).
      decay: beta in [0, 1), weight of the past in the average of the squared norms.

    Returns:
      An aggregator: Jacobian in, gradient out. Update scale: the norm of the primary's gradient.

    Raises:
      ValueError: if `num_tasks` < 1, an option is out of range, no task is the primary, or the
        losses are not K.

    Examples:
      >>> import jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> J = jnp.array([[1.0, 0.0], [-3.0, 4.0]])
      >>> losses, jac = mtl.value_and_jac(lambda w: J @ w)(jnp.zeros(2))
      >>> tx = mtl.pcd(num_tasks=2, tau=0.0)
      >>> update, state = tx.update(jac, tx.init(jnp.zeros(2)))
      >>> [round(x, 4) for x in update.tolist()]
      [0.8, 0.6]

    Differs from:
      The authors' code adds an epsilon to the averages; here none, so that the scale of a loss has
      no say at all.

    References:
      Varam and AlHajri, `Not All Objectives Are Born Equal <https://arxiv.org/abs/2606.29521>`_,
      2026, algorithm 1.
    """
    check_num_tasks(num_tasks)
    check_option("tau", tau, *UP_TO_ONE, each=True)
    check_option("decay", decay, *BELOW_ONE)

    def init_fn(params):
        del params
        zeros = jnp.zeros(num_tasks, jnp.float32)
        return PcdState(zeros + 1 / num_tasks, zeros, zeros, jnp.zeros([], jnp.int32))

    def update_fn(jacobian, state, **extra_args):
        del extra_args
        first = task_position("primary", primary, jacobian.names)
        first = jnp.where(jacobian.present[first], first, jnp.argmax(jacobian.present))
        cosines, norms = jacobian.correlation()
        # Averages of squares, in units of the largest norm: squares may overflow.
        largest = jnp.maximum(jnp.where(jnp.isfinite(norms), norms, 0), state.mean_norms)
        unit = jnp.where(largest > 0, largest, 1)
        new, old = (norms / unit) ** 2, (state.mean_norms / unit) ** 2
        average, old, mass = running_mean(new, old, state.masses, decay, jacobian.present)
        length, mean = divide(norms, unit * safe_sqrt(average), norms), unit * safe_sqrt(old)

        others = jnp.arange(num_tasks) != first
        share = per_task("tau", tau, jacobian, 0.02) * length
        # In units of each row: mu_k |g_k| >= 0 against <g_k / |g_k|, d> - tau |g_k|. The primary
        # and zero rows have no constraint.
        bound = others & (norms > 0)
        Q = jnp.where(
            bound[:, None] & bound[None, :], cosines, jnp.eye(num_tasks, dtype=cosines.dtype)
        )
        q = jnp.where(bound, cosines[:, first] * length[first] - share, 0)
        solution = nonnegative_qp(Q, q)
        mu = jnp.where(bound, solution.x, 0)
        slack = dot(Q, mu) + q
        # Without a feasible point the program has no bound, and its finite answer misses by much.
        met = jnp.all(slack >= -1e-4 * jnp.max(jnp.abs(q))) & jnp.all(jnp.isfinite(mu))

        direction = jnp.where(others, jnp.where(met, mu, 0), length[first])  # of unit rows
        reached = dot(cosines, direction)
        square = dot(direction, reached)
        rounding = 10 * jnp.finfo(Q.dtype).eps * jnp.sum(jnp.abs(direction)) ** 2
        nonzero = square > rounding
        scale = norms[first] / jnp.sqrt(jnp.where(nonzero, square, 1))
        of_rows = divide(scale, norms)
        weights = bounded(jnp.where(nonzero, direction * of_rows, 0))
        new_state = PcdState(
            bounded(weights, jnp.float32),
            mean.astype(jnp.float32),
            mass.astype(jnp.float32),
            state.fallbacks + ~met,
        )
        return jacobian.combine(weights), new_state

    return link(init_fn, update_fn, num_tasks)
