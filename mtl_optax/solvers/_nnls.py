"""Non-negative least squares."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import jax.scipy as jsp
from jax.typing import ArrayLike

from mtl_optax._numerics import divide, dot, power_of_two
from mtl_optax.solvers import _base

if TYPE_CHECKING:
    from jaxtyping import Float


def nnls(
    A: Float[ArrayLike, "M K"], b: Float[ArrayLike, " M"], *, max_steps: int | None = None
) -> _base.SolverResult:
    r"""Solves least squares under non-negativity.

    .. math:: \min_x \|Ax - b\|_2 \quad \text{s.t.}\; x \ge 0

    Lawson and Hanson's active-set method. Block principal pivoting on the normal equations guesses
    the active set; every step that decides the answer is a QR solve on A itself, so the
    conditioning is not squared. Any shape and rank: wide, duplicate or zero columns, zero A or b.
    Where the minimiser is not unique, x is one of them.

    Differs from:
      `scipy.optimize.nnls`: stops at the rounding error of the optimality conditions instead of
      an absolute tolerance, so the answer does not depend on the scale of A, of its columns or of
      b; reports the KKT residual, not :math:`\|Ax-b\|`; never raises on slow convergence.

    Args:
      A: matrix (m, n).
      b: vector (m,).
      max_steps: the most linear systems to solve, static; None is 10 n + 50.

    Returns:
      A `SolverResult`, x of shape (n,) in the wider of the types of A and b, at least float32. With
      r = b - Ax its residual is the largest over the columns a_j of

      .. math:: \frac{|a_j^T r| \;\text{if}\; x_j > 0 \;\text{else}\; \max(a_j^T r, 0)}
                     {\|a_j\| (\|b\| + \sum_k \|a_k\| x_k)},

      0 for a zero column or b = 0.

    Raises:
      ValueError: if the shapes are not (m, n) and (m,), both at least 1, or `max_steps` < 1.

    Examples:
      >>> import jax.numpy as jnp
      >>> from mtl_optax import solvers
      >>> A = jnp.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
      >>> solution = solvers.nnls(A, jnp.array([2.0, 1.0, -1.0]))
      >>> print(solution.x)
      [1.5 0. ]
      >>> bool(solution.converged)
      True

    References:
      Lawson and Hanson, `Solving Least Squares Problems <https://doi.org/10.1137/1.9781611971217>`_,
      1974, ch. 23.

      Kim and Park, `Fast Nonnegative Matrix Factorization: An Active-Set-Like Method and
      Comparisons <https://doi.org/10.1137/110821172>`_, 2011, sec. 4.
    """
    A, b = jnp.asarray(A), jnp.asarray(b)
    if A.ndim != 2 or b.shape != A.shape[:1] or 0 in A.shape:
        raise ValueError(
            f"A has shape {A.shape} and b {b.shape}, expected (m, n) and (m,) with m, n >= 1: "
            "use jax.vmap for a batch of problems."
        )
    return _solve(A, b, max_steps=_base.step_limit(max_steps, A.shape[1]))


@functools.partial(jax.jit, static_argnames="max_steps")
def _solve(A, b, *, max_steps):
    dtype = _base.solver_dtype(A, b)
    A, b = A.astype(dtype), b.astype(dtype)
    n = A.shape[1]

    # In two stages, lest the squares overflow; the norms end in [1, 2), or 0.
    column_scale = power_of_two(jnp.max(jnp.abs(A), axis=0))
    norm = jnp.linalg.norm(A / column_scale[None, :], axis=0)
    column_scale = column_scale * power_of_two(norm)
    A = A / column_scale[None, :]
    norm = jnp.linalg.norm(A, axis=0)
    b_scale = power_of_two(jnp.max(jnp.abs(b)))
    b = b / b_scale
    norm_b = jnp.linalg.norm(b)

    def misfit(x):
        return b - dot(A, x)

    def violation(x):
        slope = dot(misfit(x), A)
        wrong = jnp.where(x > 0, jnp.abs(slope), slope)
        rounding = norm * (norm_b + dot(norm, jnp.abs(x)))
        return divide(wrong, rounding, wrong)

    gramian = dot(A.T, A)
    ridge = _base.smallest_ridge(gramian)

    def normal_target(x, free):
        slope = dot(misfit(x), A)
        return x + _base.solve_free(gramian, ridge, free, slope[:, None])[:, 0]

    eps = jnp.finfo(dtype).eps

    def triangle(r, free):
        # R of [A r; D 0] holds the triangular system of min ‖Ap − r‖² + ‖Dp‖² and its right side; a
        # held column leaves only its 1 in D, so it yields p = 0 and disturbs nothing.
        top = jnp.concatenate([jnp.where(free[None, :], A, 0), r[:, None]], axis=1)
        bottom = jnp.pad(jnp.diag(jnp.where(free, 8 * eps, 1)), ((0, 0), (0, 1)))
        return jnp.linalg.qr(jnp.concatenate([top, bottom]), mode="r")

    def qr_target(x, free):
        r = misfit(x)
        # A column within rounding of the span of those before it (Lawson & Hanson's test and their
        # 100) can't lower ‖Ax − b‖; to solve for it would send x to 1/eps.
        free = free & (jnp.abs(jnp.diagonal(triangle(r, free))[:n]) > 100 * eps)
        R = triangle(r, free)
        return x + jnp.where(free, jsp.linalg.solve_triangular(R[:n, :n], R[:n, n]), 0)

    lower = jnp.zeros(n, dtype)
    free, steps = _base.guess(lower, normal_target, violation, max_steps)
    x = jnp.maximum(normal_target(lower, free), 0)
    # A clipped guess can be far worse than 0 when the columns are nearly dependent.
    x = jnp.where(jnp.linalg.norm(misfit(x)) < norm_b, x, 0)
    x, steps = _base.active_set(x, lower, qr_target, violation, steps, max_steps)
    residual = jnp.maximum(jnp.max(violation(x)), 0)
    return _base.result(x / column_scale * b_scale, residual, steps)
