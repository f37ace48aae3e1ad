"""What the methods share that move weights over the simplex a step at a time."""

import functools

import jax
import jax.numpy as jnp

from mtl_optax._min_norm import project_on_simplex
from mtl_optax._numerics import divide
from mtl_optax.jacobian import Jacobian


def relative_products(first: Jacobian, second: Jacobian, present: jax.Array) -> jax.Array:
    """J J'ᵀ of two batches over the mean product of a task's two norms: of order 1 at any scale.

    A step size along it then means the same whatever the units of the losses.
    """
    products, left, right = first.cross_gramian(second)
    tops = [_or_one(jnp.max(jnp.abs(scales))) for scales in (left, right)]
    left, right = left / tops[0], right / tops[1]
    norms = [jac.norms() / top for jac, top in zip((first, second), tops, strict=True)]
    mean = jnp.mean(norms[0] * norms[1], where=present)
    return products * (left[:, None] * right[None, :]) / _or_one(mean)


def shared_out(shares: jax.Array, present: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The weights of the tasks present, on their simplex, and what they have of all the shares.

    Those present exchange their shares with one another only: a task that was away finds its own.
    """
    mass = jnp.sum(shares, where=present)
    even = (1 / jnp.maximum(jnp.sum(present), 1)).astype(shares.dtype)
    return jnp.where(present, divide(shares, mass, even), 0), mass


def simplex_step(
    weights: jax.Array, slope: jax.Array, step_size: jax.Array | float, present: jax.Array
) -> jax.Array:
    """A projected gradient step on the simplex; the old weights where the slope is not finite."""
    usable = jnp.all(jnp.isfinite(slope) | ~present)
    moved = project_on_simplex(weights - step_size * jnp.where(usable, slope, 0), present)
    return jnp.where(usable, moved, weights).astype(weights.dtype)


def exchange(log_weights: jax.Array, raised_by: jax.Array, moves: jax.Array) -> jax.Array:
    """An exponentiated-gradient step of weights, by their logarithms: their sum stays.

    Only those that move exchange theirs, with one another.
    """
    log_sum = functools.partial(jax.nn.logsumexp, where=moves)
    # A weight may return from 0 as long as its logarithm is finite.
    raised = log_weights + jnp.clip(raised_by, -1e30, 1e30)
    raised = jnp.maximum(raised - log_sum(raised) + log_sum(log_weights), -1e30)
    return jnp.where(moves, raised, log_weights)


def _or_one(x: jax.Array) -> jax.Array:
    return jnp.where(x > 0, x, 1)
