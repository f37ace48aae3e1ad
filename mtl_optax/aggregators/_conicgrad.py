"""ConicGrad: the best worst-case direction within a cone around the mean gradient."""

import jax
import jax.numpy as jnp
import optax

from mtl_optax._numerics import divide, dot
from mtl_optax._options import check_option
from mtl_optax.aggregators._base import solved_aggregator
from mtl_optax.aggregators._best_worst import best_worst, mean_of_rows
from mtl_optax.solvers import nonnegative_qp


def conicgrad(
    num_tasks: int, *, c: float | jax.Array = 0.5
) -> optax.GradientTransformationExtraArgs:
    r"""Maximises the least improvement of any task among directions near the mean's.

    .. math:: d = \arg\max_{\|d\| = \|g_0\|} \min_k \langle g_k, d\rangle \quad \text{s.t.}\quad
              \langle g_0, d\rangle \ge c\, \|g_0\| \|d\|, \qquad
              g_0 = \tfrac1K \textstyle\sum_k g_k

    The angle alone is bounded, not the length as by CAGrad's ball. Solved exactly: where the
    steepest common ascent, MGDA's direction, lies in the cone, it is the answer; else the answer
    lies on the cone's surface, where the moves off the mean's direction are a ball again. Where no
    direction of the cone improves every task it is the one that harms least; where none at all
    does (Pareto-stationary or zero rows) it is the mean.

    Args:
      num_tasks: number of tasks K; static, at least 1.
      c: the least cosine with the mean, in (0, 1]; 1 is the mean, near 0 MGDA's direction.

    Returns:
      An aggregator: Jacobian in, gradient out. Update scale: mean-like, of the mean's norm exactly.
      Its state counts the updates whose program could not be solved, as with NaN rows: uniform
      weights 1/K.

    Raises:
      ValueError: if `num_tasks` < 1, `c` is not in (0, 1], or the losses are not K.

    Examples:
      >>> import jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> J = jnp.array([[4.0, 0.0], [0.0, 2.0]])
      >>> losses, jac = mtl.value_and_jac(lambda w: J @ w)(jnp.zeros(2))
      >>> tx = mtl.conicgrad(num_tasks=2, c=0.9)
      >>> update, state = tx.update(jac, tx.init(jnp.zeros(2)))
      >>> [round(x, 4) for x in update.tolist()]
      [1.3641, 1.7718]

    Differs from:
      The paper, which gives d in closed form for given weights of the rows: here the program is
      solved for both, anew at each update.

    References:
      Hassanpour et al., `Fantastic Multi-Task Gradient Updates and How to Find Them In a Cone
      <https://arxiv.org/abs/2502.00217>`_, 2025.
    """
    check_option("c", c, lambda x: (x > 0) & (x <= 1), "a cosine in (0, 1]")

    def solve(jacobian):
        cosines, norms = jacobian.correlation()
        return _weights(cosines, norms, jnp.asarray(c, norms.dtype), jacobian.present)

    return solved_aggregator(num_tasks, solve)


def _weights(cosines, norms, c, present):
    mean = mean_of_rows(cosines, norms, present)
    s = mean.slopes
    # Along the part of each unit row that is orthogonal to the mean.
    moves = cosines - s[:, None] * s[None, :]
    radius = jnp.sqrt((1 - c) * (1 + c)) / c

    def leaves_cone(ascent):
        return (ascent.gain > 0) & (dot(s, ascent.weights) < c * ascent.norm)

    def start(ascent, ratios, at_mean):
        # What the ascent gains at the length at which it has come as far as the mean, where it is
        # outside of the cone. All moves together are 0, so no bound is met beyond the one at which
        # every task gains as much, and at that one only up to rounding.
        weights = mean.relative * mean.share
        most = divide(dot(s, weights), dot(ratios, weights))
        outside = ascent.gain * divide(ascent.norm, dot(s, ascent.weights))
        outside = jnp.minimum(outside, (1 - 64 * s.size * jnp.finfo(s.dtype).eps) * most)
        return jnp.where(leaves_cone(ascent), outside, at_mean)

    lift = best_worst(cosines, moves, mean, present, radius, start, nonnegative_qp)
    along = divide(lift.ascent.weights, lift.ascent.norm)
    off = jnp.where(leaves_cone(lift.ascent), lift.weights, 0)
    shortened = jax.lax.rsqrt(1 + jnp.maximum(dot(off, dot(moves, off)), 0))
    # Of the unit rows, in units of the mean's norm.
    inside = (lift.ascent.gain > 0) & ~leaves_cone(lift.ascent)
    own = jnp.where(inside, 0, shortened * (1 - dot(off, s)))
    others = jnp.where(inside, along, shortened * off)
    weights = own * mean.share + divide(mean.length * others, mean.relative)
    solved = lift.solved | ~leaves_cone(lift.ascent) | mean.stationary
    return jnp.where(mean.stationary, mean.share, weights), solved
