"""MGDA: the shortest vector in the convex hull of the task gradients."""

from typing import Literal

import optax

from mtl_optax._min_norm import min_norm_weights
from mtl_optax._options import check_choice
from mtl_optax.aggregators._base import Heads, solved_aggregator

NORMALIZATIONS = ("none", "l2", "loss", "loss+")


def mgda(
    num_tasks: int,
    *,
    normalize: Literal["none", "l2", "loss", "loss+"] = "none",
    heads: Heads = "own",
) -> optax.GradientTransformationExtraArgs:
    r"""Combines the rows to the min-norm point of their convex hull, by an exact solver.

    .. math:: w = \arg\min_{w \ge 0,\, \sum_k w_k = 1} \|\textstyle\sum_k w_k g_k\|^2, \quad
              d = \sum_k w_k g_k

    A step along d lowers every loss; d = 0 where the parameters are Pareto stationary (so also
    where one gradient is zero, but for an absent task's). Tasks with small gradients dominate;
    `normalize` undoes that: the problem is solved on normalised rows and its weights are applied to
    the *raw* rows.

    Args:
      num_tasks: number of tasks K; static, at least 1.
      normalize: `"none"`; `"l2"` divides each row by its norm; `"loss"` by its loss; `"loss+"` by
        both. Losses must be positive for the latter two.
      heads: `"own"`, each head follows its own loss, or `"weighted"`, its weighted one: see
        `mtl_optax.aggregators`.

    Returns:
      An aggregator: Jacobian in, gradient out. Update scale: at most mean-like (weights sum to 1,
      and d is no longer than any row when `normalize="none"`).

    Raises:
      ValueError: if `num_tasks` < 1, `normalize` or `heads` is none of its choices, or the losses
        are not K.

    Examples:
      >>> import jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> J = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
      >>> losses, jac = mtl.value_and_jac(lambda w: J @ w)(jnp.zeros(3))
      >>> tx = mtl.mgda(num_tasks=2)
      >>> updates, state = tx.update(jac, tx.init(jnp.zeros(3)))
      >>> [round(x, 4) for x in updates.tolist()], [round(w, 4) for w in state.weights.tolist()]
      ([0.0, 1.0, 1.0], [0.6, 0.4])

    Differs from:
      The authors' code has `heads="weighted"`, and stops its Frank-Wolfe steps early.

    References:
      Désidéri, `Multiple-gradient descent algorithm
      <https://doi.org/10.1016/j.crma.2012.03.014>`_, 2012. Sener and Koltun, `Multi-Task Learning
      as Multi-Objective Optimization <https://arxiv.org/abs/1810.04650>`_, 2018, eq. 3 (solved
      there by Frank-Wolfe, here exactly).
    """
    check_choice("normalize", normalize, NORMALIZATIONS)

    def solve(jacobian):
        products, scales = jacobian.scaled_gramian()
        if normalize in ("l2", "loss+"):
            products, norms = jacobian.correlation()
            scales = (norms > 0).astype(norms.dtype)
        if normalize in ("loss", "loss+"):
            scales = scales / jacobian.loss_vector()
        return min_norm_weights(products, scales, jacobian.present)

    return solved_aggregator(num_tasks, solve, heads=heads)
