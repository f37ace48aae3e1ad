"""The program of CAGrad and ConicGrad: the best worst improvement not too far from the mean."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mtl_optax._numerics import divide, dot, safe_sqrt
from mtl_optax.aggregators._base import relative_norms
from mtl_optax.solvers import SolverResult

_MAX_STEPS = 50
# The rounding of a distance that is still one, in units of the radius.
_KNOWN = 0.1


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
    length = jnp.where(stationary, 1, safe_sqrt(square))
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


class _Search(NamedTuple):
    ascent: jax.Array  # (K,) weights of the steepest common ascent, which comes first
    lift: jax.Array  # (K,) the last one whose distance is known
    bound: jax.Array  # () to try next
    low: jax.Array  # () a bound whose distance is at most the radius
    high: jax.Array  # () one whose distance is more, as far as is known
    solved: jax.Array  # () bool, whether the solver found that lift
    done: jax.Array
    steps: jax.Array


def best_worst(
    cosines: jax.Array,
    moves: jax.Array,
    mean: Mean,
    present: jax.Array,
    radius: jax.Array,
    start: Callable[[Ascent, jax.Array, jax.Array], jax.Array],
    solve: Callable[[jax.Array, jax.Array], SolverResult],
) -> Lift:
    """The move e of norm `radius` at which the least improvement μ of d = mean + e is largest.

    For a bound μ the nearest d to the mean with ⟨g_k, d⟩ ≥ μ is a non-negative QP, and its distance
    is convex and increasing in μ, so Newton's method, between bounds that are known to be too low
    and too high, finds the μ whose distance is the radius.

    Args:
      cosines: `(K, K)`, of the rows.
      moves: `(K, K)`, inner products of the vectors along which e may go, one a row.
      mean: of the rows. In units of its norm, d is 1 + e long.
      present: `(K,)` bool.
      radius: of the ball around the mean.
      start: from the steepest common ascent, the ratios of the least norm to each row's and the
        bound that the mean meets to one μ above that of the radius, in units of the least norm.
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
        return Ascent(weights, safe_sqrt(square), jnp.where(attainable, 1 / eta, 0))

    # With a lift of 0, d is the mean, and gains this.
    at_mean = jnp.min(jnp.where(ratios > 0, divide(mean.slopes, ratios), 1))

    def unsolved(search: _Search) -> jax.Array:
        return ~search.done & (search.steps < _MAX_STEPS)

    def body(search: _Search) -> _Search:
        first, bound = search.steps == 0, search.bound
        # One call of the solver, for one copy of it in the program.
        solution = solve(
            jnp.where(first, cosines + ridge * eye, moves),
            jnp.where(first, 0, mean.slopes) - jnp.where(first, 1, bound) * ratios,
        )
        lift = solution.x
        square = jnp.maximum(dot(lift, dot(moves, lift)), 0)
        noise = 4 * eps * (square + jnp.sum(lift) ** 2)
        distance = safe_sqrt(square)
        rounding = divide(noise, jnp.sqrt(jnp.maximum(square, noise)))
        gain = dot(ratios, lift)  # distance times its derivative in the bound
        excess = distance - radius
        # Towards a bound that is not attainable the lift grows until it cancels to rounding. All
        # that its distance says then is that the bound is too high.
        known = rounding <= _KNOWN * radius
        low = jnp.where(known & (excess <= 0), bound, search.low)
        high = jnp.where(known & (excess <= 0), search.high, bound)
        # Convex: from either side Newton's iterates come to lie above the root.
        newton = bound - divide(excess * distance, gain)
        is_between = known & (low < newton) & (newton < high)
        following = jnp.where(is_between, newton, low + (high - low) / 2)
        met = (excess <= rounding) & ((excess >= -rounding) | (bound >= high))
        met |= (excess > 0) & (newton >= bound)
        nothing_between = (following <= low) | (following >= high)
        then = _Search(
            ascent=search.ascent,
            lift=jnp.where(known, lift, search.lift),
            bound=following,
            low=low,
            high=high,
            solved=jnp.where(known, solution.converged, search.solved),
            done=(known & met) | nothing_between,
            steps=search.steps + 1,
        )
        top = start(steepest(lift), ratios, at_mean)
        begin = search._replace(
            ascent=lift, bound=top, low=jnp.minimum(at_mean, top), high=top, steps=then.steps
        )
        return jax.tree.map(lambda a, b: jnp.where(first, a, b), begin, then)

    zeros, zero, false = jnp.zeros_like(mean.relative), jnp.zeros_like(radius), jnp.bool_(False)
    search = _Search(zeros, zeros, zero, zero, zero, false, false, jnp.zeros((), jnp.int32))
    search = jax.lax.while_loop(unsolved, body, search)
    return Lift(steepest(search.ascent), search.lift, search.done & search.solved)
