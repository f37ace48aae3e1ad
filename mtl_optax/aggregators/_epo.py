"""EPO: towards the Pareto optimal point whose losses stand in a preferred ratio."""

import jax
import jax.numpy as jnp
import optax

from mtl_optax._numerics import divide, dot
from mtl_optax._options import check_option, per_task
from mtl_optax._typing import TaskOption
from mtl_optax.aggregators._base import Heads, relative_norms, solved_aggregator
from mtl_optax.solvers import nonnegative_qp
from mtl_optax.solvers._base import solve_free

# How much the objective outweighs the proximal term.
_STRENGTH = 100.0
# The least slack of a constraint that counts as met, relative to the largest row.
_SLACK = -1e-3
# Corrections of what rounding left: the first one's is of the size of the goal.
_REFINEMENTS = 2


def epo(
    num_tasks: int,
    *,
    preference: TaskOption = 1.0,
    tolerance: float | jax.Array = 1e-4,
    heads: Heads = "own",
) -> optax.GradientTransformationExtraArgs:
    r"""Steers to the ray of losses in inverse proportion to the preference, then down along it.

    .. math:: \hat l_k = \frac{r_k L_k}{\sum_j r_j L_j}, \quad
              \mu = \sum_k \hat l_k \log(K \hat l_k), \quad
              a_k = r_k (\log(K \hat l_k) - \mu)

    The non-uniformity μ is 0 on the ray :math:`r_1 L_1 = \dots = r_K L_K`, and a is its slope in
    the losses. With the Gramian G, the weights β of the rows, on the simplex, solve one of two
    linear programs:

    - balance, where μ > `tolerance`: :math:`\max_\beta a^\top G \beta`, which lowers μ fastest. No
      loss rises faster than along a itself, and the largest :math:`r_k L_k` does not rise. Others
      may, so that EPO leaves the front's nearest point and walks along the front to the ray.
    - descent: :math:`\max_\beta 1^\top G \beta` with :math:`G \beta \ge 0`: no loss rises.

    Args:
      num_tasks: number of tasks K; static, at least 1.
      preference: r, > 0, one for all tasks or a tree like the losses; it is scaled to sum to 1. A
        larger one asks for a smaller loss. It may be traced: build the strategy where the
        preference is drawn.
      tolerance: the μ, unitless and > 0, up to which the losses count as balanced: to about its
        root. The default leaves ratios of two losses within 3 %.
      heads: `"own"`, each head follows its own loss, or `"weighted"`, its weighted one: see
        `mtl_optax.aggregators`.

    Returns:
      An aggregator: Jacobian in, gradient out. Update scale: mean-like (weights sum to 1). Losses
      must be non-negative, as cross entropies and squared errors are, and above 0: one of exactly 0
      puts the ray out of reach, and the update may be 0 unless the task is absent. Its state counts
      the updates where one was negative or all were 0, or with NaN rows: uniform weights 1/K.

    Raises:
      ValueError: if `num_tasks` < 1, a preference or `tolerance` is not above 0, `heads` is none of
        its choices, or the losses are not K.

    Examples:
      >>> import jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> J = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
      >>> losses, jac = mtl.value_and_jac(lambda w: J @ w + jnp.array([3.0, 1.0]))(jnp.zeros(3))
      >>> tx = mtl.epo(num_tasks=2)
      >>> updates, state = tx.update(jac, tx.init(jnp.zeros(3)))
      >>> [round(x, 2) for x in updates.tolist()]
      [-3.45, 1.0, 1.0]

    Differs from:
      A proximal term of a hundredth of the objective's size makes the solution of the linear
      program unique, where it is not, and the program a non-negative QP that is solved exactly;
      where the best vertex is better by more than that, the solution stays that vertex. The
      published code also asks in descent that μ not rise, which three or more tasks can make
      impossible, multiplies its learning rate by 10 max(μ, 0.1), and has `heads="weighted"`.

    References:
      Mahapatra and Rajan, `Multi-Task Learning with User Preferences: Gradient Descent with
      Controlled Ascent in Pareto Optimization
      <https://proceedings.mlr.press/v119/mahapatra20a.html>`_, 2020, eq. 24.
    """
    check_option("preference", preference, lambda r: r > 0, "above 0", each=True)
    check_option("tolerance", tolerance, lambda t: t > 0, "above 0")

    def solve(jacobian):
        cosines, norms = jacobian.correlation()
        relative = relative_norms(norms)
        # What task k's row gains task j along a unit vector: a row of G over its norm.
        gains = cosines * relative[None, :]

        loss = jacobian.loss_vector()
        r = per_task("preference", preference, jacobian, 1.0).astype(norms.dtype)
        r = jnp.where(jacobian.present, r, 0) / jnp.sum(r, where=jacobian.present)
        height = r * loss
        share = height / jnp.max(height)
        share = share / jnp.sum(share)
        excess = jnp.log(jnp.maximum(jacobian.num_present * share, jnp.finfo(share.dtype).tiny))
        mu = jnp.sum(share * excess)
        steepest = r * (excess - mu)
        balance = mu > tolerance

        pull = dot(gains, steepest)
        # Where no row lowers μ nothing may rise, nor may ever the task that is furthest behind.
        may_rise = balance & jnp.any(pull > 0) & (height < jnp.max(height))
        free = may_rise & (pull > 0)
        limits = jnp.where(may_rise, jnp.minimum(pull, 0), 0)

        objective = relative * jnp.where(balance, pull, dot(gains, jnp.ones_like(norms)))
        constraints = jnp.where(free[:, None], 0, gains)
        weights, slack = _maximise(objective, constraints, limits, jacobian.present)
        return weights, (slack >= _SLACK) & jnp.all(loss >= 0) & jnp.isfinite(mu)

    return solved_aggregator(num_tasks, solve, heads=heads)


