"""What the methods share that move weights over the simplex a step at a time."""

import jax
import jax.numpy as jnp
import optax

from mtl_optax.jacobian import Jacobian


def relative_products(first: Jacobian, second: Jacobian) -> jax.Array:
    """J J'ᵀ of two batches over the mean product of a task's two norms: of order 1 at any scale.

    A step size along it then means the same whatever the units of the losses.
    """
    products, left, right = first.cross_gramian(second)
    tops = [_or_one(jnp.max(jnp.abs(scales))) for scales in (left, right)]
    left, right = left / tops[0], right / tops[1]
    norms = [jac.norms() / top for jac, top in zip((first, second), tops, strict=True)]
    return products * (left[:, None] * right[None, :]) / _or_one(jnp.mean(norms[0] * norms[1]))


def simplex_step(weights: jax.Array, slope: jax.Array, step_size: jax.Array | float) -> jax.Array:
    """A projected gradient step on the simplex; the old weights where the slope is not finite."""
    usable = jnp.all(jnp.isfinite(slope))
    slope = jnp.where(usable, slope, 0)
    moved = optax.projections.projection_simplex(weights - step_size * slope)
    return jnp.where(usable, moved, weights).astype(weights.dtype)


def _or_one(x: jax.Array) -> jax.Array:
    return jnp.where(x > 0, x, 1)
