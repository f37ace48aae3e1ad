"""What the solvers share: the result, exact scaling, the masked solve and the two active-set loops.

A solver describes its convex program with two functions of the point:

- `target(x, free)`: the minimiser over the `free` variables, the others staying where they are. It
  is a *proximal* Newton step: a tiny ridge acts on the step, not on the point, so a singular matrix
  is ordinary input and the ridge leaves no bias once the steps vanish.
- `violation(x)`: how far each variable is from its optimality condition, relative to the
  magnitude of the terms that cancel in it; positive where the variable should rise.

`guess` finds nearly all of the active set in a few block exchanges but may cycle; `active_set`
changes a variable at a time, ends, and polishes. Together they take a handful of steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import jax.scipy as jsp

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int

Target = Callable[[jax.Array, jax.Array], jax.Array]
Violation = Callable[[jax.Array], jax.Array]

# Exchanges in a row that may fail to reduce the wrong variables before `guess` gives up. Kim & Park
# use 3; with 6 the slowest of 200 ill-conditioned K = 100 problems take half the steps.
_PATIENCE = 6
# To come back, a variable that left the free set must violate this many times more: a cycle at the
# level of rounding ends after log(1 / eps) rounds at the latest.
_REENTRY = 4.0
# `converged` means a residual below this many machine epsilons.
_CONVERGED = 64
# Up to so many variables are eliminated in place of factorised where kernels have to be launched.
_FEW = 8


class SolverResult(NamedTuple):
    """What a solver found, and how well.

    Attributes:
      x: the solution: feasible, and finite for finite input.
      residual: scalar, the relative KKT residual that the solver's docstring defines. 0 at the
        exact solution, a few machine epsilons at a computed one, whatever the scale of the input.
      num_steps: scalar int32, the number of linear systems solved.
      converged: scalar bool, whether `residual` is at most 64 machine epsilons.
    """

    x: Float[Array, " K"]
    residual: Float[Array, ""]
    num_steps: Int[Array, ""]
    converged: Bool[Array, ""]


def step_limit(max_steps: int | None, size: int) -> int:
    """The most linear systems a solver may solve; the default is far above any need seen."""
    if max_steps is None:
        return 10 * size + 50
    if max_steps < 1:
        raise ValueError(f"max_steps is {max_steps}, expected at least 1; None is the default cap.")
    return max_steps


def solver_dtype(*arrays: jax.Array) -> jnp.dtype:
    """The widest floating type of the arrays, at least float32."""
    return jnp.promote_types(jnp.result_type(*arrays), jnp.float32)


def smallest_ridge(C: jax.Array) -> jax.Array:
    """A ridge just large enough to factor every principal block of a matrix of about unit diagonal.

    A Gramian that was rounded may have eigenvalues of a few -eps. If the whole matrix has a
    Cholesky factor then so has every block (interlacing), so one factorisation settles them all.
    """
    eye = jnp.eye(C.shape[0], dtype=C.dtype)

    def fails(ridge):
        # The bound ends the search when C holds a NaN.
        return jnp.any(jnp.isnan(solve(C + ridge * eye, eye[:, :1]))) & (ridge < 1e9)

    start = jnp.asarray(4 * C.shape[0] * jnp.finfo(C.dtype).eps, C.dtype)
    return jax.lax.while_loop(fails, lambda ridge: 16 * ridge, start)


def solve_free(C: jax.Array, ridge: jax.Array, free: jax.Array, rhs: jax.Array) -> jax.Array:
    """Solves (C + ridge I) Y = rhs on the `free` rows and columns; the other rows of Y are 0."""
    block = jnp.where(free[:, None] & free[None, :], C, 0)
    regular = block + jnp.diag(jnp.where(free, ridge, 1))
    return solve(regular, jnp.where(free[:, None], rhs, 0))


def solve(M: jax.Array, rhs: jax.Array) -> jax.Array:
    """Solves M Y = rhs with M positive definite; Y holds NaN where rounding left M indefinite."""
    if len(M) > _FEW:
        return _by_cholesky(M, rhs)
    return jax.lax.platform_dependent(M, rhs, cpu=_by_cholesky, default=by_elimination)


def _by_cholesky(M, rhs):
    return jsp.linalg.cho_solve((jnp.linalg.cholesky(M), True), rhs)


def by_elimination(M: jax.Array, rhs: jax.Array) -> jax.Array:
    """`solve` by Gauss and Jordan: a kernel a variable, where LAPACK's on a GPU take a dozen calls.

    A positive definite matrix needs no pivoting.
    """
    K = len(M)
    system = jnp.concatenate([M, rhs], axis=1)
    for k in range(K):
        pivot = system[k, k]
        row = system[k : k + 1] / jnp.where(pivot > 0, pivot, jnp.nan)
        rest = system - system[:, k : k + 1] * row
        system = jnp.where(jnp.arange(K)[:, None] == k, row, rest)
    return system[:, K:]


def guess(
    lower: jax.Array, target: Target, violation: Violation, max_steps: int
) -> tuple[jax.Array, jax.Array]:
    """Block principal pivoting: exchanges all the wrong variables at once, from "all free".

    Returns:
      The free set that left the fewest variables wrong, and the steps it took.
    """
    eps = jnp.finfo(lower.dtype).eps

    def unsolved(carry):
        _, _, fewest, patience, steps = carry
        return (fewest > 0) & (patience > 0) & (steps < max_steps)

    def body(carry):
        free, best, fewest, patience, steps = carry
        x = target(lower, free)
        wrong = jnp.where(free, x < lower, violation(x) > eps)
        count = jnp.sum(wrong, dtype=jnp.int32)
        better = count < fewest
        best = jnp.where(better, free, best)
        patience = jnp.where(better, _PATIENCE, patience - 1)
        return free ^ wrong, best, jnp.minimum(count, fewest), patience, steps + 1

    free = jnp.ones(lower.shape, bool)
    zero = jnp.zeros((), jnp.int32)
    start = (free, free, zero + (lower.size + 1), zero + _PATIENCE, zero)
    _, best, _, _, steps = jax.lax.while_loop(unsolved, body, start)
    return best, steps


def active_set(
    x: jax.Array,
    lower: jax.Array,
    target: Target,
    violation: Violation,
    steps: jax.Array,
    max_steps: int,
) -> tuple[jax.Array, jax.Array]:
    """The primal active-set method, Lawson & Hanson's two loops in one, from a feasible point.

    A step goes towards the minimiser over the free variables as far as the bounds allow and holds
    the variable that blocks. After a full step the worst violator becomes free. The objective never
    rises beyond rounding.

    Returns:
      The solution and the number of steps so far.
    """
    eps = jnp.finfo(x.dtype).eps

    def unsolved(carry):
        *_, steps, done = carry
        return ~done & (steps < max_steps)

    def body(carry):
        x, free, bar, steps, _ = carry
        goal = target(x, free)
        blocking = free & (goal < lower)
        ratio = jnp.where(blocking, (x - lower) / jnp.where(blocking, x - goal, 1), 1)
        held = blocking & (ratio <= jnp.min(ratio))
        full = ~jnp.any(held)
        partial = jnp.maximum(x + jnp.min(ratio) * (goal - x), lower)
        x = jnp.where(full, goal, jnp.where(held, lower, partial))

        excess = violation(x) / bar
        enter = full & (excess > eps) & (jnp.arange(x.size) == jnp.argmax(excess))
        # A free variable that "enters" asks for the same step again: iterative refinement.
        bar = jnp.where(held | (enter & free), _REENTRY * bar, bar)
        return x, (free & ~held) | enter, bar, steps + 1, full & ~jnp.any(enter)

    start = (x, x > lower, jnp.ones_like(x), steps, jnp.zeros((), bool))
    x, _, _, steps, _ = jax.lax.while_loop(unsolved, body, start)
    return x, steps


def result(x: jax.Array, residual: jax.Array, steps: jax.Array) -> SolverResult:
    """The result, with its verdict; a NaN residual has not converged."""
    return SolverResult(x, residual, steps, residual <= _CONVERGED * jnp.finfo(x.dtype).eps)