def _maximise(objective, constraints, limits, present):
    """Maximises a linear function of β on the simplex of those present, Aβ >= b: `(β, slack)`.

    With its proximal term it is the projection of a point onto a polytope in the plane of the
    simplex, and the dual of that has only signs for constraints.
    """
    num_present = jnp.maximum(jnp.sum(present), 1).astype(objective.dtype)

    def in_plane(rows):
        mean = jnp.sum(rows, axis=-1, where=present, keepdims=True) / num_present
        return jnp.where(present, rows - mean, 0)

    objective = divide(objective, jnp.max(jnp.abs(objective)), objective)
    rows = jnp.concatenate([jnp.diag(present.astype(objective.dtype)), constraints])
    limits = jnp.concatenate([jnp.zeros_like(objective), limits])
    tangents = in_plane(rows)
    products = dot(tangents, tangents.T)
    even = jnp.where(present, 1 / num_present, 0)
    goal = even + _STRENGTH * in_plane(objective)
    multipliers = nonnegative_qp(products, dot(rows, goal) - limits).x
    eps = jnp.finfo(rows.dtype).eps
    ridge = jnp.asarray(4 * len(rows) * eps, rows.dtype)

    def refined(_, weights):
        weights = even + in_plane(weights)
        missing = limits - dot(rows, weights)
        step = solve_free(products, ridge, multipliers > 0, missing[:, None])[:, 0]
        return weights + dot(jnp.where(jnp.isfinite(step), step, 0), tangents)

    # The goal is far away and leaves its rounding: off the plane, and in the constraints that are
    # met with equality. In a loop it is always the same; else XLA would compute the sum anew
    # wherever it is used, and round it in other ways than what was refined.
    weights = jax.lax.fori_loop(0, _REFINEMENTS, refined, goal + dot(multipliers, tangents))
    weights = jnp.where(weights > eps, weights, 0)
    weights = weights / jnp.sum(weights)
    return weights, jnp.min(dot(rows, weights) - limits)
