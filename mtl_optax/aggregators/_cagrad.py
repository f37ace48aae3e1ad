"""CAGrad: the best worst-case improvement near the mean gradient."""

from typing import Literal

import jax
import jax.numpy as jnp
import optax

from mtl_optax._numerics import divide
from mtl_optax._options import check_choice, check_option
from mtl_optax.aggregators._base import solved_aggregator
from mtl_optax.aggregators._best_worst import best_worst, mean_of_rows
from mtl_optax.solvers._nonnegative_qp import nonnegative_qp_of_cosines

RESCALES = (None, "1+c", "1+c2")


def cagrad(
    num_tasks: int,
    *,
    c: float | jax.Array = 0.5,
    rescale: Literal["1+c", "1+c2"] | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Maximises the least improvement of any task within a ball around the mean.

    .. math:: d = \arg\max_{\|d - g_0\| \le c \|g_0\|} \min_k \langle g_k, d\rangle, \quad
              g_0 = \tfrac1K \textstyle\sum_k g_k

    Solved exactly: for a bound μ on the least improvement, the nearest d to the mean with
    :math:`\langle g_k, d\rangle \ge \mu` is a non-negative QP on the cosines of the rows, and its
    distance is convex and increasing in μ, so Newton's method finds the μ whose distance is the
    radius. With c < 1 it converges to a minimum of the mean loss; c = 0 is the mean.

    Where no direction improves every task (Pareto-stationary or zero rows) and one within the ball
    harms none, d is the nearest such one to the mean; the paper's formula divides 0 by 0 there.

    Args:
      num_tasks: number of tasks K; static, at least 1.
      c: radius of the ball, unitless, >= 0; larger favours the worst task over the mean.
      rescale: divides d by 1 + c (`"1+c"`) or by 1 + c² (`"1+c2"`), or not (None).

    Returns:
      An aggregator: Jacobian in, gradient out. Update scale: mean-like, between 1 - c and 1 + c
      times the norm of the mean before `rescale`. Its state counts the updates whose program could
      not be solved, as with NaN rows: uniform weights 1/K.

    Raises:
      ValueError: if `num_tasks` < 1, `c` < 0, `rescale` is none of the three, or the losses are
        not K.

    Examples:
      >>> import jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> J = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
      >>> losses, jac = mtl.value_and_jac(lambda w: J @ w)(jnp.zeros(3))
      >>> tx = mtl.cagrad(num_tasks=2)
      >>> updates, state = tx.update(jac, tx.init(jnp.zeros(3)))
      >>> [round(x, 4) for x in updates.tolist()]
      [0.1835, 1.2041, 1.2041]

    Differs from:
      The published code solves the dual by SLSQP and adds 1e-8 to squared norms; at gradient norms
      of 1e-4 the update is then the mean.

    References:
      Liu et al., `Conflict-Averse Gradient Descent for Multi-task Learning
      <https://arxiv.org/abs/2110.14048>`_, 2021, eq. 3.
    """
    check_option("c", c, lambda x: x >= 0, "a radius of at least 0")
    if rescale is not None:
        check_choice("rescale", rescale, RESCALES[1:])

    def solve(jacobian):
        cosines, norms = jacobian.correlation()
        radius = jnp.asarray(c, norms.dtype)
        weights, solved = _weights(cosines, norms, radius, jacobian.present)
        divisor = {None: 1.0, "1+c": 1 + radius, "1+c2": 1 + radius**2}[rescale]
        return weights / divisor, solved

    return solved_aggregator(num_tasks, solve)


def _weights(cosines, norms, radius, present):
    mean = mean_of_rows(cosines, norms, present)

    def start(ascent, ratios, at_mean):
        del ratios, at_mean
        return (1 + radius) * ascent.gain

    lift = best_worst(cosines, cosines, mean, present, radius, start, nonnegative_qp_of_cosines)
    # A mean that cancels to rounding has no direction, and no ball around it.
    moved = jnp.where(mean.stationary, 0, lift.weights)
    weights = mean.share + divide(mean.length * moved, mean.relative)
    return weights, lift.solved | mean.stationary
