"""The program of CAGrad and ConicGrad: the best worst improvement not too far from the mean."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mtl_optax._numerics import divide, dot
from mtl_optax.aggregators._base import relative_norms
from mtl_optax.solvers import SolverResult

_MAX_STEPS = 50


class Mean(NamedTuple):
    """The mean of the rows present, in units of the largest row."""

    relative: jax.Array  # (K,) the norms of the rows over the largest
    share: jax.Array  # () the weight of each row in the mean
    length: jax.Array  # () its norm, 1 where it has none
    slopes: jax.Array  # (K,) the cosine of each row with it
    stationary: jax.Array  # () bool, whether it cancels to rounding: it has no direction then


def mean_of_rows(cosines: jax.Array, norms: jax.Array, present: jax.Array) -> Mean:
    """The mean, from cosines and norms."""
    share = 1 / jnp.maximum(jnp.sum(present), 1).astype(norms.dtype)
    relative = relative_norms(norms)
    weights = relative * share
    slopes = dot(cosines, weights)
    square = dot(weights, slopes)
    stationary = square <= 4 * norms.size * jnp.finfo(norms.dtype).eps * jnp.sum(weights) ** 2
    length = jnp.where(stationary, 1, jnp.sqrt(jnp.maximum(square, 0)))
    return Mean(relative, share, length, slopes / length, stationary)


class Ascent(NamedTuple):
    """The steepest common ascent: along it all tasks gain the same, at least."""

    weights: jax.Array  # (K,) of the unit rows
    norm: jax.Array  # () of their sum
    gain: jax.Array  # () of a unit vector along it, in units of the least norm; 0 if none is seen


class Lift(NamedTuple):
    """What `best_worst` found."""

    ascent: Ascent
    weights: jax.Array  # (K,) of the moves away from the mean
    solved: jax.Array  # () bool


def best_worst(
    cosines: jax.Array,
    moves: jax.Array,
    mean: Mean,
    present: jax.Array,
    radius: jax.Array,
    start: Callable[[Ascent, jax.Array], jax.Array],
    solve: Callable[[jax.Array, jax.Array], SolverResult],
) -> Lift:
    """The move e of norm `radius` at which the least improvement μ of d = mean + e is largest.

    For a bound μ the nearest d to the mean with ⟨g_k, d⟩ ≥ μ is a non-negative QP, and its distance
    is convex and increasing in μ, so Newton's method finds the μ whose distance is the radius.

    Args:
      cosines: `(K, K)`, of the rows.
      moves: `(K, K)`, inner products of the vectors along which e may go, one a row.
      mean: of the rows. In units of its norm, d is 1 + e long.
      present: `(K,)` bool.
      radius: of the ball around the mean.
      start: from the steepest common ascent and the ratios of the least norm to each row's to a
        bound μ above that of the radius, in units of the least norm.
      solve: the solver of the non-negative QP for `moves`.
    """
    K, eps = mean.relative.size, jnp.finfo(cosines.dtype).eps
    # In units of the mean's norm, and with the bound μ in units of the least norm besides, row k
    # asks for <u_k, d> >= μ ρ_k with ρ_k <= 1.
    smallest = jnp.min(jnp.where(mean.relative > 0, mean.relative, 1))
    ratios = divide(smallest, mean.relative)

    ridge = 4 * K * eps
    eye = jnp.eye(K, dtype=cosines.dtype)

    # The steepest common ascent comes first. With η² the program's -2 × optimum, 1 / η is what all
    # tasks can gain along a unit vector. Where that is below the rounding of the Gramian no μ > 0
    # is attainable; nor is it for a zero row of a task that is present.
    def steepest(weights: jax.Array) -> Ascent:
        square = dot(weights, dot(cosines, weights))
        seen = square > 4 * ridge * dot(weights, weights)
        eta = jnp.sqrt(jnp.maximum(dot(ratios, weights), 1))
        attainable = seen & jnp.all((mean.relative > 0) | ~present)
        return Ascent(weights, jnp.sqrt(jnp.maximum(square, 0)), jnp.where(attainable, 1 / eta, 0))

    def unsolved(carry: Any) -> jax.Array:
        *_, done, steps = carry
        return ~done & (steps < _MAX_STEPS)

    def body(carry: Any) -> Any:
        ascent, _, bound, _, _, steps = carry
        first = steps == 0
        # One call of the solver, for one copy of it in the program.
        solution = solve(
            jnp.where(first, cosines + ridge * eye, moves),
            jnp.where(first, 0, mean.slopes) - jnp.where(first, 1, bound) * ratios,
        )
        lift = solution.x
        distance = jnp.sqrt(jnp.maximum(dot(lift, dot(moves, lift)), 0))
        gain = dot(ratios, lift)  # distance times its derivative in the bound
        rounding = eps * (distance + divide(jnp.sum(lift) ** 2, distance))
        excess = distance - radius
        # Convex: from above, Newton's iterates stay above the root.
        following = bound - divide(excess * distance, gain)
        done = (excess <= 4 * rounding) | (gain <= 0) | (following >= bound)
        ascent = jnp.where(first, lift, ascent)
        bound = jnp.where(first, start(steepest(ascent), ratios), following)
        return ascent, lift, bound, solution.converged, done & ~first, steps + 1

    zeros, false = jnp.zeros_like(mean.relative), jnp.zeros((), bool)
    carry = (zeros, zeros, jnp.zeros_like(radius), false, false, jnp.zeros((), jnp.int32))
    ascent, lift, _, converged, done, _ = jax.lax.while_loop(unsolved, body, carry)
    return Lift(steepest(ascent), lift, done & converged)
