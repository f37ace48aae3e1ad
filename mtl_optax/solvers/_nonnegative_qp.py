"""The non-negative quadratic program: the problem of UPGrad, DualProj and CAGrad."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from mtl_optax._numerics import bounded, divide, dot, power_of_two, safe_sqrt
from mtl_optax.solvers import _base
from mtl_optax.solvers._base import _PATIENCE, _REENTRY
from mtl_optax.solvers._block_pivoting import MANY, solve_together

if TYPE_CHECKING:
    from jaxtyping import Float

# A single program of more variables is solved faster without factorisations.
_FACTORISED = 128


def nonnegative_qp(
    Q: Float[ArrayLike, "K K"], q: Float[ArrayLike, " K"], *, max_steps: int | None = None
) -> _base.SolverResult:
    r"""Minimises a convex quadratic over the non-negative orthant.

    .. math:: \min_x \tfrac12 x^T Q x + q^T x \quad \text{s.t.}\; x \ge 0

    With Q = J Jᵀ and q = J v it projects v onto the cone of the vectors that conflict with no row
    of J: the projection is v + Jᵀx. An exact active-set method: a few linear systems, then machine
    precision. Q may be singular, zero, have duplicate rows or a diagonal of very unequal entries:
    it is scaled to about unit diagonal with powers of two, hence without rounding, and x does not
    depend on the scale of Q or q. Where the minimiser is not unique, x is one of them.

    Args:
      Q: matrix (K, K), symmetric positive semi-definite; only its symmetric part matters.
      q: vector (K,).
      max_steps: the most linear systems to solve, static; None is 10 K + 50.

    Returns:
      A `SolverResult`, x of shape (K,) in the wider of the types of Q and q, at least float32. With
      g = Qx + q and the lengths n² = diag Q its residual is the largest over i of

      .. math:: \frac{|g_i| \;\text{if}\; x_i > 0 \;\text{else}\; \max(-g_i, 0)}
                     {n_i (\max_k |q_k| / n_k + \sum_k n_k x_k)},

      where n_i = 0 compares with :math:`|q_i|`. An objective without a lower bound (q < 0 along a
      direction that Q does not see) gives a finite x: not converged, or the very long solution of
      a problem that differs by rounding.

    Raises:
      ValueError: if the shapes are not (K, K) and (K,) with K at least 1, or `max_steps` < 1.

    Examples:
      >>> import jax.numpy as jnp
      >>> from mtl_optax import solvers
      >>> J = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
      >>> mean = jnp.mean(J, axis=0)
      >>> x = solvers.nonnegative_qp(J @ J.T, J @ mean).x
      >>> print((mean + x @ J).round(4))
      [0.5556 1.1111 1.1111]

    References:
      Lawson and Hanson, `Solving Least Squares Problems <https://doi.org/10.1137/1.9781611971217>`_,
      1974, ch. 23.

      Kim and Park, `Fast Nonnegative Matrix Factorization: An Active-Set-Like Method and
      Comparisons <https://doi.org/10.1137/110821172>`_, 2011, sec. 4.
    """
    Q, q = jnp.asarray(Q), jnp.asarray(q)
    K = Q.shape[0] if Q.ndim else 0
    if Q.shape != (K, K) or q.shape != (K,) or K == 0:
        raise ValueError(
            f"Q has shape {Q.shape} and q {q.shape}, expected (K, K) and (K,) with K >= 1: "
            "use jax.vmap for a batch of problems."
        )
    return _solve(Q, q, max_steps=_base.step_limit(max_steps, K))


@functools.partial(jax.jit, static_argnames="max_steps")
def _solve(Q, q, *, max_steps):
    dtype = _base.solver_dtype(Q, q)
    Q, q = Q.astype(dtype), q.astype(dtype)

    Q_unit = power_of_two(jnp.max(jnp.abs(Q)))
    q_unit = power_of_two(jnp.max(jnp.abs(q)))
    Q, q = Q / Q_unit, q / q_unit
    curved = jnp.diagonal(Q) > 0
    s = power_of_two(safe_sqrt(jnp.where(curved, jnp.diagonal(Q), 0)))
    # From here on variables are s x.
    C = Q / s[:, None] / s[None, :]
    norm = safe_sqrt(jnp.where(curved, jnp.diagonal(C), 0))
    # Larger entries are no positive semi-definite matrix's, and might overflow.
    bound = norm[:, None] * norm[None, :]
    C = jnp.clip((C + C.T) / 2, -bound, bound)
    q = q / s
    unit = power_of_two(jnp.max(jnp.where(curved, jnp.abs(q), 0)))
    x, residual, steps = _solve_scaled(C, q / unit, norm, max_steps)
    x = bounded(x / s * unit * (q_unit / Q_unit))
    return _base.result(x, residual, steps)


def nonnegative_qp_of_cosines(C: jax.Array, q: jax.Array) -> _base.SolverResult:
    """`nonnegative_qp` where C are the cosines of rows, by the faster way for their number."""
    if q.size <= _FACTORISED:
        return nonnegative_qp(C, q)
    return jax.tree.map(lambda leaf: leaf[0], solve_together(C, q[None]))


def project_on_cosines(cosines: jax.Array) -> _base.SolverResult:
    """`nonnegative_qp(C, c)` of each row c of `(K, K)` cosines, whose scale needs no care."""
    if len(cosines) >= MANY:
        return solve_together(cosines, cosines)
    max_steps = _base.step_limit(None, len(cosines))
    norm = jnp.where(jnp.diagonal(cosines) > 0, 1, 0).astype(cosines.dtype)

    def solve(q):
        return _base.result(*_solve_scaled(cosines, q, norm, max_steps))

    # Batched factorisations are slow on a CPU. Elsewhere K programs in turns would be K times the
    # latency.
    in_turns = functools.partial(jax.lax.map, solve)
    return jax.lax.platform_dependent(cosines, cpu=in_turns, default=jax.vmap(solve))


def _solve_scaled(C, q, norm, max_steps):
    """The program whose C has about unit diagonal, its roots `norm`: x, residual and steps."""
    curved = norm > 0
    flat_slope = jnp.where(curved, 0, jnp.abs(q))
    steepest = jnp.max(divide(jnp.abs(q), norm))

    def gradient(x):
        return dot(C, x) + q

    def violation(x):
        slope = gradient(x)
        wrong = jnp.where(x > 0, jnp.abs(slope), -slope)
        rounding = norm * (steepest + dot(norm, jnp.abs(x))) + flat_slope
        return divide(wrong, rounding, wrong)

    x, steps = _active_set(C, q, gradient, violation, curved, max_steps)
    return x, jnp.maximum(jnp.max(violation(x)), 0), steps


class _Search(NamedTuple):
    x: jax.Array  # the feasible point; while pivoting, the best one to go on from
    free: jax.Array
    ridge: jax.Array
    pivoting: jax.Array
    fewest: jax.Array  # variables that the best pivot left wrong
    patience: jax.Array
    bar: jax.Array  # how much more a variable must violate to enter, as in `_base.active_set`
    steps: jax.Array
    done: jax.Array


def _active_set(C, q, gradient, violation, curved, max_steps):
    """`_base.guess`, from the variables that 0 leaves wrong, and `_base.active_set` in one loop.

    A program with one factorisation compiles in a third of the time of one with four, and under
    vmap a problem that is still pivoting does not hold up the others.
    """
    eps = jnp.finfo(q.dtype).eps
    K = q.size

    def unsolved(search):
        return ~search.done & (search.steps < max_steps)

    def body(search):
        x, free, ridge, pivoting, fewest, patience, bar, steps, _ = search
        origin = jnp.where(pivoting, 0, x)
        step = _base.solve_free(C, ridge, free & curved, gradient(origin)[:, None])[:, 0]
        # A Gramian that was rounded may have eigenvalues of a few -eps: then more ridge.
        failed = jnp.any(jnp.isnan(step))
        goal = origin - jnp.where(failed, 0, step)

        blocking = free & (goal < 0)
        ratios = jnp.where(blocking, x / jnp.where(blocking, x - goal, 1), 1)
        ratio = jnp.min(ratios)
        held = blocking & (ratios <= ratio)
        full = ~jnp.any(blocking)
        partial = jnp.where(held, 0, jnp.maximum(x + ratio * (goal - x), 0))
        moved = jnp.where(pivoting | full, goal, partial)
        excess = violation(moved)

        wrong = jnp.where(free, goal < 0, excess > eps)
        count = jnp.sum(wrong, dtype=jnp.int32)
        better = count < fewest
        clipped = jnp.maximum(goal, 0)
        # A clipped pivot can be far worse than 0 when rows are nearly dependent.
        useful = better & (dot(clipped, gradient(clipped) + q) < 0)
        best = jnp.where(useful, clipped, jnp.where(better, 0, x))
        fewest = jnp.minimum(count, fewest)
        patience = jnp.where(better, _PATIENCE, patience - 1)
        again = pivoting & (fewest > 0) & (patience > 0)

        excess = excess / bar
        enter = full & (excess > eps) & (jnp.arange(K) == jnp.argmax(excess))
        # A free variable that "enters" asks for the same step again: iterative refinement.
        raised = jnp.where(held | (enter & free), _REENTRY * bar, bar)
        following = _Search(
            x=jnp.where(pivoting, best, moved),
            free=jnp.where(
                pivoting, jnp.where(again, free ^ wrong, best > 0), (free & ~held) | enter
            ),
            ridge=ridge,
            pivoting=again,
            fewest=fewest,
            patience=patience,
            bar=jnp.where(pivoting, bar, raised),
            steps=steps + 1,
            done=~pivoting & full & ~jnp.any(enter),
        )
        # The bound ends the search when C holds a NaN.
        retry = search._replace(ridge=16 * ridge, steps=steps + 1, done=ridge > 1e9)
        return jax.tree.map(lambda a, b: jnp.where(failed, a, b), retry, following)

    zero, true = jnp.zeros((), jnp.int32), jnp.ones((), bool)
    free = curved & (q < 0)
    search = _Search(
        x=jnp.zeros_like(q),
        free=free,
        ridge=jnp.asarray(4 * K * eps, q.dtype),
        pivoting=true,
        fewest=zero + (K + 1),
        patience=zero + _PATIENCE,
        bar=jnp.ones_like(q),
        steps=zero,
        done=~jnp.any(free),
    )
    search = jax.lax.while_loop(unsolved, body, search)
    return search.x, search.steps
