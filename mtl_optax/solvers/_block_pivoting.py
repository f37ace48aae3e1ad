"""Non-negative quadratic programs of one matrix, solved side by side without a factorisation.

The programs of UPGrad differ in their linear terms alone. All of them take a step of conjugate
gradients at a time, so an iteration is one product of K x K matrices, which every machine is good
at; K factorisations an exchange are what a CPU is worst at.

Each program goes through two phases. *Pivoting*: conjugate gradients on the free variables, of any
sign, until they say which variables are wrong; those are exchanged all at once (Kim & Park). That
takes a few exchanges but may cycle, or have no minimum where C is singular to rounding; then
*projecting* takes over: conjugate gradients that stop at the bounds, and free variables where more
is to gain (Dostál & Schöberl). It ends.

References:
  Kim and Park, Fast Nonnegative Matrix Factorization, 2011, sec. 4.
  Dostál and Schöberl, Minimizing Quadratic Functions Subject to Bound Constraints with the Rate of
  Convergence and Finite Termination, 2005.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mtl_optax._numerics import divide, dot, power_of_two
from mtl_optax.solvers import _base
from mtl_optax.solvers._base import _PATIENCE

# From how many variables on this takes less time than factorising.
MANY = 32
# Variables are exchanged when the free slopes are below this part of the largest violation.
_SHARP = 0.2
# The fixed step, in units of the inverse of the largest eigenvalue; it descends below 2.
_REACH = 1.9


class _Problem(NamedTuple):
    C: jax.Array  # (K, K)
    q: jax.Array  # (B, K), its largest entries between 1 and 2
    steepest: jax.Array  # (B,), those entries
    reach: jax.Array  # (), the length of a fixed step


class _Programs(NamedTuple):
    x: jax.Array  # (B, K), of any sign while pivoting
    slope: jax.Array  # (B, K), C x + q: follows x by a recurrence
    direction: jax.Array  # (B, K), 0 where conjugate gradients begin anew
    free: jax.Array  # (B, K) bool
    stale: jax.Array  # (B,) bool: compute the slope anew instead of a step
    pivoting: jax.Array  # (B,) bool
    fewest: jax.Array  # (B,) int32, wrong variables at the best exchange
    patience: jax.Array  # (B,) int32
    bar: jax.Array  # (B,), the residual to reach
    done: jax.Array  # (B,) bool
    steps: jax.Array  # () int32


class _Step(NamedTuple):
    image: jax.Array  # (B, K), C times the direction
    curvature: jax.Array  # (B,), along the direction
    moving: jax.Array  # (B,) bool
    hit: jax.Array  # (B,) bool: a bound stood in the way
    lost: jax.Array  # (B,) bool: nothing stands in the way of a direction without curvature


class _Residual(NamedTuple):
    inner: jax.Array  # (B, K), slopes of the free variables, which should be 0
    outer: jax.Array  # (B, K), slopes of the others where they are negative
    size: jax.Array  # (B,), what a slope is a sum of
    unsolved: jax.Array  # (B,), the largest of the inner ones, relative to that
    violation: jax.Array  # (B,), of a variable on the wrong side


def solve_together(C: jax.Array, q: jax.Array) -> _base.SolverResult:
    """Minimises xᵀCx / 2 + qᵀx over x >= 0 for each row q of `(B, K)`.

    Args:
      C: `(K, K)`, positive semi-definite to rounding, with a diagonal of 1, or 0 where q is 0 too.
      q: `(B, K)`.

    Returns:
      A `SolverResult` of B programs, with the residual of `nonnegative_qp`; its steps are products.
    """
    unit = power_of_two(jnp.max(jnp.abs(q), axis=1))
    q = q / unit[:, None]
    num_programs, K = q.shape
    steepest = jnp.max(jnp.abs(q), axis=1)
    problem = _Problem(C, q, steepest, divide(_REACH, _largest_eigenvalue(C)))

    def unsolved(state):
        return ~jnp.all(state.done) & (state.steps < 50 * K + 200)

    def body(state):
        state, step = _move(problem, state)
        residual = _residual(problem, state)
        state, exchanged = _exchange(state, step, residual)
        state = _confirm(state, step, residual, exchanged)
        return _turn(state, step, residual)._replace(steps=state.steps + 1)

    yes = jnp.ones(num_programs, bool)
    x = jnp.maximum(-q, 0)
    state = _Programs(
        x=x,
        slope=q,
        direction=jnp.zeros_like(q),
        free=x > 0,
        stale=yes,
        pivoting=yes,
        fewest=jnp.full(num_programs, K + 1, jnp.int32),
        patience=jnp.full(num_programs, _PATIENCE, jnp.int32),
        bar=jnp.full(num_programs, jnp.finfo(q.dtype).eps / 2, q.dtype),
        done=~jnp.isfinite(steepest),
        steps=jnp.zeros((), jnp.int32),
    )
    state = jax.lax.while_loop(unsolved, body, state)
    x = jnp.where(state.free, jnp.maximum(state.x, 0), 0)
    slope = dot(x, C) + q
    wrong = jnp.max(jnp.where(x > 0, jnp.abs(slope), jnp.maximum(-slope, 0)), axis=1)
    size = steepest + jnp.sum(x, axis=1)
    residual = jnp.where(jnp.isfinite(size), divide(wrong, size, wrong), jnp.nan)
    steps = jnp.broadcast_to(state.steps, yes.shape)
    return _base.result(x * unit[:, None], residual, steps)


def _move(problem: _Problem, s: _Programs) -> tuple[_Programs, _Step]:
    """Along the direction; a stale program gets its slope instead."""
    image = dot(jnp.where(s.stale[:, None], s.x, s.direction), problem.C)
    moving = ~s.stale & ~s.done

    # Where the curvature is rounding there may be no minimum: pivoting exchanges what it has,
    # projecting goes to the bound, if there is one.
    eps = jnp.finfo(s.x.dtype).eps
    square, curvature = _inner(s.direction, s.direction), _inner(s.direction, image)
    flat = moving & (curvature <= eps * square)
    curvature = jnp.maximum(curvature, eps * square)
    lost = flat & (s.pivoting | ~jnp.any(s.direction > 0, axis=1))
    length = jnp.where(moving & ~lost, divide(_inner(s.slope, s.direction), curvature), 0)
    moved = s.x - length[:, None] * s.direction
    hit = moving & ~s.pivoting & jnp.any(moved < 0, axis=1)

    # At a bound: as far as it allows, and from there a fixed step that may hold more variables.
    room = jnp.where((moved < 0) & (s.direction > 0), divide(s.x, s.direction), jnp.inf)
    room = jnp.where(hit, jnp.min(room, axis=1), 0)[:, None]
    descent = jnp.where(s.free, s.slope - room * image, 0)
    held = jnp.maximum(s.x - room * s.direction - problem.reach * descent, 0)
    x = jnp.where(hit[:, None], held, moved)
    slope = s.slope - length[:, None] * image
    slope = jnp.where(s.stale[:, None], image + problem.q, slope)
    s = s._replace(x=x, slope=slope, free=jnp.where(s.pivoting[:, None], s.free, x > 0))
    return s, _Step(image, curvature, moving, hit, lost)


def _residual(problem: _Problem, s: _Programs) -> _Residual:
    inner = jnp.where(s.free, s.slope, 0)
    outer = jnp.where(s.free, 0, jnp.minimum(s.slope, 0))
    size = problem.steepest + jnp.sum(jnp.abs(s.x), axis=1)
    unsolved = divide(jnp.max(jnp.abs(inner), axis=1), size)
    violation = divide(jnp.max(jnp.where(s.free, -s.x, -outer), axis=1), size)
    return _Residual(inner, outer, size, unsolved, violation)


def _exchange(s: _Programs, step: _Step, residual: _Residual) -> tuple[_Programs, jax.Array]:
    """Exchanges what is wrong, or gives up pivoting and goes on from what is feasible."""
    settled = step.lost | (residual.unsolved <= _SHARP * residual.violation)
    exchanged = s.pivoting & ~s.done & (residual.violation > s.bar) & settled
    too_steep = -residual.outer > (s.bar * residual.size)[:, None]
    wrong = jnp.where(s.free, s.x < 0, too_steep) & exchanged[:, None]
    count = jnp.sum(wrong, axis=1, dtype=jnp.int32)
    patience = jnp.where(count < s.fewest, _PATIENCE, s.patience - 1)
    patience = jnp.where(exchanged, patience, s.patience)
    fewest = jnp.where(exchanged, jnp.minimum(count, s.fewest), s.fewest)
    quits = exchanged & (patience <= 0)
    free = jnp.where(quits[:, None], s.x > 0, s.free ^ wrong)
    x = jnp.where(exchanged[:, None], jnp.where(free, jnp.maximum(s.x, 0), 0), s.x)
    pivoting = s.pivoting & ~quits
    s = s._replace(x=x, free=free, pivoting=pivoting, fewest=fewest, patience=patience)
    return s, exchanged


def _confirm(s: _Programs, step: _Step, residual: _Residual, exchanged: jax.Array) -> _Programs:
    """A recurrence may claim what the slope itself does not confirm: then it asks for less."""
    # The bar rises, lest all wait for a residual that rounding holds above it: fast where the
    # residual hovers just above it, as between the many solutions of a singular program.
    K = s.x.shape[1]
    hovering, falling = 2 ** (1 / (K / 4 + 16)), 2 ** (1 / (8 * K + 64))
    worst = jnp.maximum(residual.unsolved, residual.violation)
    small = worst <= s.bar
    done = s.done | (s.stale & small) | jnp.isnan(residual.unsolved)
    claim = step.moving & ~step.hit & ~exchanged & (small | step.lost)
    rise = jnp.where(worst <= 8 * s.bar, hovering, falling)
    bar = jnp.where(claim, 2 * s.bar, s.bar) * rise
    return s._replace(done=done, bar=bar, stale=(step.hit | claim | exchanged) & ~done)


def _turn(s: _Programs, step: _Step, residual: _Residual) -> _Programs:
    """The next direction: conjugate among the free variables, or where more is to gain."""
    inner, outer = residual.inner, residual.outer
    turn = divide(_inner(inner, step.image), step.curvature)
    conjugate = inner - turn[:, None] * s.direction
    inward = s.pivoting | (_inner(outer, outer) <= _inner(inner, inner))
    direction = jnp.where(inward[:, None], conjugate, outer)
    return s._replace(direction=jnp.where((s.done | s.stale)[:, None], 0, direction))


def _inner(a, b):
    return jnp.sum(a * b, axis=1)


def _largest_eigenvalue(C):
    """A bound of it, (tr C⁸)^(1/8): at most K^(1/8) times too large."""
    unit = power_of_two(jnp.max(jnp.sum(jnp.abs(C), axis=1)))
    square = dot(C / unit, C / unit)
    fourth = dot(square, square)
    # Rounding makes it no smaller than the bound of the row sums, which is below 2.
    return unit * jnp.minimum(2, 1.001 * jnp.sum(fourth * fourth) ** 0.125)
