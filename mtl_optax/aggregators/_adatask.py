"""AdaTask: Adam with moments of its own for each task."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from mtl_optax._numerics import divide, safe_sqrt
from mtl_optax._options import BELOW_ONE, check_num_tasks, check_option
from mtl_optax.jacobian._rows import finite_rows, per_row
from mtl_optax.links import link, task_zeros
from mtl_optax.states import PerTask


class AdataskState(NamedTuple):
    """State of `adatask`."""

    # Like the parameters, leaves (K, *param.shape), at least float32, not debiased.
    momenta: PerTask
    second_moments: PerTask  # likewise; neither is debiased
    count: PerTask  # (K,) int32, updates of each task so far


def adatask(
    num_tasks: int,
    *,
    b1: float | jax.Array = 0.9,
    b2: float | jax.Array = 0.999,
    eps: float | jax.Array = 1e-8,
) -> optax.GradientTransformationExtraArgs:
    r"""Sums what Adam would make of each task's gradients alone.

    .. math:: m_k \leftarrow \beta_1 m_k + (1 - \beta_1) g_k, \quad
              v_k \leftarrow \beta_2 v_k + (1 - \beta_2) g_k^2, \quad
              \Delta\theta \propto \sum_k \frac{\hat m_k}{\sqrt{\hat v_k} + \epsilon}

    Under one Adam a task with large gradients sets the learning rate of every parameter, and the
    others hardly move it; with moments of its own each moves it about as far. A head follows plain
    Adam. It is an optimizer itself: follow it by `optax.sgd(rate)`, not by Adam, whose own moments
    would undo it. The state holds 2 K rows. A task's moments are debiased by the updates in which
    it was present; a gradient that is not finite, or whose square is not, leaves them as they were.

    Args:
      num_tasks: number of tasks K; static, at least 1.
      b1: in [0, 1), decay of the first moment.
      b2: in [0, 1), decay of the second moment.
      eps: added to its root, in units of the gradients.

    Returns:
      An aggregator: Jacobian in, preconditioned update out. Update scale: unit-like, of K times
      Adam's.

    Raises:
      ValueError: if `num_tasks` < 1, an option is out of range, the losses are not K, or `init`
        gets no parameters.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> import mtl_optax as mtl
      >>> tx = optax.chain(mtl.adatask(num_tasks=2), optax.sgd(0.1))
      >>> J = jnp.array([[100.0, 100.0], [1.0, -1.0]])
      >>> update, state = tx.update(J, tx.init(jnp.zeros(2)), losses=jnp.ones(2))
      >>> [round(x, 4) + 0.0 for x in update.tolist()]
      [-0.2, 0.0]

    References:
      Yang et al., `AdaTask: A Task-aware Adaptive Learning Rate Approach to Multi-task Learning
      <https://arxiv.org/abs/2211.15055>`_, AAAI 2023, with Adam.
    """
    check_num_tasks(num_tasks)
    for name, beta in (("b1", b1), ("b2", b2)):
        check_option(name, beta, *BELOW_ONE)
    check_option("eps", eps, lambda e: e >= 0, "at least 0")

    def init_fn(params):
        zeros = task_zeros(num_tasks, params)
        return AdataskState(zeros, zeros, jnp.zeros(num_tasks, jnp.int32))

    def update_fn(jacobian, state, **extra_args):
        del extra_args
        rows = jax.tree.leaves(jacobian.rows())
        momenta, seconds = map(jax.tree.leaves, (state.momenta, state.second_moments))
        squares = [g.astype(v.dtype) ** 2 for g, v in zip(rows, seconds, strict=True)]
        # Where a square overflows, a momentum that moved would be divided by nothing.
        good = finite_rows(squares)
        count = jnp.where(good, optax.safe_increment(state.count), state.count)

        def debiased(moment: jax.Array, beta: float | jax.Array) -> jax.Array:
            mass = -jnp.expm1(count * jnp.log(beta))  # 1 - beta^t, which would cancel near 1
            return divide(moment, per_row(mass, moment), moment)

        steps, new = [], []
        for g, square, m, v in zip(rows, squares, momenta, seconds, strict=True):
            known = per_row(good, g)
            momentum = jnp.where(known, b1 * m + (1 - b1) * g, m).astype(m.dtype)
            second = jnp.where(known, b2 * v + (1 - b2) * square, v).astype(v.dtype)
            steps.append(divide(debiased(momentum, b1), safe_sqrt(debiased(second, b2)) + eps))
            new.append((momentum, second))
        momenta, seconds = zip(*new, strict=True)
        like = jax.tree.structure(state.momenta).unflatten
        update = jacobian.replace_rows(steps).combine(1.0)
        return update, AdataskState(like(momenta), like(seconds), count)

    return link(init_fn, update_fn, num_tasks)
