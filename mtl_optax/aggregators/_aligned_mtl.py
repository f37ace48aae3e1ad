"""Aligned-MTL: the mean after the singular values of the Jacobian are made equal."""

from typing import Literal

import jax.numpy as jnp
import optax

from mtl_optax._numerics import dot, safe_sqrt
from mtl_optax._options import check_choice, check_preference
from mtl_optax._typing import TaskOption
from mtl_optax.aggregators._base import relative_norms, row_factors, shares, solved_aggregator

SCALES = ("min", "median", "rmse")


def aligned_mtl(
    num_tasks: int,
    *,
    scale: Literal["min", "median", "rmse"] = "min",
    preference: TaskOption | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Replaces the Jacobian by its nearest one of condition number 1, then averages.

    .. math:: d = J^\top \sigma\, (J J^\top)^{-1/2} p

    The aligned rows are orthogonal and of one length σ, so none conflicts and none dominates. The
    inverse root is a pseudo-inverse: singular values that unit rows leave at the level of rounding
    are dropped, those of rows that are merely small are not. Zero rows are left out.

    Small singular values are found to rounding whatever the norms of the rows (from 1e-4 to 1e4 and
    beyond in float32), and those of nearly dependent unit rows where rows are at hand, as with
    `jax.jacrev` and `gramian="rows"`: another Gramian loses what is below 1e-3. The aligned
    rows do not conflict with one another; the update may with a row that the alignment turned far.

    Args:
      num_tasks: number of tasks K; static, at least 1.
      scale: σ; of the kept singular values the smallest (`"min"`, as the paper), the lower median
        (`"median"`) or the root mean square (`"rmse"`).
      preference: p, a non-negative number or one a task; None is one over the number of tasks
        present, 1 the sum of the aligned rows.

    Returns:
      An aggregator: Jacobian in, gradient out. Update scale: that of a mean of orthogonal rows of
      length σ; with `"min"` often far shorter than the mean. Its state counts the updates that
      could not be solved, as with NaN rows: uniform weights 1/K.

    Raises:
      ValueError: if `num_tasks` < 1, `scale` is none of the three, a preference is negative or all
        0, or the losses are not K.

    Examples:
      >>> import jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> J = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
      >>> losses, jac = mtl.value_and_jac(lambda w: J @ w)(jnp.zeros(3))
      >>> tx = mtl.aligned_mtl(num_tasks=2)
      >>> updates, state = tx.update(jac, tx.init(jnp.zeros(3)))
      >>> [round(x, 4) for x in updates.tolist()]
      [0.2133, 0.9673, 0.9673]

    The singular values of rows of very unequal norms are found to rounding by LAPACK, on a CPU. The
    SVD of a GPU is accurate relative to the largest one: where norms are many orders of magnitude
    apart, it moved an update by 3 %.

    Differs from:
      The authors' code sums the aligned rows, K times our mean: `preference=1.0`. It squares the
      condition number of the rows, and drops what their Gramian leaves at the level of rounding.

    References:
      Senushkin et al., `Independent Component Alignment for Multi-Task Learning
      <https://arxiv.org/abs/2305.19000>`_, 2023, sec. 3.3 ("min"; "median" and "rmse" are in their
      code).
    """
    check_choice("scale", scale, SCALES)
    check_preference(preference)

    def solve(jacobian):
        cosines, norms = jacobian.correlation()
        p = shares(preference, jacobian).astype(norms.dtype)
        relative = relative_norms(norms)
        # Longest rows first: of a matrix graded so the SVD finds the small singular values to
        # rounding, where with the rows in another order it loses those below eps times the largest.
        order = jnp.argsort(-relative)
        relative, p = relative[order], p[order]
        values, vectors, kept = row_factors(jacobian, cosines)
        vectors = vectors[order]
        # J = A Wᵀ with orthonormal W: the singular values of A, not the roots of the eigenvalues of
        # A Aᵀ, lest the spread of the norms be squared.
        root = relative[:, None] * vectors * safe_sqrt(jnp.where(kept, values, 0))[None, :]
        left, singular, _ = jnp.linalg.svd(jnp.where(jnp.isfinite(root), root, 0))
        rank = jnp.sum(kept)
        kept = (jnp.arange(num_tasks) < rank) & (singular > 0)
        divisor = jnp.where(kept, singular, 1)
        sigma = {
            "min": lambda: divisor[rank - 1],
            "median": lambda: divisor[rank // 2],
            "rmse": lambda: jnp.sqrt(jnp.sum(jnp.where(kept, singular, 0) ** 2) / rank),
        }[scale]()
        weights = dot(left, jnp.where(kept, sigma / divisor, 0) * dot(p, left))
        weights = jnp.where(rank > 0, weights, 0)[jnp.argsort(order)]
        return weights, jnp.all(jnp.isfinite(norms))

    return solved_aggregator(num_tasks, solve)
