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
    steepest = jnp.max(jnp.abs(q), axis=1)
    num_programs, K = q.shape
    eps = jnp.finfo(q.dtype).eps
    max_steps = 50 * K + 200
    # The bar rises, lest all wait for a residual that rounding holds above it: fast where the
    # residual hovers just above it, as between the many solutions of a singular program.
    hovering, falling = 2 ** (1 / (K / 4 + 16)), 2 ** (1 / (8 * K + 64))
    reach = divide(_REACH, _largest_eigenvalue(C))

    def unsolved(state):
        return ~jnp.all(state.done) & (state.steps < max_steps)

    def body(state):
        x, slope, direction, free, stale, pivoting, fewest, patience, bar, done, steps = state
        image = dot(jnp.where(stale[:, None], x, direction), C)
        moving = ~stale & ~done

        # Along the direction. Where its curvature is rounding there may be no minimum: pivoting
        # exchanges what it has, projecting goes to the bound, if there is one.
        square, curvature = _inner(direction, direction), _inner(direction, image)
        flat = moving & (curvature <= eps * square)
        curvature = jnp.maximum(curvature, eps * square)
        lost = flat & (pivoting | ~jnp.any(direction > 0, axis=1))
        length = jnp.where(moving & ~lost, divide(_inner(slope, direction), curvature), 0)
        moved = x - length[:, None] * direction
        hit = moving & ~pivoting & jnp.any(moved < 0, axis=1)

        # At a bound: as far as it allows, and from there a fixed step that may hold more variables.
        room = jnp.where((moved < 0) & (direction > 0), divide(x, direction), jnp.inf)
        room = jnp.where(hit, jnp.min(room, axis=1), 0)[:, None]
        descent = jnp.where(free, slope - room * image, 0)
        held = jnp.maximum(x - room * direction - reach * descent, 0)
        slope = jnp.where(stale[:, None], image + q, slope - length[:, None] * image)
        x = jnp.where(hit[:, None], held, moved)
        free = jnp.where(pivoting[:, None], free, x > 0)

        inner = jnp.where(free, slope, 0)
        outer = jnp.where(free, 0, jnp.minimum(slope, 0))
        size = steepest + jnp.sum(jnp.abs(x), axis=1)
        unsolved_part = divide(jnp.max(jnp.abs(inner), axis=1), size)
        violation = divide(jnp.max(jnp.where(free, -x, -outer), axis=1), size)

        # Exchange what is wrong, or give up and go on from what is feasible.
        settled = lost | (unsolved_part <= _SHARP * violation)
        exchange = pivoting & ~done & (violation > bar) & settled
        wrong = jnp.where(free, x < 0, -outer > (bar * size)[:, None]) & exchange[:, None]
        count = jnp.sum(wrong, axis=1, dtype=jnp.int32)
        better = count < fewest
        patience = jnp.where(exchange, jnp.where(better, _PATIENCE, patience - 1), patience)
        fewest = jnp.where(exchange, jnp.minimum(count, fewest), fewest)
        quits = exchange & (patience <= 0)
        free = jnp.where(quits[:, None], x > 0, free ^ wrong)
        x = jnp.where(exchange[:, None], jnp.where(free, jnp.maximum(x, 0), 0), x)
        pivoting = pivoting & ~quits

        # A recurrence may claim what the slope itself does not confirm: then ask for less.
        residual = jnp.maximum(unsolved_part, violation)
        small = residual <= bar
        done = done | (stale & small) | jnp.isnan(unsolved_part)
        claim = moving & ~hit & ~exchange & (small | lost)
        rise = jnp.where(residual <= 8 * bar, hovering, falling)
        bar = jnp.where(claim, 2 * bar, bar) * rise
        stale = (hit | claim | exchange) & ~done

        conjugate = inner - divide(_inner(inner, image), curvature)[:, None] * direction
        inward = pivoting | (_inner(outer, outer) <= _inner(inner, inner))
        direction = jnp.where(inward[:, None], conjugate, outer)
        direction = jnp.where((done | stale)[:, None], 0, direction)
        return _Programs(
            x, slope, direction, free, stale, pivoting, fewest, patience, bar, done, steps + 1
        )

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
        bar=jnp.full(num_programs, eps / 2, q.dtype),
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


def _inner(a, b):
    return jnp.sum(a * b, axis=1)


def _largest_eigenvalue(C):
    """A bound of it, (tr C⁸)^(1/8): at most K^(1/8) times too large."""
    unit = power_of_two(jnp.max(jnp.sum(jnp.abs(C), axis=1)))
    square = dot(C / unit, C / unit)
    fourth = dot(square, square)
    # Rounding makes it no smaller than the bound of the row sums, which is below 2.
    return unit * jnp.minimum(2, 1.001 * jnp.sum(fourth * fourth) ** 0.125)
